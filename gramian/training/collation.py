"""Collate rows of a task into a batch for a transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gramian.tasks import IGNORED, KINDS, Description, find_kind

__all__ = ["Collator", "Packer"]


class Collator:
    """A collator that pads on the right under a mask, and does not shift labels.

    A causal language model of transformers shifts `labels` by one position. Labels of tasks already
    belong to their positions, so they are passed as `shift_labels`, which are not shifted.
    """

    def __init__(self, description: Description) -> None:
        self.description = description
        self.kind = find_kind(description.kind)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        for name in self.kind.input_names(self.description):
            inputs = [torch.as_tensor(row[name]) for row in rows]
            if not name.startswith("input_ids"):
                batch[name] = torch.stack(inputs).float()
                continue
            batch[name] = _pad([one.long() for one in inputs], self.description.pad_token_id)
            if len({len(one) for one in inputs}) > 1:
                real = [torch.ones(len(one), dtype=torch.int64) for one in inputs]
                batch[name.replace("input_ids", "attention_mask")] = _pad(real, 0)
        labels = [self.kind.label_tensor(row["labels"]) for row in rows]
        ragged = self.kind.label_column(self.description).shape[:1] == (None,)
        together = _pad(labels, IGNORED) if ragged else torch.stack(labels)
        return batch | self.kind.batch_labels(together)


class Packer:
    """A collator that packs sequences end to end instead of padding each of them.

    The models process each packed sequence as if it were alone. A row is at most as long as the
    longest sequence of the task, or of the batch if that is longer. `position_ids` restart at 0
    with every sequence, which shows the models where sequences begin. The rest of a row is padding,
    which `attention_mask` marks. In the padding, `position_ids` continue. No label is shifted, so
    none moves from one sequence into another, and padding has the label -100. Labels of whole
    sequences are in the order of the sequences in the rows.

    Args:
        description: description of a task whose kind is `packable`.

    Raises:
        ValueError: if the kind of the task is not `packable`.
    """

    def __init__(self, description: Description) -> None:
        self.description = description
        self.kind = find_kind(description.kind)
        if not self.kind.packable:
            packable = [repr(name) for name, kind in KINDS.items() if kind.packable]
            raise ValueError(
                f"sequences of a task of the kind {description.kind!r} cannot share a row; those "
                f"of {', '.join(packable)} can."
            )

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        (name,) = self.kind.input_names(self.description)
        inputs = [torch.as_tensor(row[name]) for row in rows]
        if name == "input_ids":
            inputs = [one.long() for one in inputs]
        labels = [self.kind.label_tensor(row["labels"]) for row in rows]
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
        if self.kind.label_column(self.description).shape[:1] != (None,):
            together = torch.stack([labels[index] for row in plan for index in row])
        else:
            together = _pad([torch.cat([labels[index] for index in row]) for row in plan], IGNORED)
        return batch | self.kind.batch_labels(together)


def fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Return indices of `lengths`, grouped into rows of total length at most `room`.

    A sequence longer than `room` has its own row. The algorithm is first-fit decreasing: the
    longest sequences come first, and each goes into the first row with room for it. The number of
    rows is at most 11/9 of the smallest possible number, plus one.
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


def _pad(sequences: list[Tensor], value: int) -> Tensor:
    """Stack sequences to (batch, longest, …), padded with `value`."""
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)
