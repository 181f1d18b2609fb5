"""Define language modeling on bytes or tokens, of text files or of a corpus of `datasets`."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gramian._checks import check_choice
from gramian._extras import require
from gramian._nearest import unknown
from gramian.tasks._task import (
    SPLITS,
    Description,
    Row,
    register,
    require_files,
    require_patterns,
)
from gramian.tasks.documentation import python_topics
from gramian.tasks.documents import Document, holds_keys, read_documents
from gramian.tasks.encoding import Encoder
from gramian.tasks.tokenized import TokenizedTask, byte_tokenizer, windows

__all__ = ["PythonDocumentation", "Text"]

BYTES, END_OF_TEXT, PADDING = 259, 257, 258  # as gramian.models.ByteTokenizer has them


@dataclass(frozen=True, kw_only=True)
class _TextTask(TokenizedTask):
    packing: str = "document"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("packing", self.packing, ("document", "concatenate"))

    @abstractmethod
    def documents(self, split: str) -> Iterator[Document]:
        """Yield the documents of a split."""

    def default_tokenizer(self) -> Any:
        return byte_tokenizer()

    def description(self) -> Description:
        if self.tokenizer is None:
            return Description(
                "tokens", self.length, vocab_size=BYTES, pad_token_id=PADDING, text=True
            )
        return super().description()

    def rows(self, split: str, seed: int) -> Iterator[Row]:
        encode: Callable[[Document], np.ndarray] = _bytes
        end = END_OF_TEXT
        if self.tokenizer is not None:
            tokenizer = self.own_tokenizer()
            encode, end = Encoder(tokenizer, special_tokens=False), tokenizer.eos_token_id
        tokens = (encode(document) for document in self.documents(split))
        return windows(tokens, self.length, self.packing, end)


def _bytes(document: Document) -> np.ndarray:
    raw = document.text.encode("utf-8", errors="surrogateescape")
    return np.frombuffer(raw, dtype=np.uint8).astype(np.int64)


@register("text")
@dataclass(frozen=True, kw_only=True)
class Text(_TextTask):
    """Language modeling on text files, or on a corpus that `datasets` reads.

    A document is a file, a line of a `.jsonl` file, a record of a FASTA file or a row of the
    corpus. With `separator`, all of these except records of FASTA files are divided into several
    documents. `gramian.tasks.documents` defines how files are decompressed and decoded, and which
    files are FASTA. Without a tokenizer, bytes that are not UTF-8 are kept. The seed has no effect.

    Args:
        train: path or pattern (such as `books/*.txt`) of the training split's files, or a list of
            paths and patterns.
        validation: the same for the validation split.
        test: the same for the test split.
        separator: string that separates documents within a text, a JSON line or a row of the
            corpus; by default each of these is one document. If the separator never occurs, a
            warning is given.
        corpus: a corpus of `datasets` in place of files: a folder that `save_to_disk` wrote, or the
            name of a data set on the Hugging Face Hub. Its splits must be called train, validation
            and test.
        corpus_config: name of the corpus's configuration on the Hub.
        column: column of the corpus, or key of the `.jsonl` lines, that holds the text.
        length: number of tokens in a row.
        packing: with `"document"`, no row spans two documents. With `"concatenate"`, all documents
            form one stream, and an end token follows each of them.
        tokenizer: a tokenizer of transformers, its folder or its name; by default the model's
            tokenizer if it is known, otherwise `gramian.models.ByteTokenizer`.

    Raises:
        ValueError: if both or neither of files and a corpus are given, or if `packing` is unknown.
        FileNotFoundError: when the files are read, if a path or pattern matches no file.
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
        require("a corpus", "train", "datasets")
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
                    f"{self.corpus}, row {number}: {self.column!r} must be a text; got "
                    f"{type(text).__name__}."
                )
            if text:
                yield Document(text, self.corpus)


@register("python_documentation")
@dataclass(frozen=True, kw_only=True)
class PythonDocumentation(_TextTask):
    """Language modeling on the text that Python's `help()` shows.

    The text ships with Python. Its last topics belong to the validation and test splits.

    Args:
        length: number of tokens in a row.
        packing: `"document"` or `"concatenate"`, as for the task `text`. A topic is a document.
        tokenizer: a tokenizer, as for the task `text`.
        held_out: share of the text, in characters, that belongs to the validation split. The share
            of the test split is the same.
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
