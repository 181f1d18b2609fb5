"""Rows of a task to a batch for a model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gramian.models.labels import check_classes, check_numbers
from gramian.tasks import IGNORED, Description

__all__ = ["Collator", "check_labels"]


def check_labels(labels: Tensor, description: Description, classes: int) -> None:
    """Check the labels of a batch for a model of so many classes, or of numbers for a signal.

    Raises:
        LabelError: on another dtype, classes that there are not, or numbers that are not finite.
    """
    shapes = [tuple(labels.shape)]
    if description.kind == "signal":
        check_numbers(labels, torch.float32, shapes)
    else:
        check_classes(labels, classes, shapes)


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
                ids = [torch.as_tensor(row[f"input_ids{suffix}"]) for row in rows]
                batch[f"input_ids{suffix}"] = _pad(ids, self.description.pad_token_id)
                if len({len(one) for one in ids}) > 1:
                    real = [torch.ones_like(one) for one in ids]
                    batch[f"attention_mask{suffix}"] = _pad(real, 0)
        else:
            values = [torch.as_tensor(row["input_values"]) for row in rows]
            batch["input_values"] = torch.stack(values).float()
        labels = [torch.as_tensor(row["labels"]) for row in rows]
        if self.description.kind == "tokens":
            batch["labels"] = batch["shift_labels"] = _pad(labels, IGNORED)
        elif self.description.kind == "reconstruction":
            batch["labels"] = _pad(labels, IGNORED)
        else:
            batch["labels"] = torch.stack(labels)
        return batch


def _pad(sequences: list[Tensor], value: int) -> Tensor:
    """(batch, longest) of int64, but for numbers, which a label must not be and is not cut to."""
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)
    return padded if padded.is_floating_point() else padded.long()
