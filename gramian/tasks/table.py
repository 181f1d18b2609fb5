"""Define a task that reads one sequence and one label from each line of CSV or TSV files."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from gramian._labels import IGNORED
from gramian._nearest import unknown
from gramian.tasks._task import (
    SPLITS,
    Description,
    Row,
    Task,
    has_rows,
    register,
    require_files,
    require_patterns,
)
from gramian.tasks.documents import Document, blocks
from gramian.tasks.encoding import Encoder
from gramian.tasks.tokenized import TokenizedTask, byte_tokenizer

__all__ = ["Table"]

KINDS = ("classification", "regression", "token_classification")
_IGNORED = str(IGNORED)


@register("table")
@dataclass(frozen=True, kw_only=True)
class Table(TokenizedTask):
    """A task that reads sequences and their labels from tables.

    A table is a TSV file if its name contains `.tsv`, and a CSV file otherwise. Its first line
    names the columns. Files may be compressed. The classes are the distinct labels of all files. If
    all labels are integers, the classes are in numeric order, otherwise in alphabetic order. The
    seed has no effect.

    With `kind="token_classification"`, every token has a class. A label then has one word for each
    token, separated by white space, or one character for each token. A token with the word -100 is
    not scored. Special tokens are not scored either.

    Args:
        train: path or pattern of the training split's files, or a list of paths and patterns.
        validation: the same for the validation split.
        test: the same for the test split.
        sequence: name of the column of sequences.
        label: name of the column of labels.
        kind: `"classification"`, `"regression"` if labels are numbers, or
            `"token_classification"` if every token has a class.
        length: largest number of tokens in a sequence.
        tokenizer: a tokenizer of transformers, its folder or its name, or `"dna"` for HyenaDNA's
            tokenizer; by default the model's tokenizer if it is known, otherwise a tokenizer of
            bytes.
        special_tokens: whether to add the special tokens that the tokenizer adds by default, such
            as the `[SEP]` with which published HyenaDNA classifiers were trained.
        names: names of the classes in the order of their numbers; by default, those of the model
            if it is a classifier that has names for its labels, and otherwise the distinct labels.

    Raises:
        ValueError: if no files are given, or `kind` is unknown. When the files are read: if a
            column or a label is missing; if a sequence is empty or longer than `length`; if a label
            of a regression is not a number; or if a label of a token classification does not have a
            class for each token.
        FileNotFoundError: when the files are read, if a path or pattern matches no file.
    """

    train: str | list[str] | None = None
    validation: str | list[str] | None = None
    test: str | list[str] | None = None
    sequence: str = "sequence"
    label: str = "label"
    kind: str = "classification"
    special_tokens: bool = True
    names: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_patterns(self)
        if all(getattr(self, split) is None for split in SPLITS):
            raise ValueError("the task table needs files: give train, validation or test.")
        if self.kind not in KINDS:
            raise ValueError(unknown("kind of table", self.kind, KINDS))

    def default_tokenizer(self) -> Any:
        return byte_tokenizer()

    def classes(self) -> list[str]:
        """Return the names of the classes in the order of their numbers, or [] for a regression."""
        if self.kind == "regression":
            return []
        if self.names is not None:
            return list(self.names)
        lines = (line for split in SPLITS if has_rows(self, split) for line in self._lines(split))
        found = {one for _, _, label in lines for one in self._labels(label)} - {_IGNORED}
        return sorted(found, key=int if all(map(_is_integer, found)) else str)

    def with_classes(self, names: Sequence[str]) -> Task:
        own = self.classes()
        if not own or own == list(names):
            return self
        others = [name for name in own if name not in names]
        if others:
            raise ValueError(
                f"the classes of the table must be among the model's, {', '.join(names)}; got "
                f"{', '.join(others)}."
            )
        return dataclasses.replace(self, names=list(names))

    def description(self) -> Description:
        tokens = super().description()
        return Description(
            self.kind,
            self.length,
            vocab_size=tokens.vocab_size,
            num_labels=1 if self.kind == "regression" else len(self.classes()),
            pad_token_id=tokens.pad_token_id,
        )

    def rows(self, split: str, seed: int) -> Iterator[Row]:
        tokenizer = self.own_tokenizer()
        encode = Encoder(tokenizer, special_tokens=self.special_tokens)
        bare = Encoder(tokenizer, special_tokens=False)
        numbers = {name: number for number, name in enumerate(self.classes())}
        for where, sequence, label in self._lines(split):
            ids = encode(Document(sequence, where))
            if not 0 < len(ids) <= self.length:
                raise ValueError(
                    f"{where}: {self.sequence} has {len(ids):,} tokens and must have from 1 to "
                    f"{self.length:,}, the setting length."
                )
            if self.kind == "classification":
                yield {"input_ids": ids, "labels": self._number_of(numbers, label, where)}
            elif self.kind == "token_classification":
                tokens = bare(Document(sequence, where))
                labels = np.full(len(ids), IGNORED)
                words = self._labels(label)
                if len(words) != len(tokens):
                    raise ValueError(
                        f"{where}: {self.label} must have a class for each of the {len(tokens):,} "
                        f"tokens of {self.sequence}; got {len(words):,}."
                    )
                begin = _find(tokens, ids, where)
                labels[begin : begin + len(words)] = [
                    IGNORED if word == _IGNORED else self._number_of(numbers, word, where)
                    for word in words
                ]
                yield {"input_ids": ids, "labels": labels}
            else:
                yield {"input_ids": ids, "labels": np.array([_number(label, where, self.label)])}

    def _number_of(self, numbers: dict[str, int], name: str, where: str) -> int:
        """Return the number of a class."""
        if name not in numbers:
            raise ValueError(
                f"{where}: {self.label} must be among the names, {', '.join(numbers)}; got {name}."
            )
        return numbers[name]

    def _labels(self, label: str) -> list[str]:
        """Return the classes in a label: the label itself, or the class of every token."""
        if self.kind != "token_classification":
            return [label]
        words = label.split()
        return words if len(words) > 1 else list(label)

    def _lines(self, split: str) -> Iterator[tuple[str, str, str]]:
        """Yield the file and line number, the sequence and the label of every line."""
        for file in require_files(self, "table", split):
            status = os.stat(file)
            columns = (self.sequence, self.label)
            for number, values in _read(file, columns, status.st_size, status.st_mtime_ns):
                yield f"{file}, line {number}", *values


@lru_cache(maxsize=16)
def _read(
    file: str, columns: tuple[str, str], size: int, changed: int
) -> list[tuple[int, tuple[str, str]]]:
    """Read two columns of a file, with line numbers.

    `size` and `changed` distinguish versions of the file in the cache.
    """
    try:
        text = b"".join(blocks(file)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error.reason}.") from error
    tabs = ".tsv" in os.path.basename(file).lower()
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",")
    try:
        header = reader.fieldnames or []
        for column in columns:
            if column not in header:
                raise ValueError(f"{file}: {unknown('column', column, header)}")
        found = []
        for line in reader:
            values = tuple(line[column] for column in columns)
            for column, value in zip(columns, values, strict=True):
                if not value:
                    raise ValueError(f"{file}, line {reader.line_num}: {column} is empty.")
            found.append((reader.line_num, (values[0], values[1].strip())))
    except csv.Error as error:
        raise ValueError(
            f"{file}, line {reader.line_num} is no line of a table: {error}."
        ) from error
    return found


def _find(tokens: np.ndarray, ids: np.ndarray, where: str) -> int:
    """Return the index in `ids`, which include special tokens, at which the tokens begin.

    Args:
        tokens: the tokens of a sequence without special tokens.
        ids: the tokens of the sequence with special tokens.
        where: name of the line, for the message of an error.

    Raises:
        ValueError: if special tokens are between the tokens.
    """
    for begin in range(len(ids) - len(tokens) + 1):
        if np.array_equal(ids[begin : begin + len(tokens)], tokens):
            return begin
    raise ValueError(
        f"{where}: the tokenizer's special tokens must stand before and after those of a sequence, "
        "or special_tokens must be off."
    )


def _number(label: str, where: str, column: str) -> float:
    try:
        number = float(label)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where}: {column} must be a finite number; got {label!r}.")
    return number


def _is_integer(label: str) -> bool:
    try:
        int(label)
    except ValueError:
        return False
    return True
