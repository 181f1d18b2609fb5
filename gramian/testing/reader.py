"""Test that readers yield the same documents for all sizes of blocks and all compressions."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gramian.tasks import Document, read_documents
from gramian.testing.comparison import require

__all__ = ["check_reader"]

_COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
_BLOCKS = (1, 2, 3, 7)


def check_reader(
    reader: Callable[[Iterator[bytes], str, str], Iterator[Document]],
    suffix: str,
    content: bytes,
    documents: Sequence[Document],
    *,
    column: str = "text",
    refused: bytes | None = None,
) -> None:
    """Check that a registered reader yields the expected documents.

    The documents must not depend on the sizes of the blocks. `read_documents` must yield the same
    documents from a file whose name ends in the suffix, plain or compressed by gzip, bzip2 or xz.

    Args:
        reader: the function that is registered with `register_reader`.
        suffix: end of the files' names, such as `".gb"`.
        content: the bytes of a file in the reader's format.
        documents: the documents in `content`. An expected document whose name is "" matches any
            name.
        column: key of the texts, for formats that store texts under keys.
        refused: the bytes of an invalid file. The reader must refuse it with a ValueError, whose
            message is one sentence that begins with the file's name. By default, no invalid file is
            tried.

    Raises:
        AssertionError: if a property fails. The message names the property.
    """
    for size in (*_BLOCKS, max(1, len(content))):
        found = list(reader(_cut(content, size), f"file{suffix}", column))
        _compare(f"the reader of {suffix}: blocks of {size:,} bytes", found, documents)
    with tempfile.TemporaryDirectory() as folder:
        for ending, compress in _COMPRESSIONS.items():
            file = Path(folder, f"file{suffix}{ending}")
            file.write_bytes(compress(content))
            found = list(read_documents(file, column=column))
            _compare(f"the reader of {suffix}: a file in {suffix}{ending}", found, documents)
        if refused is not None:
            file = Path(folder, f"refused{suffix}")
            file.write_bytes(refused)
            _check_refusal(suffix, file, column)


def _cut(content: bytes, size: int) -> Iterator[bytes]:
    for begin in range(0, len(content), size):
        yield content[begin : begin + size]


def _compare(claim: str, found: Sequence[Document], documents: Sequence[Document]) -> None:
    require(
        len(found) == len(documents),
        f"{claim} must give {len(documents)} documents; got {len(found)}.",
    )
    for number, (one, due) in enumerate(zip(found, documents, strict=True)):
        for field in ("text", "name", "genome"):
            given, wanted = getattr(one, field), getattr(due, field)
            require(
                given == wanted or (field == "name" and not wanted),
                f"{claim} must give {field} {wanted!r} of document {number}; got {given!r}.",
            )


def _check_refusal(suffix: str, file: Path, column: str) -> None:
    try:
        found = list(read_documents(file, column=column))
    except ValueError as error:
        sentence = str(error)
        require(
            sentence.startswith(str(file)) and "\n" not in sentence,
            f"the reader of {suffix}: an error must be one sentence that begins with the file's "
            f"name; got {sentence!r}.",
        )
        return
    raise AssertionError(
        f"the reader of {suffix}: what is no such file must be refused; got {len(found)} documents."
    )
