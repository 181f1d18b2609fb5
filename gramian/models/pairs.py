"""Classification of two sequences: does one paper cite the other, does a sentence follow.

Both go through one model, as one batch, and are pooled; the head reads `[x, y, x - y, x ∘ y]`
through one hidden layer, as S4 has it for the Long Range Arena's Retrieval (after Nyströmformer,
arXiv 2102.03902).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import can_return_tuple

from gramian.models.configuration import GramianConfig
from gramian.models.labels import classification_loss
from gramian.models.modeling import GramianModel, GramianPreTrainedModel
from gramian.models.pooling import pool

__all__ = ["GramianForPairClassification"]


class GramianForPairClassification(GramianPreTrainedModel):
    """A `GramianModel` that two sequences go through, and a head that compares them.

    As in `GramianForSequenceClassification`, padding anywhere leaves no trace.
    """

    accepts_loss_kwargs = False  # the loss is a mean over the batch, whatever the Trainer counts

    def __init__(self, config: GramianConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = GramianModel(config)
        width = config.hidden_size
        self.head = nn.Sequential(
            nn.Linear(4 * width, width), nn.GELU(), nn.Linear(width, config.num_labels)
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_ids_2: Tensor | None = None,
        attention_mask_2: Tensor | None = None,
        input_values: Tensor | None = None,
        input_values_2: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits of a batch of pairs, and their loss when `labels` are given.

        Args:
            input_ids: (batch, length) token ids of the first sequences.
            attention_mask: (batch, length), 1 for a real token, 0 for padding.
            input_ids_2: (batch, another length) of the second sequences.
            attention_mask_2: theirs.
            input_values: (batch, length, `config.input_size`), in place of `input_ids`.
            input_values_2: likewise.
            labels: as for `GramianForSequenceClassification`, one row for each pair.
            kwargs: `num_items_in_batch` divides the summed loss in place of their count; others are
                ignored.

        Returns:
            `loss`, `logits` (batch, num_labels).

        Raises:
            ValueError: on a missing second sequence, batches of two sizes, masks or labels of
                another shape, a mask that hides a whole sequence, and as `GramianModel.forward`
                does.
        """
        name = "input_ids" if self.config.input_size is None else "input_values"
        first, second = (
            (input_ids, input_ids_2) if name == "input_ids" else (input_values, input_values_2)
        )
        if first is None or second is None:
            raise ValueError(f"give {name} and {name}_2, the two sequences of each pair.")
        if len(first) != len(second):
            raise ValueError(
                f"{name} and {name}_2 must hold as many sequences; got {len(first)} and "
                f"{len(second)}."
            )
        both = _joined(first, second)
        mask = None
        if (
            attention_mask is not None
            or attention_mask_2 is not None
            or first.shape[1] != second.shape[1]
        ):
            mask = _joined(_real(first, attention_mask), _real(second, attention_mask_2))
        outputs = self.model(**{name: both}, attention_mask=mask, use_cache=False)
        x, y = pool(outputs.last_hidden_state, mask, self.config.pooling).chunk(2)
        logits = self.head(torch.cat([x, y, x - y, x * y], dim=-1))
        loss = None
        if labels is not None:
            items = kwargs.get("num_items_in_batch")
            loss = classification_loss(logits, labels, self.config, items)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """One batch, the shorter sequences padded on the right with zeros."""
    length = max(first.shape[1], second.shape[1])
    padded = []
    for one in (first, second):
        shape = (len(one), length - one.shape[1], *one.shape[2:])
        padded.append(torch.cat([one, one.new_zeros(shape)], dim=1))
    return torch.cat(padded)


def _real(sequences: Tensor, mask: Tensor | None) -> Tensor:
    """The mask of (batch, length, …), all of it where there is none."""
    shape = tuple(sequences.shape[:2])
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=sequences.device)
    if tuple(mask.shape) != shape:
        raise ValueError(f"an attention mask must be {shape} here; got {tuple(mask.shape)}.")
    return mask.bool()
