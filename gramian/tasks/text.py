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

import glob
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gramian.tasks._task import SPLITS, Description, Row, Task, register, require_sizes
from gramian.tasks.documentation import python_topics

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
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        require_sizes(self, "length")
        if self.packing not in ("document", "concatenate"):
            raise ValueError(f"packing must be 'document' or 'concatenate'; got {self.packing!r}.")

    def documents(self, split: str) -> Iterator[str | bytes]:
        raise NotImplementedError

    def description(self) -> Description:
        if self.tokenizer is None:
            return Description(
                "tokens", self.length, vocab_size=BYTES, pad_token_id=PADDING, text=True
            )
        tokenizer = load_tokenizer(self.tokenizer)
        pad = tokenizer.pad_token_id
        return Description(
            "tokens", self.length, vocab_size=len(tokenizer), pad_token_id=0 if pad is None else pad
        )

    def rows(self, split: str, seed: int) -> Iterator[Row]:
        encode, end = _encoder(self.tokenizer)
        tokens = (encode(document) for document in self.documents(split))
        return windows(tokens, self.length, self.packing, end)


def load_tokenizer(path: str) -> Any:
    """A tokenizer of transformers, from a folder or, online, by name."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def _encoder(path: str | None) -> tuple[Callable[[str | bytes], np.ndarray], int | None]:
    if path is None:

        def encode_bytes(text: str | bytes) -> np.ndarray:
            raw = text.encode() if isinstance(text, str) else text
            return np.frombuffer(raw, dtype=np.uint8).astype(np.int64)

        return encode_bytes, END_OF_TEXT
    tokenizer = load_tokenizer(path)

    def encode(text: str | bytes) -> np.ndarray:
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return np.array(ids, dtype=np.int64)

    return encode, tokenizer.eos_token_id


@register("text")
@dataclass(frozen=True, kw_only=True)
class Text(_TextTask):
    """Text files, or a corpus that `datasets` reads, as bytes or tokens.

    A document is a file, a part of a file between separators, a line of a `.jsonl` file, or a row
    of the corpus. The seed changes nothing.

    Args:
        train: paths or patterns (`books/*.txt`) of the training split's files, one or a list.
        validation: likewise.
        test: likewise.
        separator: where a file is cut into documents; by default a file is one.
        corpus: instead of files, a corpus of `datasets`: a folder of `save_to_disk`, or, online,
            a name on the Hub. Its splits are taken by their names.
        corpus_config: which configuration of it.
        column: of a corpus or of `.jsonl` lines, which holds the text.
        length: tokens of a row.
        packing: `"document"` or `"concatenate"`.
        tokenizer: folder or name of a tokenizer of transformers; by default bytes, with the ids of
            `gramian.models.ByteTokenizer`.

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
        files = any(getattr(self, split) is not None for split in SPLITS)
        if files == (self.corpus is not None):
            raise ValueError("give files (train, validation, test) or a corpus, one of the two.")
        if self.separator == "":
            raise ValueError("separator must not be empty.")

    def documents(self, split: str) -> Iterator[str | bytes]:
        if self.corpus is not None:
            yield from self._corpus(split)
            return
        patterns = getattr(self, split)
        if patterns is None:
            raise ValueError(f"the task text has no {split} files; give {split}: PATH.")
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
            if not found:
                raise FileNotFoundError(f"no file matches {pattern}.")
            for file in found:
                yield from self._file(Path(file))

    def _file(self, file: Path) -> Iterator[str | bytes]:
        if file.suffix == ".jsonl":
            with file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        record = json.loads(line)
                        if self.column not in record:
                            raise ValueError(f"{file}, line {number}: no {self.column!r}.")
                        yield record[self.column]
        elif self.separator is None:
            yield file.read_bytes()
        else:
            yield from (part for part in file.read_bytes().split(self.separator.encode()) if part)

    def _corpus(self, split: str) -> Iterator[str]:
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
        for row in rows:
            if row[self.column]:
                yield row[self.column]


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

    def documents(self, split: str) -> Iterator[str | bytes]:
        topics = python_topics()
        ends = list(itertools.accumulate(map(len, topics)))
        bounds = {"train": (0.0, 1 - 2 * self.held_out)}
        bounds["validation"] = (bounds["train"][1], 1 - self.held_out)
        bounds["test"] = (bounds["validation"][1], 2.0)
        low, high = bounds[split]
        for topic, end in zip(topics, ends, strict=True):
            middle = (end - len(topic) / 2) / ends[-1]
            if low <= middle < high:
                yield topic
