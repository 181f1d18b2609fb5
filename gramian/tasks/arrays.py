"""Define a task that reads inputs and labels, as sequences, from the user's numpy files."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

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

__all__ = ["Arrays"]

INTEGERS = ("classification", "tokens", "token_classification")
KINDS = (*INTEGERS, "regression", "signal")


@register("arrays")
@dataclass(frozen=True, kw_only=True)
class Arrays(Task):
    """A task that reads its rows from `.npz` files of numpy.

    A file has an array of inputs and an array of labels:

        numpy.savez("train.npz", inputs=inputs, labels=labels)

    Inputs are real numbers, (rows, length) or (rows, length, features), or integers (rows, length),
    which are token ids. The labels determine the kind of the task, unless `kind` is given:

    | labels | shape | kind |
    |---|---|---|
    | integers | (rows,) | `"classification"`, a class per row |
    | real numbers | (rows,) or (rows, numbers) | `"regression"`, numbers per row |
    | real numbers | (rows, length) or (rows, length, numbers) | `"signal"`, numbers per position |
    | integers | (rows, length) | `"tokens"`, a token id per position |
    | integers, with `kind` | (rows, length) | `"token_classification"`, a class per position |

    Labels of -100 are not scored. The seed has no effect.

    Args:
        train: path or pattern of the training split's files, or a list of paths and patterns.
        validation: the same for the validation split.
        test: the same for the test split.
        inputs: name of the array of inputs in a file.
        labels: name of the array of labels in a file.
        kind: kind of the task: `"classification"`, `"regression"`, `"signal"`, `"tokens"` or
            `"token_classification"`; by default, the kind that the table gives.
        num_labels: number of classes; by default one more than the largest label in the files.
        vocab_size: number of token ids; by default one more than the largest id in the files.

    Raises:
        ValueError: if no files are given, or `kind` is unknown. When the files are read: if a file
            is not an `.npz` file, lacks an array, or has an array of the wrong shape or type of
            numbers.
        FileNotFoundError: when the files are read, if a path or pattern matches no file.
    """

    train: str | list[str] | None = None
    validation: str | list[str] | None = None
    test: str | list[str] | None = None
    inputs: str = "inputs"
    labels: str = "labels"
    kind: str | None = None
    num_labels: int | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        require_patterns(self)
        if all(getattr(self, split) is None for split in SPLITS):
            raise ValueError("the task arrays needs files: give train, validation or test.")
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(unknown("kind of arrays", self.kind, KINDS))

    def description(self) -> Description:
        files = [file for split in SPLITS if has_rows(self, split) for file in self._files(split)]
        layouts = {file: self._arrays(file).layout for file in files}
        layout = layouts[files[0]]
        for file, other in layouts.items():
            if (other.kind, other.input_size, other.numbers) != (
                layout.kind,
                layout.input_size,
                layout.numbers,
            ):
                raise ValueError(f"{file} has {other}, and {files[0]} has {layout}.")
            if other.length != layout.length and (layout.input_size or layout.kind == "signal"):
                raise ValueError(
                    f"{file} has sequences of length {other.length}, and {files[0]} of "
                    f"{layout.length}; numbers need one length."
                )
        num_labels = layout.numbers
        if layout.kind in ("classification", "token_classification"):
            num_labels = self._size("num_labels", max(one.classes for one in layouts.values()))
        vocab_size = None
        if layout.input_size is None:
            vocab_size = self._size("vocab_size", max(one.ids for one in layouts.values()))
        return Description(
            layout.kind,
            max(one.length for one in layouts.values()),
            vocab_size=vocab_size,
            num_labels=num_labels,
            input_size=layout.input_size,
        )

    def rows(self, split: str, seed: int) -> Iterator[Row]:
        for file in self._files(split):
            arrays = self._arrays(file)
            name = "input_ids" if arrays.layout.input_size is None else "input_values"
            for inputs, labels in zip(arrays.inputs, arrays.labels, strict=True):
                yield {name: inputs, "labels": labels}

    def _files(self, split: str) -> list[str]:
        return require_files(self, "arrays", split)

    def _arrays(self, file: str) -> _Arrays:
        status = os.stat(file)
        return _read(file, self.inputs, self.labels, self.kind, status.st_size, status.st_mtime_ns)

    def _size(self, name: str, found: int) -> int:
        given = getattr(self, name)
        if given is None:
            return found
        if not isinstance(given, int) or isinstance(given, bool) or given < found:
            raise ValueError(
                f"{name} must be an integer of at least {found}, which the files hold; got "
                f"{given!r}."
            )
        return given


class _Layout(NamedTuple):
    """The layout of a file's arrays.

    `numbers` is the number of real numbers in a label, or None if labels are integers. `ids` is one
    more than the largest token id, and `classes` is one more than the largest class.
    """

    kind: str
    length: int
    input_size: int | None
    numbers: int | None
    ids: int
    classes: int

    def __str__(self) -> str:
        inputs = "token ids" if self.input_size is None else f"{self.input_size} features"
        labels = "" if self.numbers is None else f" of {self.numbers} numbers"
        return f"inputs of {inputs} and labels for {self.kind}{labels}"


class _Arrays(NamedTuple):
    inputs: np.ndarray
    labels: np.ndarray
    layout: _Layout


@lru_cache(maxsize=16)
def _read(
    file: str, inputs: str, labels: str, kind: str | None, size: int, changed: int
) -> _Arrays:
    """Read a file's arrays. `size` and `changed` distinguish versions of the file in the cache."""
    x, y = _load(file, (inputs, labels))
    ids = x.dtype.kind in "iu"
    if x.ndim not in ((2,) if ids else (2, 3)) or not x.size:
        accepted = "(rows, length)" if ids else "(rows, length) or (rows, length, features)"
        raise ValueError(
            f"{file}: {inputs} of {'token ids' if ids else 'numbers'} must be of shape {accepted}, "
            f"with none of 0; got {x.shape}."
        )
    if len(x) != len(y):
        raise ValueError(f"{file}: {inputs} has {len(x)} rows and {labels} has {len(y)}.")
    if ids and x.min() < 0:
        raise ValueError(f"{file}: {inputs} must be token ids of at least 0; got {x.min()}.")
    if not ids and not np.isfinite(x).all():
        raise ValueError(f"{file}: {inputs} must be finite; it holds NaN or infinity.")
    kind = kind or _kind(x, y)
    y = _labels(y, kind, x, f"{file}: {labels}")
    x = x if ids else x.reshape(*x.shape[:2], -1).astype(np.float32, copy=False)
    due = y[y != IGNORED]
    largest = int(due.max()) if y.dtype.kind in "iu" and due.size else 0
    layout = _Layout(
        kind,
        x.shape[1],
        None if ids else x.shape[2],
        None if kind in INTEGERS else y.shape[-1],
        max(int(x.max()), largest if kind == "tokens" else 0) + 1 if ids else 0,
        largest + 1,
    )
    return _Arrays(x, y, layout)


