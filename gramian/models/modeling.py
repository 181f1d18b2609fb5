"""Define the language model. It computes next-token logits and their loss, and generates text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from gramian.mixers import Segments
from gramian.models.backbone import GramianModel
from gramian.models.cache import CACHE, GramianCache, check_past, one_cache
from gramian.models.configuration import GramianConfig
from gramian.models.generation import GramianGenerationMixin
from gramian.models.labels import token_labels
from gramian.models.pretrained import GramianPreTrainedModel
from gramian.models.segments import (
    check_arguments,
    items_due,
    last_tokens,
    next_labels,
    read_rows,
    recent_mask,
)
from gramian.ops.packed import Linear

__all__ = ["GramianForCausalLM"]

_NOTHING_TO_CONTINUE = (
    "attention_mask must leave a real token in every row that is to be continued; it hides all of "
    "one."
)


class GramianForCausalLM(GramianPreTrainedModel, GramianGenerationMixin):
    """A `GramianModel` with an output projection, for next-token logits and for generation."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: GramianConfig) -> None:
        if config.bidirectional:
            raise ValueError(
                "a causal language model cannot look ahead: bidirectional must be off."
            )
        if config.input_size is not None:
            raise ValueError(
                "a causal language model reads tokens: input_size must be None; got "
                f"{config.input_size}."
            )
        if config.norm == "batch":
            raise ValueError(
                "a causal language model cannot have norm='batch', whose statistics look ahead."
            )
        super().__init__(config)
        self.model = GramianModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: GramianCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
        cache: GramianCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return next-token logits, and their loss if `labels` are given.

        Args:
            labels: (batch, length) token ids, or -100 for positions to ignore. The model shifts the
                labels, so pass `labels=input_ids`. A token predicts the next token of its own
                sequence. Nothing is predicted from padding or across the border of packed
                sequences, and labels at padding do not count. If a trainer has counted them in
                `num_items_in_batch`, the model corrects the count.
            logits_to_keep: which logits to compute: an integer, a 1-D tensor of positions, or a
                boolean mask of positions (batch, length). An integer is the number of last real
                tokens of each row, and 0 means all positions. If a row has no new token, its logits
                are those after the last token that the cache has seen. For a mask, the logits are
                (kept, vocab_size), row after row, and `shift_labels` must have the labels of the
                same positions.
            kwargs: the further arguments of `GramianModel.forward`, and the arguments
                `num_items_in_batch` and `shift_labels` of the loss function.

        The other arguments and the errors are those of `GramianModel.forward`.

        Raises:
            ValueError: if a mask of positions and `labels` are given without `shift_labels`; if
                labels have another shape or dtype, are outside of the vocabulary, or are all
                ignored; or if the last logits of a row without any token are requested. With a
                cache, these logits are NaN instead, because later chunks may continue the row.

        Returns:
            An output with `loss`, `logits` (batch, kept, vocab_size), `past_key_values` and
            `hidden_states`.
        """
        inputs = (input_ids, inputs_embeds)
        segments = read_rows(inputs, attention_mask, position_ids, kwargs)
        past = one_cache(past_key_values, cache)
        check_past(past, attention_mask, inputs)
        cache_position = kwargs.pop("cache_position", None)
        check_arguments(type(self).__name__, kwargs, "shift_labels")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=segments,
            past_key_values=past,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cache_position=cache_position,
        )
        hidden_states = outputs.last_hidden_state
        cache = getattr(outputs, CACHE)
        if isinstance(logits_to_keep, int):
            if logits_to_keep:
                hidden_states = _last_hidden(hidden_states, segments, logits_to_keep, cache)
        elif logits_to_keep.dtype == torch.bool:
            if labels is not None and "shift_labels" not in kwargs:
                raise ValueError(
                    "with a mask of positions for logits_to_keep, the loss needs shift_labels."
                )
            hidden_states = hidden_states[logits_to_keep]
        else:
            hidden_states = hidden_states[:, logits_to_keep]
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            shifted = kwargs.get("shift_labels")
            if segments is not None and shifted is None:
                shifted = next_labels(labels, segments)
                items = kwargs.get("num_items_in_batch")
                if items is not None:
                    kwargs["num_items_in_batch"] = items_due(items, labels, shifted)
            scored = token_labels(logits, labels, shifted, kwargs.get("num_items_in_batch"))
            loss = self.loss_function(
                logits=logits, vocab_size=self.config.vocab_size, **(kwargs | scored)
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: cache},
        )

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: GramianCache | None = None,
        *,
        chunk_size: int = 16_384,
        progress: Callable[[int, int], None] | None = None,
    ) -> CausalLMOutputWithPast:
        """Read a prompt of any length in chunks, so that the memory of one chunk is sufficient.

        Args:
            input_ids: (batch, length) token ids.
            attention_mask: (batch, length), 1 for a real token, 0 for padding.
            past_key_values: the cache of the tokens before these. It is updated in place.
            chunk_size: number of tokens that are read at once.
            progress: a function that is called as `progress(tokens read, all tokens)` before the
                first chunk and after every chunk.

        Returns:
            An output with `logits`, (batch, 1, vocab_size), of the token that follows each row's
            last real token, and `past_key_values`. To continue after the prompt, pass the cache to
            `generate` with the whole sequence and one more token. Or pass it with the new token
            alone and an `attention_mask` for the whole sequence.

        Raises:
            ValueError: in the same cases as `forward`; if `chunk_size` is below 1; or if a row has
                no token.
        """
        if not isinstance(chunk_size, int) or chunk_size < 1:
            raise ValueError(f"chunk_size must be an integer of at least 1; got {chunk_size!r}.")
        batch, length = input_ids.shape
        mask = recent_mask(attention_mask, batch, length)
        check_past(past_key_values, attention_mask, (input_ids,))
        if progress is not None:
            progress(0, length)
        some_column = torch.full((1,), -1, device=input_ids.device)
        outputs = None
        for begin in range(0, max(length, 1), chunk_size):
            part = slice(begin, begin + chunk_size)
            ends = begin + chunk_size >= length
            outputs = self(
                input_ids=input_ids[:, part],
                attention_mask=None if mask is None else mask[:, part],
                past_key_values=past_key_values,
                use_cache=True,
                logits_to_keep=1 if ends else some_column,
            )
            past_key_values = getattr(outputs, CACHE)
            if progress is not None:
                progress(min(begin + chunk_size, length), length)
        assert outputs is not None
        if past_key_values is not None and bool(past_key_values.unstarted().any()):
            raise ValueError(_NOTHING_TO_CONTINUE)
        return outputs

    def _prefill(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super()._prefill(*args, **kwargs)
        cache = getattr(outputs, CACHE)
        if cache is not None and bool(cache.unstarted().any()):
            raise ValueError(_NOTHING_TO_CONTINUE)
        return outputs

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing, because the model counts positions itself.

        The positions that transformers would make from a mask restart after padding.
        """

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: GramianCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        cache: GramianCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the inputs of the next forward pass.

        After the prompt, a pass with a cache reads one generated token and needs no mask.
        """
        cache = one_cache(past_key_values, cache)
        kwargs.pop("tokenizer", None)  # transformers needs it for `stop_strings`, and passes it on
        new = kwargs.get("next_sequence_length")
        if is_first_iteration and cache is not None and new is not None and new < 1:
            raise ValueError(
                f"the cache has seen {cache.get_seq_length()} tokens, and the input has "
                f"{input_ids.shape[1]}: give generate the whole sequence, or new tokens with an "
                "attention_mask as long as the whole."
            )
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE: cache},
            **kwargs,
        )
        tokens = inputs["input_ids"]
        written = tokens is not None and tokens.shape[1] == 1 and not is_first_iteration
        if cache is not None and written:
            inputs["attention_mask"] = None  # generated tokens are real; a check would stall a GPU
            inputs.pop("position_ids", None)
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise ValueError(
                "a Gramian model makes its own cache: leave cache_implementation out; got "
                f"{implementation!r}."
            )
        if getattr(generation_config, "is_assistant", False):
            raise ValueError("a Gramian model cannot assist another: its state cannot be cropped.")
        compile_config = generation_config.compile_config
        if compile_config is not None and not generation_config.disable_compile:
            options = {"backend": compile_config.backend, "mode": compile_config.mode}
            if compile_config.options:
                options = {"backend": compile_config.backend, "options": compile_config.options}
            self.compile_decoding(**options)
        given = one_cache(*(model_kwargs.pop(name, None) for name in ("past_key_values", "cache")))
        if given is not None:
            model_kwargs[CACHE] = given
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = GramianCache(self.config)


def _last_hidden(
    hidden_states: Tensor, segments: Segments | None, count: int, cache: GramianCache | None
) -> Tensor:
    """Return the hidden states of each row's last tokens, (batch, count, hidden_size)."""
    kept = last_tokens(hidden_states, segments, count)
    if segments is None or segments.packed or not segments.has_empty_rows:
        return kept
    if cache is None:
        raise ValueError(_NOTHING_TO_CONTINUE)
    assert cache.last_hidden_state is not None
    return torch.cat([kept[:, :-1], cache.last_hidden_state.unsqueeze(1)], dim=1)
