"""Gramian models for Hugging Face: an embedding, blocks around mixers, and a last norm.

What surrounds a mixer is in `gramian.models.blocks`. Order in time enters through the mixers alone,
so there is no positional embedding. Every layer has the mixer that the configuration names for it.

Training and scoring convolve. With a cache the mixers' recurrences run: a prompt is prefilled, then
each token costs one step, and what is remembered has a size of its own (`state_bytes`) whatever the
length written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutput,
)
from transformers.utils import can_return_tuple
from typing_extensions import Self

from gramian.filters import Filter
from gramian.mixers import Mixer, Segments, ShortConvolution
from gramian.mixers.linear_recurrence import Dynamics
from gramian.mixers.mixer import apply_mask
from gramian.models.blocks import GramianMLP
from gramian.models.cache import CACHE, GramianCache, check_past, one_cache
from gramian.models.configuration import GramianConfig
from gramian.models.generation import GramianGenerationMixin
from gramian.models.initialization import Keeping, is_read, reset_unwritten
from gramian.models.labels import classification_loss, token_labels
from gramian.models.layers import BLOCKS
from gramian.models.norms import apply_norm, make_norm
from gramian.models.pooling import pool
from gramian.models.segments import (
    check_arguments,
    items_due,
    last_tokens,
    next_labels,
    read_rows,
    recent_mask,
)
from gramian.ops.packed import Linear, Packing, can_pack


@contextmanager
def _whole(module: nn.Module) -> Iterator[None]:
    """Gathers the parameters of a module that FSDP2 has sharded, outside of its forward."""
    sharded: list[Any] = [part for part in module.modules() if hasattr(part, "unshard")]
    for part in sharded:
        part.unshard()
    try:
        yield
    finally:
        for part in sharded:
            part.reshard()


class GramianPreTrainedModel(PreTrainedModel):
    """Initialisation, saving, loading and the size of the generation state."""

    config: GramianConfig
    config_class = GramianConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # A list, here and below, is transformers' own convention.
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _is_stateful = True
    _supports_context_parallel = False
    # Filters and dynamics keep themselves in float32: the first list tells quantizers to keep out
    # of them too, the second one loading in bfloat16. The same name in both is refused.
    _keep_in_fp32_modules = [r".*\.mixer\.(?:filter|dynamics)"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = [r"mixer\.(?:filter|dynamics)"]  # noqa: RUF012
    _packing: Packing | None = None  # set by compile_decoding

    def __init__(self, config: GramianConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._no_split_modules = [BLOCKS[config.block].__name__]
        if config.input_size is not None:
            self.main_input_name = "input_values"
            self._input_embed_layer = "input_proj"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._packing is not None and not torch.compiler.is_compiling():
            for given in (*args, *kwargs.values()):
                if isinstance(given, GramianCache):
                    with self._packing.generation(given, begins=given.batch_size < 0):
                        return super().__call__(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Training mode, or evaluation mode; training drops the packed copies of the weights."""
        if mode and self._packing is not None:
            self._packing.clear()
        return super().train(mode)

    def state_bytes(self, batch: int = 1, context: int = 1) -> int:
        """Bytes that `batch` sequences keep between two tokens after `context` tokens.

        The sum over layers of the bytes of the state of the mixer's recurrence, asked of the
        recurrence itself and equal to `GramianCache.nbytes`; nothing is run. No convolution's state
        grows with the context: a modal filter's has one complex number per mode and stream, an FIR
        filter's its last inputs, bounded by `max_position_embeddings` from the first token on.
        Attention's keys and values grow up to its window, their room doubling each time. The
        snapshot of the filters is not counted: it belongs to the model and is shared by the batch.
        Where FSDP2 has sharded the model, all its processes call this together.

        Raises:
            ValueError: if `batch` or `context` is below 1, or the model is bidirectional, which
                keeps no state.
        """
        if batch < 1 or context < 1:
            raise ValueError(
                f"state_bytes takes a batch and a context of at least 1; got {batch} and {context}."
            )
        total = 0
        for block in self.base_model.layers:
            with torch.no_grad(), _whole(block):
                recurrence = block.mixer.recurrence()
                total += recurrence.state_bytes(batch, dtype=self.dtype, context=context)
        return total

    def compile_decoding(self, enabled: bool = True, **options: Any) -> None:
        """Make steps of one token fast: what `generate` does after the prompt.

        What a layer does between its projections is compiled, at the first step of each batch size,
        and on a CPU, where a cache is given, the projections multiply by packed copies of their
        weights, which cost the memory of the weights once more. Results are the same up to
        rounding. Copies follow the weights: whoever changes them, and however, every generation
        compares the whole of them before it uses a copy, and training drops the copies. Within one
        generation, from one empty cache on, a change is seen by the version of a weight or by a few
        of its values, so not an edit of single values through `.data` or numpy. What cannot be
        compiled (attention and online convolution are not) runs as it is; if compiling fails, one
        warning says so. `generate(..., compile_config=CompileConfig(...))` does the same.

        Args:
            enabled: False undoes it.
            options: for `torch.compile`: `backend`, `mode` and `options`.
        """
        packing = Packing() if enabled and can_pack() else None
        for module in self.modules():
            if isinstance(module, GramianPreTrainedModel):
                module._packing = packing
            elif isinstance(module, Mixer):
                module.compile_step(enabled, **options)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: what is saved names this package and takes no copy of its source along."""

    def _initialize_missing_keys(self, *args: Any, **kwargs: Any) -> None:
        with Keeping(self) as keeping:
            super()._initialize_missing_keys(*args, **kwargs)
            reset_unwritten(self, keeping)

    def _initialize_weights(self, module: nn.Module, *args: Any) -> None:
        # Asked to, transformers passes over modules of other packages that own no tensor
        # themselves, as a filter made of submodules may: what is passed over is what was read.
        tensors = [*module.parameters(), *module.buffers()]
        if tensors and all(is_read(tensor) for tensor in tensors):
            return
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Projections onto the residual stream start smaller, as 2 × layers of them add up there.
        small = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
        if isinstance(module, Filter | ShortConvolution | Dynamics):
            module.reset_parameters()
        elif isinstance(module, Mixer):
            module.reset_parameters()
            if module.output_projection is not None:
                nn.init.normal_(module.output_projection.weight, std=small)
        elif isinstance(module, GramianMLP):
            nn.init.normal_(module.down_proj.weight, std=small)
        else:
            super()._init_weights(module)


class GramianModel(GramianPreTrainedModel):
    """Embedding, blocks and last norm: token ids, or a continuous input, to hidden states."""

    def __init__(self, config: GramianConfig) -> None:
        super().__init__(config)
        if config.input_size is None:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        else:
            self.input_proj = nn.Linear(config.input_size, config.hidden_size)
        kind: Any = BLOCKS[config.block]
        self.layers = nn.ModuleList(
            kind(config, layer) for layer in range(config.num_hidden_layers)
        )
        assert config.final_norm is not None
        self.norm = make_norm(config.final_norm, config.hidden_size, config.rms_norm_eps)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Segments | None = None,
        past_key_values: GramianCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        input_values: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: GramianCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of a batch of sequences, or of their continuation.

        Padding is not time: a sequence gives what its tokens give alone, whether padding stands
        before them, after them, in between, or after what a cache holds. Rows may be packed: every
        sequence in them then gives what it gives alone.

        Args:
            input_ids: (batch, length) token ids; exactly one of it and `inputs_embeds`.
            attention_mask: (batch, length or more), 1 for a real token, 0 for padding; of more
                columns (`generate` passes the past's too) the last `length` count, and those of the
                past may hide nothing that the cache has taken as a token. Or
                `gramian.mixers.Segments`.
            past_key_values: the cache of what came before; moved on in place.
            inputs_embeds: (batch, length, hidden_size).
            use_cache: whether to return a cache. By default `config.use_cache`, and never in
                training or with gradients on, where it would be made for nothing, or in a graph
                that is traced, which could not return it.
            output_hidden_states: whether to return the embeddings and every block's output, the
                last one after the last norm.
            input_values: (batch, length, `config.input_size`), in place of `input_ids` where the
                configuration has an `input_size`.
            position_ids: (batch, length) or (1, length). Positions count real tokens, so all that
                is read here is where they restart: there the row's next sequence begins.
            cache: `past_key_values` by the name that newer releases of transformers give it.
            kwargs: `seq_idx`, (batch, length), which changes where a sequence begins, or
                `cu_seq_lens_q` and `cu_seq_lens_k`, (sequences + 1), the positions of the flattened
                rows at which they do; `cache_position`, (length), which must go on from the cache.

        Returns:
            `last_hidden_state` (batch, length, hidden_size), `past_key_values` (named `cache` where
            transformers names it so), `hidden_states`. At padding they mean nothing.

        Raises:
            ValueError: on both or neither of `input_ids` (or `input_values`) and `inputs_embeds`,
                the kind of input that the configuration does not have, an empty sequence, a mask
                that is not (batch, ≥ length) of zeros and ones, positions that jump ahead, packed
                rows with a cache, a cache of another batch, one of tokens that the mask hides, a
                cache together with gradient checkpointing or in a bidirectional model.
            TypeError: on a cache that is not a `GramianCache`, and on an argument of which nothing
                is known.
        """
        inputs = (input_ids, inputs_embeds, input_values)
        mask = read_rows(inputs, attention_mask, position_ids, kwargs)
        past = one_cache(past_key_values, cache)
        check_past(past, attention_mask, inputs)
        cache_position = kwargs.pop("cache_position", None)
        check_arguments(type(self).__name__, kwargs)
        if mask is not None:  # numbers at padding, NaN even, reach no gradient either
            input_values, inputs_embeds = (
                x if x is None else apply_mask(x, mask.to(x.device).real)
                for x in (input_values, inputs_embeds)
            )
        hidden_states = self.embed(input_ids, input_values, inputs_embeds)
        batch, length = hidden_states.shape[:2]
        if length == 0:
            raise ValueError("the model needs at least one token; got sequences of length 0.")
        packed = mask is not None and mask.packed
        cache = self._cache_for(past, use_cache, batch, packed)
        _check_positions(cache_position, length, cache)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        seen = [hidden_states] if output_hidden_states else []
        for block in self.layers:
            hidden_states = block(hidden_states, mask=mask, past_key_values=cache)
            if output_hidden_states:
                seen.append(hidden_states)
        hidden_states = apply_norm(self.norm, hidden_states)
        if output_hidden_states:
            seen[-1] = hidden_states
        if cache is not None:
            cache.note(hidden_states, mask)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=tuple(seen) if output_hidden_states else None,
            **{CACHE: cache},
        )

    def embed(
        self,
        input_ids: Tensor | None = None,
        input_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Return what the first block reads, (batch, length, hidden_size), of the one input given.

        Raises:
            ValueError: on an input of another shape or kind than the model's, several, or none.
        """
        hidden_states = self.embedding_dropout(self._embed(input_ids, input_values, inputs_embeds))
        if self.config.residual_in_fp32 and hidden_states.dtype.itemsize < 4:
            hidden_states = hidden_states.float()
        return hidden_states

    def _embed(
        self, input_ids: Tensor | None, input_values: Tensor | None, inputs_embeds: Tensor | None
    ) -> Tensor:
        size = self.config.input_size
        if size is None:
            name, wanted, other = "input_ids", input_ids, input_values
        else:
            name, wanted, other = "input_values", input_values, input_ids
        if other is not None:
            raise ValueError(
                "a model without input_size takes input_ids, not input_values."
                if size is None
                else f"a model of input_size {size} takes input_values, not input_ids."
            )
        if (wanted is None) == (inputs_embeds is None):
            raise ValueError(f"give exactly one of {name} and inputs_embeds.")
        if wanted is None:
            assert inputs_embeds is not None
            return inputs_embeds
        if size is None:
            if wanted.ndim != 2 or wanted.is_floating_point():
                raise ValueError(
                    f"input_ids must be (batch, length) of integers; got {tuple(wanted.shape)} of "
                    f"{wanted.dtype}."
                )
            return self.embed_tokens(wanted)
        if wanted.ndim != 3 or wanted.shape[-1] != size:
            raise ValueError(
                f"input_values must be (batch, length, {size}); got {tuple(wanted.shape)}."
            )
        return self.input_proj(wanted.to(self.input_proj.weight.dtype))

    def _cache_for(
        self, cache: GramianCache | None, use_cache: bool | None, batch: int, packed: bool
    ) -> GramianCache | None:
        if packed:
            if cache is not None or use_cache:
                raise ValueError(
                    "packed rows have no cache: a row of one holds the past of one sequence."
                )
            return None
        if self.config.bidirectional:
            if cache is not None or use_cache:
                raise ValueError(
                    "a bidirectional model has no cache: it looks at the whole sequence at once."
                )
            return None
        checkpointing = self.gradient_checkpointing and self.training
        if cache is None:
            if use_cache is None:
                unused = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
                use_cache = self.config.use_cache and not unused
            return GramianCache(self.config) if use_cache and not checkpointing else None
        if not isinstance(cache, GramianCache):
            raise TypeError(
                "past_key_values must be a GramianCache, such as an earlier forward returned; got "
                f"{type(cache).__name__}."
            )
        if checkpointing:
            raise ValueError("past_key_values cannot be used in training with checkpointing.")
        if cache.batch_size not in (-1, batch):
            raise ValueError(
                f"past_key_values holds {cache.batch_size} sequences, the input {batch}."
            )
        return cache


_NOTHING_TO_CONTINUE = (
    "attention_mask must leave a real token in every row that is to be continued; it hides all of "
    "one."
)


def _check_positions(
    cache_position: Tensor | None, length: int, cache: GramianCache | None
) -> None:
    """Raise a ValueError unless the columns follow those that the cache has seen."""
    if cache_position is None or torch.compiler.is_compiling():
        return
    seen = 0 if cache is None else cache.get_seq_length()
    expected = torch.arange(seen, seen + length, device=cache_position.device)
    if not torch.equal(cache_position.flatten().to(torch.int64), expected):
        raise ValueError(
            f"cache_position must be {seen} … {seen + length - 1}, the columns after those that "
            f"the cache has seen; got {cache_position.flatten().tolist()[:8]}."
        )


class GramianForCausalLM(GramianPreTrainedModel, GramianGenerationMixin):
    """A `GramianModel` with an output projection: next-token logits, loss and `generate`."""

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
        """Next-token logits, and their loss when `labels` are given.

        Args:
            labels: (batch, length) token ids, -100 to ignore; shifted here, so `labels=input_ids`.
                A token predicts the next one of its own sequence: nothing is predicted from
                padding or across the border of packed sequences, and labels at padding do not
                count. A trainer that counted them in `num_items_in_batch` is corrected.
            logits_to_keep: compute the logits of the last so many tokens, or of these positions
                (a 1-D tensor); 0 means all. In a padded batch they are each row's last tokens,
                wherever its padding stands, and a row without a new token has those after the last
                one that the cache has seen. Or a boolean (batch, length) mask of positions, whose
                logits come as (kept, vocab_size), row after row; `shift_labels` must be those of
                the same positions then.
            kwargs: those of `GramianModel.forward`, and the loss function's (`num_items_in_batch`,
                `shift_labels`).

        The other arguments and the errors are those of `GramianModel.forward`.

        Raises:
            ValueError: also on such a mask with `labels` and no `shift_labels`; on labels of
                another shape or dtype, out of the vocabulary, or all ignored; and where the last
                logits of a row without a token are asked for (with a cache, which later chunks may
                go on from, they are NaN).

        Returns:
            `loss`, `logits` (batch, kept, vocab_size), `past_key_values`, `hidden_states`.
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
        """Read a prompt of any length, chunk after chunk: memory is that of one chunk.

        Args:
            input_ids: (batch, length) token ids.
            attention_mask: (batch, length), 1 for a real token, 0 for padding.
            past_key_values: the cache of what came before; moved on in place.
            chunk_size: tokens read at once.
            progress: called as `progress(tokens read, tokens)` before the first chunk and after
                each.

        Returns:
            `logits` (batch, 1, vocab_size) of the token that follows each row's last real one,
            and `past_key_values`. To generate from there, pass the cache and the whole sequence,
            one token longer; or the new token alone, with an `attention_mask` as long as the whole.

        Raises:
            ValueError: on a `chunk_size` below 1, a row without a token, and as `forward` does.
        """
        if not isinstance(chunk_size, int) or chunk_size < 1:
            raise ValueError(f"chunk_size must be an integer of at least 1; got {chunk_size!r}.")
        batch, length = input_ids.shape
        mask = recent_mask(attention_mask, batch, length)
        check_past(past_key_values, attention_mask, (input_ids,))
        if progress is not None:
            progress(0, length)
        some_column = torch.tensor([-1], device=input_ids.device)
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
        """None: positions are counted here, and those made from a mask restart after padding."""

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
        """Inputs of the next forward; padding concerns the prompt alone when there is a cache."""
        cache = one_cache(past_key_values, cache)
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
            inputs["attention_mask"] = None  # what was written is real; looking would stall a GPU
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
    """The last `count` tokens of every row, (batch, count, hidden_size)."""
    kept = last_tokens(hidden_states, segments, count)
    if segments is None or segments.packed or not segments.has_empty_rows:
        return kept
    if cache is None:
        raise ValueError(_NOTHING_TO_CONTINUE)
    assert cache.last_hidden_state is not None
    return torch.cat([kept[:, :-1], cache.last_hidden_state.unsqueeze(1)], dim=1)


