"""Define the model that maps a signal or tokens to a signal of the same length.

At every position, the hidden state is mapped to `num_labels` real numbers. The loss is the mean
squared error. The model suits the Delay task, filtering, denoising and one-step forecasts.
"""

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
from gramian.models.labels import LabelError, check_numbers, squared_error
from gramian.models.pretrained import GramianPreTrainedModel
from gramian.models.segments import check_arguments, read_rows

__all__ = ["GramianForSignalRegression"]


class GramianForSignalRegression(GramianPreTrainedModel):
    """A `GramianModel` whose hidden states are mapped to real numbers, position by position.

    The model is causal unless the configuration is `bidirectional` or has batch norms. With a
    cache, a causal model can read a signal piece by piece. With `block="mixer"`, the model is
    linear.
    """

    accepts_loss_kwargs = False  # tells the Trainer that the loss is a mean over the batch

    def __init__(self, config: GramianConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = GramianModel(config)
        self.head = nn.Linear(config.hidden_size, config.num_labels)
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
        """Return the numbers at every position, and their loss if `labels` are given.

        Args:
            labels: (batch, length, num_labels), real numbers, or -100 for numbers that are not
                scored. The loss is the mean squared error, in at least single precision, over the
                scored numbers at positions that `attention_mask` does not hide.
            kwargs: the further arguments of `GramianModel.forward`, and `num_items_in_batch`. If
                the latter is given, it divides the summed loss in place of the number of labels.

        The other arguments and the errors are those of `GramianModel.forward`.

        Returns:
            An output with `loss`, `logits`, `past_key_values` and `hidden_states`. The numbers are
            in `logits`, (batch, length, num_labels), as transformers names the output of a
            regression.

        Raises:
            ValueError: if labels have another shape or are not finite, or if no label is scored.
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
        logits = self.head(outputs.last_hidden_state)
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
    """Return the mean squared error over the scored labels (batch, length, num_labels)."""
    real = None if segments is None else segments.real
    if real is not None:
        if not torch.compiler.is_compiling() and not real.any():
            raise LabelError("attention_mask must leave a real position; it hides all.")
        real = real.unsqueeze(-1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    labels, due = check_numbers(labels.to(logits.device), wide, [tuple(logits.shape)], real=real)
    return squared_error(logits, labels, due, num_items_in_batch)
