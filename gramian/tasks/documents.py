"""Read the documents of a file, for tasks, evaluation, distillation and analysis.

**FASTA or text.** A file is FASTA if its name ends in one of `FASTA_SUFFIXES`, possibly followed by
the suffix of a compression format. Any other file, and a text without a name, is FASTA if its first
line begins with `>` and its first sequence line consists of the letters A, C, G, T, U and N, in
upper or lower case. `gramian.tasks.genomes` defines how FASTA records are read.

**Compression** (gzip with any number of members, bgzip, bzip2, xz) is recognized by a file's first
bytes, not by its name.

**Text** is UTF-8. A byte order mark is removed, and every line ending becomes a line feed, as with
Python's `open`. Each line of a `.jsonl` or `.ndjson` file is a JSON object, which holds one
document under a key. Empty documents are skipped.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from gramian.tasks import genomes

__all__ = [
    "FASTA_SUFFIXES",
    "Document",
    "blocks",
    "documents_in",
    "find_files",
    "holds_keys",
    "is_compressed",
    "is_fasta",
    "read_documents",
    "read_objects",
    "register_reader",
]

FASTA_SUFFIXES = (".fa", ".fasta", ".fna", ".ffn", ".frn", ".faa", ".fas", ".fsa", ".mpfa")
"""The suffixes of FASTA files. In names of files, upper and lower case are equivalent."""

_COMPRESSED = (".gz", ".bgz", ".bz2", ".xz")
_FASTQ = (".fq", ".fastq")  # the reader of FASTA refuses the content with a clear error
_JSON_LINES = (".jsonl", ".ndjson")
_BLOCK = 2**20
_BOM = b"\xef\xbb\xbf"
_REFUSED = {
    b"\xff\xfe": "text in UTF-16 or UTF-32",
    b"\xfe\xff": "text in UTF-16",
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"%PDF": "a PDF",
    b"PAR1": "a table in Parquet",
}


@dataclass(frozen=True)
class Document:
    """A text that is independent of the documents before and after it.

    Attributes:
        text: the text. The text of a genome consists of upper-case codes of nucleotides only.
        name: name of the FASTA record or of the file, or "" if there is none.
        genome: whether the text was read as nucleotides.
    """

    text: str
    name: str = ""
    genome: bool = False


Reader = Callable[[Iterator[bytes], str, str], Iterator[Document]]
_READERS: dict[str, Reader] = {}
_R = TypeVar("_R", bound=Reader)


def register_reader(*suffixes: str) -> Callable[[_R], _R]:
    """Return a decorator that registers a function as the reader of files with these suffixes.

    The function receives the file's decompressed bytes in blocks, the file's name, and the key of
    the texts (`column` of `read_documents`). It yields the file's documents.

    Args:
        suffixes: suffixes of names of files, such as `".gb"`, in lower case and without the suffix
            of a compression format.

    Raises:
        ValueError: if a suffix does not begin with a period, has an upper-case letter, or already
            has a reader.
    """
    for suffix in suffixes:
        if not suffix.startswith(".") or suffix != suffix.lower():
            raise ValueError(f"a suffix must begin with a period, in lower case; got {suffix!r}.")
        if suffix in _READERS:
            raise ValueError(f"files in {suffix} have a reader already.")

    def add(reader: _R) -> _R:
        _READERS.update(dict.fromkeys(suffixes, reader))
        return reader

    return add


def holds_keys(file: str | Path) -> bool:
    """Return whether a file holds JSON lines, judging by the suffix of its name.

    JSON lines store documents under a key.
    """
    return _suffix(str(file)) in _JSON_LINES


def is_fasta(file: str | Path) -> bool:
    """Return whether the name of a file alone determines that it is read as FASTA."""
    return _suffix(str(file)) in (*FASTA_SUFFIXES, *_FASTQ)


def find_files(patterns: Any) -> list[str]:
    """Return the files that match a path, a pattern, or a list of paths and patterns.

    The files of each pattern are sorted. A file that matches several patterns is returned once.

    Raises:
        FileNotFoundError: if no file matches a pattern.
    """
    found: dict[str, None] = {}
    for pattern in patterns if isinstance(patterns, list | tuple) else [patterns]:
        wanted = str(Path(pattern).expanduser())
        files = [wanted] if Path(wanted).is_file() else sorted(glob.glob(wanted, recursive=True))
        files = [file for file in files if not Path(file).is_dir()]
        if not files:
            raise FileNotFoundError(f"no file matches {pattern}.")
        found |= dict.fromkeys(files)
    return list(found)


def blocks(file: str | Path) -> Iterator[bytes]:
    """Yield a file's bytes in blocks, decompressed and without a byte order mark.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is damaged, an archive, compressed in another format, or text in an
            encoding other than UTF-8.
    """
    with open(file, "rb") as raw:
        magic = raw.read(6)
        raw.seek(0)
        for beginning, kind in _REFUSED.items():
            if magic.startswith(beginning):
                raise ValueError(f"{file} is {kind}; give UTF-8, plain or by gzip, bzip2 or xz.")
        with closing(_decompressed(raw, magic)) as stream:
            first = True
            while True:
                try:
                    block = stream.read(_BLOCK)
                except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, OSError) as error:
                    if stream is raw:
                        raise
                    raise ValueError(f"{file} is damaged or cut short: {error}") from error
                if not block:
                    return
                yield block.removeprefix(_BOM) if first else block
                first = False


def is_compressed(file: str | Path) -> bool:
    """Return whether `blocks` changes or refuses the bytes of a file, judging by the first bytes.

    `blocks` decompresses compressed files, removes byte order marks, and refuses some formats.
    """
    with open(file, "rb") as raw:
        magic = raw.read(6)
        with closing(_decompressed(raw, magic)) as stream:
            return stream is not raw or magic.startswith((_BOM, *_REFUSED))


def _decompressed(raw: BinaryIO, magic: bytes) -> BinaryIO:
    if magic.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if magic.startswith(b"BZh"):
        return cast(BinaryIO, bz2.BZ2File(raw))
    if magic.startswith(b"\xfd7zXZ\x00"):
        return cast(BinaryIO, lzma.LZMAFile(raw))
    return raw


def read_documents(
    file: str | Path, *, column: str = "text", any_bytes: bool = False
) -> Iterator[Document]:
    """Yield the documents of one file: its FASTA records, the texts in its JSON lines, or its text.

    Args:
        file: the file, plain or compressed.
        column: key of the text in the objects of a `.jsonl` file.
        any_bytes: whether to accept bytes that are not UTF-8. They become surrogates (Python's
            `surrogateescape`).

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is not valid in its format. The message names the file.
    """
    name = str(file)
    stream = blocks(file)
    reader = _READERS.get(_suffix(name))
    if reader is not None:
        yield from reader(stream, name, column)
        return
    content = b"".join(stream)
    if _looks_like_fasta(content[:_BLOCK]):
        yield from _genomes(iter([content]), name)
        return
    text = _decoded(content, name, "surrogateescape" if any_bytes else "strict")
    del content
    text = _with_line_feeds(text)
    if text:
        yield Document(text, name)


def read_objects(file: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines, whatever its name.

    Args:
        file: the file, plain or compressed.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if a line holds no JSON object. The message names the file and the line.
    """
    yield from (values for _, values in _json_objects(blocks(file), str(file)))