class GramianForSequenceClassification(GramianPreTrainedModel):
    """A `GramianModel` whose hidden states are pooled and mapped to one logit for each label.

    Padding on either side, or anywhere, leaves no trace: the mask keeps it out of the mixers and
    out of the pooling. It is told by `attention_mask` alone, never guessed from token ids. Packed
    rows, told as to `GramianModel.forward`, give one row of logits for each sequence, in order.
    """

    accepts_loss_kwargs = False  # the loss is a mean over the batch, whatever the Trainer counts

    def __init__(self, config: GramianConfig) -> None:
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
        inputs_embeds: Tensor | None = None,
        input_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits of a batch of sequences, and their loss when `labels` are given.

        Args:
            labels: (batch) of integers for one label a sequence, cross-entropy; (batch, num_labels)
                of zeros and ones for several, binary cross-entropy; for regression (batch,
                num_labels), or (batch) with one label, mean squared error. Which of them it is
                `config.problem_type` says; if it is None, one label is regression, integers are
                single labels, and others several. A label of -100 is not scored.
            kwargs: those of `GramianModel.forward`; and `num_items_in_batch`, which divides the
                summed loss in place of their count.

        The other arguments and the errors are those of `GramianModel.forward`.

        Returns:
            `loss`, `logits` (batch, num_labels), `hidden_states`.

        Raises:
            ValueError: also on a mask that hides a whole sequence, and labels that
                `classification_loss` refuses.
        """
        inputs = (input_ids, inputs_embeds, input_values)
        segments = read_rows(inputs, attention_mask, position_ids, kwargs)
        check_arguments(type(self).__name__, kwargs)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=segments,
            inputs_embeds=inputs_embeds,
            input_values=input_values,
            use_cache=False,
            output_hidden_states=output_hidden_states,
        )
        logits = self.score(pool(outputs.last_hidden_state, segments, self.config.pooling))
        return SequenceClassifierOutput(
            loss=None
            if labels is None
            else classification_loss(logits, labels, self.config, kwargs.get("num_items_in_batch")),
            logits=logits,
            hidden_states=outputs.hidden_states,
        )
