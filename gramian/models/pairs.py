"""Define the model that classifies pairs of sequences: for example, whether one cites the other.

Both sequences of a pair pass through one model, in one batch, and their hidden states are pooled to
the vectors x and y. The head reads `[x, y, x - y, x ∘ y]` through one hidden layer. S4 uses this
head for Retrieval in the Long Range Arena, after Nyströmformer (arXiv 2102.03902).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import can_return_tuple

from gramian.mixers import Segments
from gramian.models.backbone import GramianModel
from gramian.models.configuration import GramianConfig
from gramian.models.labels import classification_loss
from gramian.models.pooling import pool
from gramian.models.pretrained import GramianPreTrainedModel
from gramian.models.segments import check_arguments, read_rows

__all__ = ["GramianForPairClassification"]


class GramianForPairClassification(GramianPreTrainedModel):
    """A `GramianModel` that reads pairs of sequences, with a head that compares the two.

    As in `GramianForSequenceClassification`, padding has no effect at any position.
    """

    accepts_loss_kwargs = False  # tells the Trainer that the loss is a mean over the batch

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
        position_ids: Tensor | None = None,
        position_ids_2: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Return the logits of a batch of pairs, and their loss if `labels` are given.

        Args:
            input_ids: (batch, length) token ids of the first sequences.
            attention_mask: (batch, length), 1 for a real token, 0 for padding.
            input_ids_2: (batch, length_2) token ids of the second sequences. `length_2` may differ
                from `length`.
            attention_mask_2: (batch, length_2), the mask of the second sequences.
            input_values: (batch, length, `config.input_size`), in place of `input_ids`.
            input_values_2: (batch, length_2, `config.input_size`), in place of `input_ids_2`.
            labels: the targets, as for `GramianForSequenceClassification`, with one row for each
                pair.
            position_ids: (batch, length), positions that restart where the next sequence of a
                packed row begins. The n-th of all first sequences forms a pair with the n-th of all
                second sequences.
            position_ids_2: (batch, length_2), the positions of the second sequences.
            kwargs: the arguments of `GramianModel.forward` that describe packed rows, with the
                suffix `_2` for the second sequences; and `num_items_in_batch`. If the latter is
                given, it divides the summed loss in place of the number of labels.

        Returns:
            An output with `loss` and `logits` (pairs, num_labels).

        Raises:
            ValueError: in the same cases as `GramianModel.forward`; if the second sequences are
                missing; if the numbers of first and second sequences differ; if a mask or the
                labels have another shape; or if a mask hides a whole sequence.
        """
        name = "input_ids" if self.config.input_size is None else "input_values"
        first, second = (
            (input_ids, input_ids_2) if name == "input_ids" else (input_values, input_values_2)
        )
        if first is None or second is None:
            raise ValueError(f"give {name} and {name}_2, the two sequences of each pair.")
        for one, mask in ((first, attention_mask), (second, attention_mask_2)):
            if mask is not None and tuple(mask.shape) != tuple(one.shape[:2]):
                raise ValueError(
                    f"an attention mask must be {tuple(one.shape[:2])} here; got "
                    f"{tuple(mask.shape)}."
                )
        rows = read_rows((first,), attention_mask, position_ids, kwargs)
        rows_2 = read_rows((second,), attention_mask_2, position_ids_2, kwargs, "_2")
        check_arguments(type(self).__name__, kwargs)
        sequences, sequences_2 = _count(first, rows), _count(second, rows_2)
        if sequences != sequences_2:
            raise ValueError(
                f"{name} and {name}_2 must hold as many sequences; got {sequences} and "
                f"{sequences_2}."
            )
        segments = _joined_segments(first, second, rows, rows_2)
        outputs = self.model(
            **{name: _joined(first, second)}, attention_mask=segments, use_cache=False
        )
        x, y = pool(outputs.last_hidden_state, segments, self.config.pooling).chunk(2)
        logits = self.head(torch.cat([x, y, x - y, x * y], dim=-1))
        loss = None
        if labels is not None:
            items = kwargs.get("num_items_in_batch")
            loss = classification_loss(logits, labels, self.config, items)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _count(rows: Tensor, segments: Segments | None) -> int:
    """Return the number of sequences in a batch of rows."""
    if segments is None or not segments.packed:
        return len(rows)
    return len(segments.sequences()[1])


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """Join two batches into one, with zeros on the right of the shorter rows."""
    length = max(first.shape[1], second.shape[1])
    padded = []
    for one in (first, second):
        shape = (len(one), length - one.shape[1], *one.shape[2:])
        padded.append(torch.cat([one, one.new_zeros(shape)], dim=1))
    return torch.cat(padded)


def _joined_segments(
    first: Tensor, second: Tensor, rows: Segments | None, rows_2: Segments | None
) -> Segments | None:
    """Return the segments of the joined batch, or None if it has no padding and is not packed."""
    both = ((first, rows), (second, rows_2))
    if rows is None and rows_2 is None and first.shape[1] == second.shape[1]:
        return None
    real, numbers = [], []
    for one, segments in both:
        shape = tuple(one.shape[:2])
        ones = torch.ones(shape, dtype=torch.bool, device=one.device)
        zeros = torch.zeros(shape, dtype=torch.int64, device=one.device)
        real.append(ones if segments is None or segments.real is None else segments.real)
        numbers.append(zeros if segments is None or segments.numbers is None else segments.numbers)
    packed = any(segments is not None and segments.packed for _, segments in both)
    return Segments(_joined(*real), _joined(*numbers) if packed else None)