@register_reader(*_JSON_LINES)
def _texts_under_keys(stream: Iterator[bytes], name: str, column: str) -> Iterator[Document]:
    objects = _json_objects(stream, name)
    yield from (Document(one, name) for one in _texts_in(objects, column) if one)


def _decoded(content: bytes, name: str, errors: str) -> str:
    if b"\0" in content:
        raise ValueError(f"{name} is no text: it holds bytes of value 0.")
    try:
        return content.decode("utf-8", errors=errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 text: {error.reason} at byte {error.start:,}."
        ) from error


def documents_in(text: str, source: str = "the text") -> list[Document]:
    """Return the documents of a text that is not in a file: its FASTA records, or the text itself.

    The rule of `gramian.tasks.documents` for texts without a name says whether a text is FASTA.

    Args:
        text: the text.
        source: name of the text in error messages.

    Raises:
        ValueError: if the text is FASTA and its letters are not codes of nucleotides.
    """
    if _looks_like_fasta(text[:_BLOCK].encode(errors="replace")):
        return list(_genomes(iter([text.encode().removeprefix(_BOM)]), source))
    text = _with_line_feeds(text.removeprefix("\ufeff"))
    return [Document(text)] if text else []


@register_reader(*FASTA_SUFFIXES, *_FASTQ)
def _genomes(stream: Iterator[bytes], source: str, column: str = "") -> Iterator[Document]:
    for name, pieces in genomes.records(stream, source):
        text = b"".join(pieces).decode("ascii")
        if text:
            yield Document(text, name, genome=True)


def _suffix(name: str) -> str:
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def _looks_like_fasta(beginning: bytes) -> bool:
    marked = False
    for line in beginning.removeprefix(_BOM).replace(b"\r", b"\n").split(b"\n"):
        line = line.strip()
        if line.startswith(b">"):
            marked = True
        elif line and not line.startswith(b";"):
            return marked and not line.translate(None, b"ACGTUNacgtun")
    return False


def _with_line_feeds(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _json_objects(stream: Iterator[bytes], file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects in JSON lines, with the file and line of each for error messages."""
    text = _with_line_feeds(_decoded(b"".join(stream), file, "strict"))
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: no JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{where}: an object is needed; got {type(values).__name__}.")
        yield where, values


def _texts_in(objects: Iterator[tuple[str, dict[str, Any]]], column: str) -> Iterator[str]:
    for where, values in objects:
        if column not in values:
            raise ValueError(f"{where}: no {column!r} among {', '.join(map(repr, values))}.")
        if not isinstance(values[column], str):
            raise ValueError(
                f"{where}: {column!r} must be a text; got {type(values[column]).__name__}."
            )
        try:
            values[column].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: {column!r} has half of a surrogate pair.") from error
        yield _with_line_feeds(values[column])
