"""Regression at every position: a signal, or tokens, to a signal of the same length.

What the Delay task asks for, and with it filtering, denoising and one-step forecasts: the hidden
states, mapped to `num_labels` real numbers, against the mean squared error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from gramian.mixers import Segments
from gramian.models.cache import CACHE, GramianCache, one_cache
from gramian.models.configuration import GramianConfig
from gramian.models.modeling import GramianModel, GramianPreTrainedModel
from gramian.models.segments import check_arguments, read_rows

__all__ = ["GramianForSignalRegression"]


class GramianForSignalRegression(GramianPreTrainedModel):
    """A `GramianModel` whose hidden states are mapped to real numbers, position by position.

    It is causal unless the configuration is `bidirectional` or has batch norms, and then streams:
    with a cache a signal may be given piece by piece. With `block="mixer"` it is linear.
    """

    accepts_loss_kwargs = False  # the loss is a mean over the batch, whatever the Trainer counts

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
        """The numbers at every position, and their loss when `labels` are given.

        Args:
            labels: (batch, length, num_labels) of real numbers. The loss is the mean squared error
                over the positions that `attention_mask` calls real, in at least single precision.

        The other arguments and the errors are those of `GramianModel.forward`.

        Returns:
            `loss`, `logits` (batch, length, num_labels; transformers calls what a regression gives
            so), `past_key_values`, `hidden_states`.

        Raises:
            ValueError: also on labels of another shape, or with a mask that hides everything.
        """
        inputs = (input_ids, inputs_embeds, input_values)
        segments = read_rows(inputs, attention_mask, position_ids, kwargs)
        cache_position = kwargs.pop("cache_position", None)
        check_arguments(type(self).__name__, kwargs)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=segments,
            past_key_values=one_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            input_values=input_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cache_position=cache_position,
        )
        logits = self.head(outputs.last_hidden_state)
        loss = None if labels is None else _squared_error(logits, labels, segments)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: getattr(outputs, CACHE)},
        )


def _squared_error(logits: Tensor, labels: Tensor, segments: Segments | None) -> Tensor:
    """The mean over real positions of (batch, length, num_labels)."""
    if labels.shape != logits.shape:
        raise ValueError(f"labels must be {tuple(logits.shape)}; got {tuple(labels.shape)}.")
    wide = torch.promote_types(logits.dtype, torch.float32)
    error = logits.to(wide) - labels.to(wide)
    real = None if segments is None else segments.real
    if real is None:
        return error.square().mean()
    if not torch.compiler.is_compiling() and not real.any():
        raise ValueError("attention_mask must leave a real position; it hides all.")
    error = torch.where(real.unsqueeze(-1), error, 0)  # a padded label may be NaN
    return error.square().sum() / (real.sum() * logits.shape[-1])
