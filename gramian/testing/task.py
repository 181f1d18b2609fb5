"""Test tasks: rows of every split and seed, and the layout of inputs and labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from gramian.tasks import KINDS, Description, GeneratedTask, Task
from gramian.testing.comparison import require

__all__ = ["check_task"]

_Row = dict[str, Any]


def check_task(
    task: Task, *, splits: Sequence[str] | None = None, rows: int = 4, seed: int = 0
) -> None:
    """Check the first rows of every split of a task.

    - Reading a split again with the same seed gives the same rows. The rows of a `GeneratedTask`
      differ between splits and between seeds.
    - Inputs and labels have the names, shapes and types that the description implies. Token ids and
      classes are in range, no row is longer than `length`, and every row has a label to score.
    - The dataset holds the same numbers as the rows.
    - The task accepts its published settings.

    Args:
        task: the task, with its settings.
        splits: names of the splits to check; by default all splits of the task.
        rows: number of rows to read from each split.
        seed: seed of the rows.

    Raises:
        AssertionError: if a property fails. The message names the property.
        TypeError: if `task` is not a `Task`.
    """
    if not isinstance(task, Task):
        raise TypeError(f"check_task takes a Task; got {type(task).__name__}.")
    name = f"the task {type(task).__name__}"
    description = task.description()
    require(
        description.kind in KINDS,
        f"{name}: its kind {description.kind!r} must be a registered one.",
    )
    require(description.length >= 1, f"{name}: length must be at least 1.")
    seen: dict[str, list[_Row]] = {}
    for split in task.splits if splits is None else splits:
        found = seen[split] = _read(task, name, split, seed, rows)
        for number, row in enumerate(found):
            _check_row(description, f"{name}, row {number} of {split}", row)
        require(
            _same_rows(found, _read(task, name, split, seed, rows)),
            f"{name}: rows of {split} must be the same when they are read again.",
        )
        if isinstance(task, GeneratedTask):
            require(
                not _same_rows(found, _read(task, name, split, seed + 1, rows)),
                f"{name}: rows of {split} must be others with another seed.",
            )
        _check_dataset(task, name, split, seed, found)
    if isinstance(task, GeneratedTask):
        for one, other in zip(seen, [*seen][1:], strict=False):
            require(
                not _same_rows(seen[one], seen[other]),
                f"{name}: the splits {one} and {other} must have different rows.",
            )
    needed = {
        field.name: getattr(task, field.name)
        for field in dataclasses.fields(task)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    for setting, changes in task.published.items():
        try:
            length = type(task)(**{**needed, **changes}).description().length
        except (TypeError, ValueError) as error:
            sentence = f"{name}: the published setting {setting!r} must be accepted: {error}"
            raise AssertionError(sentence) from error
        require(length >= 1, f"{name}: the published setting {setting!r} must have a length.")


def _read(task: Task, name: str, split: str, seed: int, rows: int) -> list[_Row]:
    try:
        found = list(islice(task.checked_rows(split, seed), rows))
    except ValueError as error:
        raise AssertionError(f"{name}: {error}") from error
    require(bool(found), f"{name}: the split {split} must have rows.")
    return found


def _same_rows(some: Sequence[_Row], others: Sequence[_Row]) -> bool:
    return len(some) == len(others) and all(
        one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
        for one, other in zip(some, others, strict=True)
    )


def _check_row(description: Description, where: str, row: _Row) -> None:
    kind = KINDS[description.kind]
    inputs = kind.input_names(description)
    length = max(len(row[key]) for key in inputs)
    require(
        1 <= length <= description.length,
        f"{where}: it has {length} positions; the description says 1 to {description.length}.",
    )
    sizes = SimpleNamespace(
        vocab_size=description.vocab_size, num_labels=description.num_labels or 2
    )
    shape = kind.logits_shape(1, length, sizes)
    labels = kind.label_tensor(np.asarray(row["labels"])).unsqueeze(0)
    try:
        kind.check_labels(labels, shape)
    except ValueError as error:
        raise AssertionError(f"{where}: {error}") from error
    scores = kind.score(torch.zeros(shape), labels)
    due = kind.summarize(scores.numpy(), description)[0].defined
    require(due, f"{where}: no answer is due.")


def _check_dataset(task: Task, name: str, split: str, seed: int, rows: Sequence[_Row]) -> None:
    stream = islice(task.dataset(split, seed, streaming=True), len(rows))
    for number, (row, stored) in enumerate(zip(rows, stream, strict=True)):
        for key, value in stored.items():
            due = torch.as_tensor(np.asarray(row[key])).to(value.dtype)
            require(
                torch.equal(value, due),
                f"{name}: the dataset must hold {key} of row {number} of {split} as it was made.",
            )
