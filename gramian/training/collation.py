"""Rows of a task to a batch for a model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gramian.models.labels import check_classes, check_numbers
from gramian.tasks import IGNORED, Description

__all__ = ["PACKED", "Collator", "Packer", "check_labels"]

PACKED = ("tokens", "classification", "signal")
"""Kinds of tasks whose sequences can stand in one row."""


def check_labels(labels: Tensor, description: Description, shape: tuple[int, ...]) -> None:
    """Check the labels of a batch.

    Args:
        labels: of the batch.
        description: of the task.
        shape: of the logits: (batch, classes), (batch, length, classes), or of a signal (batch,
            length, numbers).

    Raises:
        LabelError: on another dtype or shape, classes that there are not, or numbers that are not
            finite.
    """
    if description.kind == "signal":
        check_numbers(labels, torch.float32, [shape])
    else:
        check_classes(labels, shape[-1], [shape[:-1]])


class Collator:
    """Pads on the right under a mask, and hands over labels as they stand.

    A causal language model of transformers shifts `labels`; ours are due at their own position and
    go in as `shift_labels`, which are not moved.
    """

    def __init__(self, description: Description) -> None:
        self.description = description

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        if self.description.input_size is None:
            for suffix in ("", "_2") if self.description.kind == "pairs" else ("",):
                ids = [torch.as_tensor(row[f"input_ids{suffix}"]).long() for row in rows]
                batch[f"input_ids{suffix}"] = _pad(ids, self.description.pad_token_id)
                if len({len(one) for one in ids}) > 1:
                    real = [torch.ones_like(one) for one in ids]
                    batch[f"attention_mask{suffix}"] = _pad(real, 0)
        else:
            values = [torch.as_tensor(row["input_values"]) for row in rows]
            batch["input_values"] = torch.stack(values).float()
        labels = [_label(row, self.description) for row in rows]
        if self.description.kind == "tokens":
            batch["labels"] = batch["shift_labels"] = _pad(labels, IGNORED)
        elif self.description.kind == "reconstruction":
            batch["labels"] = _pad(labels, IGNORED)
        else:
            batch["labels"] = torch.stack(labels)
        return batch


class Packer:
    """Puts the sequences of a batch end to end, in place of padding: each is as if alone.

    A row is no longer than the task's longest sequence, or the batch's. `position_ids` restart at 0
    with every sequence, which is how the models tell them apart; what is left of a row is padding
    under `attention_mask`, where positions go on. Labels stand where they are due, so nothing is
    shifted across a border, and -100 at padding; of classification there is one a sequence, in the
    order in which the rows have them.

    Args:
        description: of a task of a kind in `PACKED`.

    Raises:
        ValueError: for a task of another kind.
    """

    def __init__(self, description: Description) -> None:
        if description.kind not in PACKED:
            raise ValueError(
                f"sequences of a task of the kind {description.kind!r} cannot share a row; those "
                f"of {', '.join(map(repr, PACKED))} can."
            )
        self.description = description

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        name = "input_ids" if self.description.input_size is None else "input_values"
        inputs = [torch.as_tensor(row[name]) for row in rows]
        if name == "input_ids":
            inputs = [one.long() for one in inputs]
        labels = [_label(row, self.description) for row in rows]
        plan = fit([len(one) for one in inputs], self.description.length)
        packed = [torch.cat([inputs[index] for index in row]) for row in plan]
        lengths = torch.tensor([len(row) for row in packed])
        longest = int(lengths.max())
        batch: dict[str, Tensor] = {}
        if name == "input_ids":
            batch[name] = _pad(packed, self.description.pad_token_id)
        else:
            batch[name] = torch.nn.utils.rnn.pad_sequence(packed, batch_first=True).float()
        positions = torch.arange(longest).repeat(len(plan), 1)
        for row, sequences in zip(positions, plan, strict=True):
            start = 0
            for index in sequences:
                row[start:] = torch.arange(longest - start)
                start += len(inputs[index])
        batch["position_ids"] = positions
        if int(lengths.min()) < longest:
            batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        if self.description.kind == "classification":
            batch["labels"] = torch.stack([labels[index] for row in plan for index in row])
            return batch
        due = [torch.cat([labels[index] for index in row]) for row in plan]
        batch["labels"] = _pad(due, IGNORED)
        if self.description.kind == "tokens":
            batch["shift_labels"] = batch["labels"]
        return batch


def fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of `lengths` in rows of at most `room`, or of one that is longer by itself.

    The longest first, each into the first row with room for it: at most 11/9 of the fewest rows
    there could be, and one more.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        length = lengths[index]
        place = next((row for row, free in enumerate(left) if free >= length), len(rows))
        if place == len(rows):
            rows.append([])
            left.append(max(room, length))
        rows[place].append(index)
        left[place] -= length
    return rows


def _label(row: dict[str, Any], description: Description) -> Tensor:
    """Labels of one row: of a signal in single precision, integers as int64, others as they are,
    so that whoever scores them may refuse them."""
    labels = torch.as_tensor(row["labels"])
    if description.kind == "signal":
        return labels if labels.is_complex() else labels.float()
    return labels if labels.is_floating_point() or labels.is_complex() else labels.long()


def _pad(sequences: list[Tensor], value: int) -> Tensor:
    """(batch, longest, …)."""
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)
