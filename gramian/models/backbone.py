"""Define the model that all Gramian models contain: an embedding, blocks and a last norm.

Each block contains a mixer (`gramian.models.blocks`), and the configuration names the mixer of
every layer. Only the mixers depend on the order of the tokens, so there is no positional embedding.

Training and scoring use convolutions. With a cache, the recurrences of the mixers run: the whole
prompt is processed in one pass, and then each token takes one step. Except for the keys and values
of attention, the size of the state (`state_bytes`) does not depend on the length of the text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple

from gramian.mixers import Segments
from gramian.mixers.mixer import apply_mask
from gramian.models.cache import CACHE, GramianCache, check_past, one_cache
from gramian.models.configuration import GramianConfig
from gramian.models.layers import BLOCKS
from gramian.models.norms import apply_norm, make_norm
from gramian.models.pretrained import GramianPreTrainedModel
from gramian.models.segments import check_arguments, read_rows
from gramian.ops.processors import adapt_threads

__all__ = ["GramianModel"]


class GramianModel(GramianPreTrainedModel):
    """A model that maps token ids or a continuous input to hidden states."""

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
        """Return the hidden states of a batch of sequences, or of the continuation of a batch.

        Padding does not count as time: the tokens of a sequence have the outputs that they would
        have without padding. Padding may be before, after or between the tokens, also in a
        continuation. Rows may be packed, that is, hold several sequences. Each of these sequences
        has the outputs that it would have alone.

        Args:
            input_ids: (batch, length) token ids; give either these or `inputs_embeds`.
            attention_mask: (batch, length or more), 1 for a real token, 0 for padding; or
                `gramian.mixers.Segments`. If there are more than `length` columns (`generate` also
                passes the columns of the past), the last `length` columns are used. The columns of
                the past must not hide a token that the cache has seen.
            past_key_values: the cache of the tokens before these. It is updated in place.
            inputs_embeds: (batch, length, hidden_size).
            use_cache: whether to return a cache. By default, a cache is returned if
                `config.use_cache` is True, except in training or with gradients enabled, where a
                cache has no use, and in a traced graph, which cannot return one.
            output_hidden_states: whether to return the embeddings and the output of every block.
                The output of the last block is returned after the last norm.
            input_values: (batch, length, `config.input_size`), in place of `input_ids` if the
                configuration has an `input_size`.
            position_ids: (batch, length) or (1, length). Positions count the real tokens of a
                sequence. The next sequence of a row begins where the positions restart; the model
                uses the positions for nothing else.
            cache: the name of `past_key_values` in newer releases of transformers.
            kwargs: further arguments. `seq_idx`, (batch, length), numbers the sequences: its value
                changes where the next sequence begins. `cu_seq_lens_q` and `cu_seq_lens_k`,
                (sequences + 1), are the positions in the flattened rows at which sequences begin,
                followed by the number of all positions.
                `cache_position`, (length), must continue from the cache.

        Returns:
            An output with `last_hidden_state`, (batch, length, hidden_size), `hidden_states` and
            `past_key_values`, which newer releases of transformers name `cache`. Hidden states at
            padding are meaningless.

        Raises:
            ValueError: if both or neither of `input_ids` (or `input_values`) and `inputs_embeds`
                are given; if the configuration does not accept the kind of input; if the input has
                length 0; if the mask is not (batch, length or more) of zeros and ones; if positions
                jump ahead; if a cache is used with packed rows, in training with gradient
                checkpointing, or in a bidirectional model; or if the cache has another batch size,
                or has seen tokens that the mask hides.
            TypeError: if the cache is not a `GramianCache`, or an argument is unknown.
        """
        adapt_threads()
        inputs = (input_ids, inputs_embeds, input_values)
        mask = read_rows(inputs, attention_mask, position_ids, kwargs)
        past = one_cache(past_key_values, cache)
        check_past(past, attention_mask, inputs)
        cache_position = kwargs.pop("cache_position", None)
        check_arguments(type(self).__name__, kwargs)
        if mask is not None:  # keep values at padding, even NaN, from the gradients, too
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
        """Return the input of the first block, (batch, length, hidden_size).

        Raises:
            ValueError: unless exactly one input is given, of the kind and shape that the model
                reads.
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
        if checkpointing:
            raise ValueError("past_key_values cannot be used in training with checkpointing.")
        if cache.batch_size not in (-1, batch):
            raise ValueError(
                f"past_key_values holds {cache.batch_size} sequences, the input {batch}."
            )
        return cache


def _check_positions(
    cache_position: Tensor | None, length: int, cache: GramianCache | None
) -> None:
    """Raise a ValueError unless `cache_position` continues the columns that the cache has seen."""
    if cache_position is None or torch.compiler.is_compiling():
        return
    seen = 0 if cache is None else cache.get_seq_length()
    expected = torch.arange(seen, seen + length, device=cache_position.device)
    if not torch.equal(cache_position.flatten().to(torch.int64), expected):
        raise ValueError(
            f"cache_position must be {seen} … {seen + length - 1}, the columns after those that "
            f"the cache has seen; got {cache_position.flatten().tolist()[:8]}."
        )
