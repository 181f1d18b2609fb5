"""Language modelling on bytes or tokens of text files or any corpus of `datasets`.

No row holds two documents. A convolution or a recurrence carries what it has read on to whatever
follows, and no mask makes it forget, so documents that share a sequence leak into each other; here
each is cut into windows of its own, and the collator pads the short last ones under a mask.
`packing="concatenate"` is the published practice of WikiText-103 and the like: one stream with an
end mark after each document, cut into full windows.

A row's labels are the next tokens. Windows of a document overlap in no label, and a document's
first token is asked for by nobody.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gramian._nearest import unknown
from gramian.tasks._task import (
    SPLITS,
    Description,
    Row,
    Task,
    register,
    require_files,
    require_patterns,
    require_sizes,
)
from gramian.tasks.documentation import python_topics
from gramian.tasks.documents import Document, holds_keys, read_documents
from gramian.tasks.encoding import Encoder, load_tokenizer

__all__ = ["PythonDocumentation", "Text", "windows"]

BYTES, END_OF_TEXT, PADDING = 259, 257, 258  # as gramian.models.ByteTokenizer has them


def windows(
    documents: Iterator[np.ndarray] | Iterator[Iterator[np.ndarray]],
    length: int,
    packing: str,
    end: int | None,
) -> Iterator[Row]:
    """Rows of at most `length` tokens from documents of token ids.

    Args:
        documents: of token ids (tokens,), or of pieces of them.
        length: tokens of a row; its labels are one step ahead.
        packing: `"document"` or `"concatenate"`.
        end: the id after each document, or None for none.
    """
    streams = (iter([one]) if isinstance(one, np.ndarray) else one for one in documents)
    if packing == "concatenate":
        streams = (stream for stream in [_chain(streams, end)])  # one endless document
        end = None
    for pieces in streams:
        rest = np.empty(0, dtype=np.int64)
        for piece in pieces:
            rest = np.concatenate([rest, piece])
            starts = range(0, max(0, len(rest) - length), length)
            for start in starts:
                window = rest[start : start + length + 1]
                yield {"input_ids": window[:-1], "labels": window[1:]}
            rest = rest[len(starts) * length :]
        if packing == "document":
            if end is not None:
                rest = np.append(rest, end)
            for start in range(0, len(rest) - 1, length):
                window = rest[start : start + length + 1]
                yield {"input_ids": window[:-1], "labels": window[1:]}


def _chain(documents: Iterator[Iterator[np.ndarray]], end: int | None) -> Iterator[np.ndarray]:
    for pieces in documents:
        yield from pieces
        if end is not None:
            yield np.array([end])


@dataclass(frozen=True, kw_only=True)
class _TextTask(Task):
    length: int = 1024
    packing: str = "document"
    tokenizer: Any = None

    def __post_init__(self) -> None:
        require_sizes(self, "length")
        if self.packing not in ("document", "concatenate"):
            raise ValueError(f"packing must be 'document' or 'concatenate'; got {self.packing!r}.")

    def documents(self, split: str) -> Iterator[Document]:
        raise NotImplementedError

    def description(self) -> Description:
        if self.tokenizer is None:
            return Description(
                "tokens", self.length, vocab_size=BYTES, pad_token_id=PADDING, text=True
            )
        return described(self.own_tokenizer(), self.length)

    def own_tokenizer(self) -> Any:
        if self.tokenizer is None:
            from gramian.models import ByteTokenizer

            return ByteTokenizer()
        return loaded(self.tokenizer)

    def tokens_of(self, tokenizer: Any) -> Task:
        return in_tokens_of(self, tokenizer)

    def rows(self, split: str, seed: int) -> Iterator[Row]:
        encode: Callable[[Document], np.ndarray] = _bytes
        end = END_OF_TEXT
        if self.tokenizer is not None:
            tokenizer = self.own_tokenizer()
            encode, end = Encoder(tokenizer, special_tokens=False), tokenizer.eos_token_id
        tokens = (encode(document) for document in self.documents(split))
        return windows(tokens, self.length, self.packing, end)


def loaded(tokenizer: Any) -> Any:
    """The setting `tokenizer` of a task as a tokenizer: a path, a name, or one already."""
    return load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer


def described(tokenizer: Any, length: int) -> Description:
    """Of a task of next tokens by a tokenizer of transformers."""
    pad = tokenizer.pad_token_id
    return Description(
        "tokens", length, vocab_size=len(tokenizer), pad_token_id=0 if pad is None else pad
    )


def in_tokens_of(task: Any, tokenizer: Any) -> Any:
    """A task with the setting `tokenizer`, read by a model's own unless it names another.

    Raises:
        ValueError: if it names another.
    """
    own = task.own_tokenizer()
    if own.get_vocab() == tokenizer.get_vocab():
        return task
    if task.tokenizer is not None:
        raise ValueError(
            f"the task's tokenizer has {len(own):,} tokens that are not the {len(tokenizer):,} of "
            "the model's own; leave the setting tokenizer out, and the model's is taken."
        )
    return dataclasses.replace(task, tokenizer=tokenizer)


def _bytes(document: Document) -> np.ndarray:
    raw = document.text.encode("utf-8", errors="surrogateescape")
    return np.frombuffer(raw, dtype=np.uint8).astype(np.int64)


@register("text")
@dataclass(frozen=True, kw_only=True)
class Text(_TextTask):
    """Text files, or a corpus that `datasets` reads, as bytes or tokens.

    A document is a file, a line of a `.jsonl` file, a record of a FASTA file or a row of the
    corpus, or the part of one between separators. `gramian.tasks.documents` tells how files are
    read: compressed or not, as UTF-8 with line feeds, and what makes a file FASTA. Without a
    tokenizer, bytes that are no UTF-8 are kept as they are. The seed changes nothing.

    Args:
        train: paths or patterns (`books/*.txt`) of the training split's files, one or a list.
        validation: likewise.
        test: likewise.
        separator: where texts are cut into documents, JSON lines and rows of a corpus too; by
            default each is one. One that is found nowhere is warned of.
        corpus: instead of files, a corpus of `datasets`: a folder of `save_to_disk`, or, online,
            a name on the Hub. Its splits are taken by their names.
        corpus_config: which configuration of it.
        column: of a corpus or of `.jsonl` lines, which holds the text.
        length: tokens of a row.
        packing: `"document"` or `"concatenate"`.
        tokenizer: a tokenizer of transformers, its folder or its name; by default bytes, with the
            ids of `gramian.models.ByteTokenizer`, or a model's own tokenizer where one is known.

    Raises:
        ValueError: on both or neither of files and corpus, an unknown packing.
        FileNotFoundError: on a path or pattern without files, when they are read.
    """

    train: str | list[str] | None = None
    validation: str | list[str] | None = None
    test: str | list[str] | None = None
    separator: str | None = None
    corpus: str | None = None
    corpus_config: str | None = None
    column: str = "text"

    published = {  # noqa: RUF012
        "wikitext-103": {
            "corpus": "Salesforce/wikitext",
            "corpus_config": "wikitext-103-raw-v1",
            "tokenizer": "openai-community/gpt2",
            "packing": "concatenate",
            "length": 1024,
        }
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_patterns(self)
        files = any(getattr(self, split) is not None for split in SPLITS)
        if files == (self.corpus is not None):
            raise ValueError("give files (train, validation, test) or a corpus, one of the two.")
        if self.separator is not None and not (isinstance(self.separator, str) and self.separator):
            raise ValueError(f"separator must be a text, not empty; got {self.separator!r}.")
        if self.corpus_config is not None and self.corpus is None:
            raise ValueError("corpus_config needs a corpus.")

    def documents(self, split: str) -> Iterator[Document]:
        found = False
        for document in self._uncut(split):
            parts = [document.text]
            if self.separator is not None and not document.genome:
                parts = document.text.split(self.separator)
                found |= len(parts) > 1
            yield from (dataclasses.replace(document, text=part) for part in parts if part)
        if self.separator is not None and not found:
            warnings.warn(
                f"the separator {self.separator!r} is nowhere in the {split} split, so no text was "
                "cut.",
                stacklevel=2,
            )

    def _uncut(self, split: str) -> Iterator[Document]:
        if self.corpus is not None:
            yield from self._corpus(split)
            return
        files = require_files(self, "text", split)
        if self.column != "text" and not any(map(holds_keys, files)):
            raise ValueError(
                f"column is {self.column!r}, but none of the {split} files has keys: their names "
                "do not end in .jsonl."
            )
        for file in files:
            yield from read_documents(file, column=self.column, any_bytes=self.tokenizer is None)

    def _corpus(self, split: str) -> Iterator[Document]:
        import datasets

        assert self.corpus is not None
        rows: Any
        if Path(self.corpus).expanduser().is_dir():
            rows = datasets.load_from_disk(str(Path(self.corpus).expanduser()))
            if isinstance(rows, datasets.DatasetDict):
                if split not in rows:
                    raise ValueError(f"{self.corpus} has no split {split!r}.")
                rows = rows[split]
            elif split != "train":
                raise ValueError(f"{self.corpus} has no splits; it is all train.")
        else:
            rows = datasets.load_dataset(
                self.corpus, self.corpus_config, split=split, streaming=True
            )
        for number, row in enumerate(rows):
            if self.column not in row:
                raise ValueError(unknown(f"column of {self.corpus}", self.column, row))
            text = row[self.column]
            if text is None:
                continue
            if not isinstance(text, str):
                raise ValueError(
                    f"{self.corpus}, row {number}: {self.column!r} must be a text, got "
                    f"{type(text).__name__}."
                )
            if text:
                yield Document(text, self.corpus)


@register("python_documentation")
@dataclass(frozen=True, kw_only=True)
class PythonDocumentation(_TextTask):
    """The text behind Python's `help()`, which is at hand everywhere: the last topics held out.

    Args:
        length: tokens of a row.
        packing: `"document"` (a topic is one) or `"concatenate"`.
        tokenizer: as for the task text.
        held_out: share of the text, by characters, in the validation and in the test split.
    """

    length: int = 256
    held_out: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.held_out < 0.5:
            raise ValueError(f"held_out must lie between 0 and 0.5; got {self.held_out}.")

    def documents(self, split: str) -> Iterator[Document]:
        topics = python_topics()
        ends = list(itertools.accumulate(map(len, topics)))
        bounds = {"train": (0.0, 1 - 2 * self.held_out)}
        bounds["validation"] = (bounds["train"][1], 1 - self.held_out)
        bounds["test"] = (bounds["validation"][1], 2.0)
        low, high = bounds[split]
        for topic, end in zip(topics, ends, strict=True):
            middle = (end - len(topic) / 2) / ends[-1]
            if low <= middle < high:
                yield Document(topic)