def _load(file: str, names: tuple[str, str]) -> list[np.ndarray]:
    try:
        opened = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(_not_arrays(file)) from error
    if not isinstance(opened, np.lib.npyio.NpzFile):
        raise ValueError(_not_arrays(file))
    found = []
    with opened:
        for name in names:
            if name not in opened:
                raise ValueError(f"{file}: {unknown('array', name, opened.files)}")
            try:
                array: Any = opened[name]
            except ValueError as error:  # an array of objects, which only a pickle could hold
                raise ValueError(
                    f"{file}: {name} must hold numbers, all rows of one length; it holds objects."
                ) from error
            if array.dtype.kind not in "biuf":
                raise ValueError(f"{file}: {name} must hold numbers; it holds {array.dtype}.")
            if array.ndim < 1:
                raise ValueError(f"{file}: {name} must have rows; it is one number.")
            found.append(array.astype(np.int64) if array.dtype.kind == "b" else array)
    return found


def _not_arrays(file: str) -> str:
    return f"{file} is no .npz file of numpy; write one by numpy.savez(PATH, inputs=…, labels=…)."


def _kind(x: np.ndarray, y: np.ndarray) -> str:
    """Return the kind of task that the labels imply."""
    everywhere = y.ndim >= 2 and y.shape[1] == x.shape[1]
    if y.dtype.kind in "iu":
        return "tokens" if everywhere else "classification"
    return "signal" if everywhere else "regression"


def _labels(y: np.ndarray, kind: str, x: np.ndarray, what: str) -> np.ndarray:
    """Convert labels to the shape and dtype that a kind of task requires.

    Raises:
        ValueError: if the labels cannot be converted.
    """
    rows, length = x.shape[:2]
    integers = kind in INTEGERS
    if integers and y.dtype.kind not in "iu":
        raise ValueError(f"{what} must be integers for {kind}; it holds {y.dtype}.")
    if kind == "tokens" and x.dtype.kind not in "iu":
        raise ValueError(
            f"{what} has an integer at every position, for which the inputs must be token ids; "
            "they are real numbers. Give kind: token_classification to predict them as classes, or "
            "kind: signal to predict them as numbers."
        )
    accepted = {
        "classification": (rows,),
        "tokens": (rows, length),
        "token_classification": (rows, length),
        "regression": (rows, y.shape[1] if y.ndim == 2 else 1),
        "signal": (rows, length, y.shape[2] if y.ndim == 3 else 1),
    }[kind]
    if not integers and y.shape == accepted[:-1]:
        y = y[..., None]
    if y.shape != accepted or not y.size:
        raise ValueError(
            f"{what} must be of shape {accepted} for {kind}, of {rows} rows of length {length}; "
            f"got {y.shape}."
        )
    return y if integers else y.astype(np.float32)
