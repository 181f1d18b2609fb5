"""Classification of every token of a sequence, or of every position of a signal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from gramian.mixers import Segments
from gramian.models.backbone import GramianModel
from gramian.models.cache import CACHE, GramianCache, check_past, one_cache
from gramian.models.configuration import GramianConfig
from gramian.models.labels import IGNORED, check_classes, cross_entropy
from gramian.models.pretrained import GramianPreTrainedModel
from gramian.models.segments import check_arguments, read_rows

__all__ = ["GramianForTokenClassification"]


class GramianForTokenClassification(GramianPreTrainedModel):
    """A `GramianModel` whose hidden states are mapped to logits of classes, position by position.

    It is causal unless the configuration is `bidirectional` or has batch norms. A causal model can
    stream: with a cache, a sequence may be given piece by piece. Padding has no effect, wherever it
    stands, and the sequences of packed rows do not affect each other.

    Raises:
        ValueError: if `config.problem_type` is neither None nor `"single_label_classification"`,
            the only problem that transformers knows for tokens.
    """

    accepts_loss_kwargs = False  # the loss is a mean over the batch, whatever the Trainer counts

    def __init__(self, config: GramianConfig) -> None:
        if config.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                "the problem_type of a token classifier must be 'single_label_classification'; got "
                f"{config.problem_type!r}. Numbers at positions are for GramianForSignalRegression."
            )
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = GramianModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: GramianCache | None = None,
        inputs_embeds: Tensor | None = None,
        input_values: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        position_ids: Tensor | None = None,
        cache: GramianCache | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Return the logits of every position, and their loss if `labels` are given.

        Args:
            labels: (batch, length) integers from 0 to `num_labels` - 1, at their own positions, and
                -100 where nothing is due. The loss is the mean cross-entropy, in at least single
                precision, over the labels at positions that are real by `attention_mask`.
            kwargs: those of `GramianModel.forward`; and `num_items_in_batch`, which divides the
                summed loss in place of the number of labels. If a trainer counted labels at padding
                in it, the count is corrected.

        The other arguments and the errors are those of `GramianModel.forward`.

        Returns:
            `loss`, `logits` (batch, length, num_labels), `past_key_values`, `hidden_states`.
            Outputs at padding are meaningless.

        Raises:
            ValueError: also on labels of another shape or dtype, out of range, or all ignored.
        """
        inputs = (input_ids, inputs_embeds, input_values)
        segments = read_rows(inputs, attention_mask, position_ids, kwargs)
        past = one_cache(past_key_values, cache)
        check_past(past, attention_mask, inputs)
        cache_position = kwargs.pop("cache_position", None)
        check_arguments(type(self).__name__, kwargs)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=segments,
            past_key_values=past,
            inputs_embeds=inputs_embeds,
            input_values=input_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cache_position=cache_position,
        )
        logits = self.score(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = _loss(logits, labels, segments, kwargs.get("num_items_in_batch"))
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: getattr(outputs, CACHE)},
        )


def _loss(
    logits: Tensor,
    labels: Tensor,
    segments: Segments | None,
    num_items_in_batch: Tensor | int | None,
) -> Tensor:
    """Return the cross-entropy over the labels (batch, length) that are due at real positions."""
    labels = labels.to(logits.device)
    real = None if segments is None else segments.real
    shapes = [tuple(logits.shape[:-1])]
    if real is None or tuple(labels.shape) != shapes[0]:
        labels = check_classes(labels, logits.shape[-1], shapes)
        return cross_entropy(logits, labels, num_items_in_batch)
    counted, padding = (labels != IGNORED).sum(), ~real.to(labels.device)
    labels = check_classes(labels.masked_fill(padding, 0), logits.shape[-1], shapes)
    labels = labels.masked_fill(padding, IGNORED)
    if num_items_in_batch is not None:
        scored = (labels != IGNORED).sum()
        share = torch.where(scored > 0, scored / counted.clamp_min(1), 1)
        num_items_in_batch = num_items_in_batch * share
    return cross_entropy(logits, labels, num_items_in_batch)
