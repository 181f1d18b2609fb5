"""Read one row of a task's split, for measurements on a single sequence."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gramian.tasks import choose_split

if TYPE_CHECKING:
    from gramian.tasks import Task

__all__ = ["TaskRow", "read_row"]


@dataclass(frozen=True, eq=False)
class TaskRow:
    """A row of a task's split.

    Attributes:
        inputs: token ids (length,) or numbers (length, size).
        tokenizer: tokenizer that made the token ids, or None.
        place: text that identifies the row by task, split, index and seed.
    """

    inputs: Tensor
    tokenizer: Any
    place: str


def read_row(
    task: Task, name: str, tokenizer: Any, split: str | None, seed: int, index: int
) -> TaskRow:
    """Read one row of a task, and encode text with a model's tokenizer.

    Args:
        task: a task from `gramian.tasks.build`.
        name: name of the task.
        tokenizer: the model's own tokenizer, or None.
        split: split of the task; by default test, or validation if the task has no test split.
        seed: seed of the generated rows.
        index: index of the row, from 0.

    Raises:
        ValueError: if the split is unknown, or if it has no row of this index.
    """
    if tokenizer is not None:
        task = task.tokens_of(tokenizer)
    split = choose_split(task, name, split)
    found = next(itertools.islice(task.rows(split, seed), index, None), None)
    if found is None:
        raise ValueError(f"the {split} split of {name} has no row {index}.")
    place = f"{name}, {split} split, row {index}, seed {seed}"
    if "input_ids" in found:
        return TaskRow(torch.as_tensor(found["input_ids"]).long(), task.own_tokenizer(), place)
    return TaskRow(torch.as_tensor(found["input_values"]).float(), None, place)
