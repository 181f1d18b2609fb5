"""Define the model that classifies every token of a sequence, or every position of a signal."""

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

    The model is causal unless the configuration is `bidirectional` or has batch norms. With a
    cache, a causal model can read a sequence piece by piece. Padding has no effect at any position,
    and the sequences of packed rows do not affect each other.

    Raises:
        ValueError: if `config.problem_type` is neither None nor `"single_label_classification"`.
            transformers supports no other kind of problem for tokens.
    """

    accepts_loss_kwargs = False  # tells the Trainer that the loss is a mean over the batch

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
            labels: (batch, length) integers from 0 to `num_labels` - 1, at the positions of their
                tokens, or -100 for positions that are not scored. The loss is the mean
                cross-entropy, in at least single precision, over the scored labels at positions
                that `attention_mask` does not hide.
            kwargs: the further arguments of `GramianModel.forward`, and `num_items_in_batch`. If
                the latter is given, it divides the summed loss in place of the number of labels. If
                a trainer has counted labels at padding in it, the model corrects the count.

        The other arguments and the errors are those of `GramianModel.forward`.

        Returns:
            An output with `loss`, `logits` (batch, length, num_labels), `past_key_values` and
            `hidden_states`. Outputs at padding are meaningless.

        Raises:
            ValueError: if labels have another shape or dtype, are out of range, or are all ignored.
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
    """Return the cross-entropy over the scored labels (batch, length) at real positions."""
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
