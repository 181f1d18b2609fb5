"""Rows of a task to a batch for a model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gramian.tasks import IGNORED, KINDS, Description, find_kind

__all__ = ["Collator", "Packer"]


class Collator:
    """Pads on the right under a mask, and hands over labels as they stand.

    A causal language model of transformers shifts `labels`; ours are due at their own position and
    go in as `shift_labels`, which are not moved.
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
    """Puts the sequences of a batch end to end, in place of padding: each is as if alone.

    A row is no longer than the task's longest sequence, or the batch's. `position_ids` restart at 0
    with every sequence, which is how the models tell them apart; what is left of a row is padding
    under `attention_mask`, where positions go on. Labels stand where they are due, so nothing is
    shifted across a border, and -100 at padding; labels of whole sequences come in the order in
    which the rows have the sequences.

    Args:
        description: of a task of a kind that is `packable`.

    Raises:
        ValueError: for a task of another kind.
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


def _pad(sequences: list[Tensor], value: int) -> Tensor:
    """(batch, longest, …)."""
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)
