"""What a Gramian model remembers while it generates: one recurrence and its state per layer.

A layer of the cache holds the frozen recurrence of its mixer, made by the block inside its own
forward at first use, where sharded parameters are whole; the recurrence's state; and the number of
tokens it has seen. The state is replaced at every update: a recurrence consumes what it is given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from gramian.filters import Filter
from gramian.mixers import Mixer, MixerRecurrence, Segments
from gramian.models.segments import last_tokens
from gramian.models.snapshots import load_cache, save_cache
from gramian.ops.changes import Record, digest

if TYPE_CHECKING:
    from gramian.models.configuration import GramianConfig
    from gramian.models.pretrained import GramianPreTrainedModel


CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"
"""What the installed release of transformers calls a cache, in outputs and in arguments."""


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The one cache that was given under either of its names, or None.

    Raises:
        ValueError: if there are two.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("give one cache: past_key_values and cache are two names of one argument.")
    return cache if past_key_values is None else past_key_values


def check_past(cache: Any, mask: Any, inputs: tuple[Tensor | None, ...]) -> None:
    """Raise a ValueError where a mask of past and inputs hides tokens that the cache has taken.

    Such are the ones that `generate` writes after the end of a row while others go on. A state
    cannot give them back, so the next token would be that of another past.

    Args:
        cache: what was given for one.
        mask: (batch, tokens seen and length), 1 for real tokens; of another shape it is not looked
            at, nor in a graph that is traced.
        inputs: (batch, length, …), the first that is not None.
    """
    rows = next((x for x in inputs if x is not None), None)
    if not isinstance(cache, GramianCache) or not isinstance(mask, Tensor) or rows is None:
        return
    seen = cache.get_seq_length()
    together = (cache.batch_size, seen + rows.shape[1])
    if not seen or tuple(mask.shape) != together or torch.compiler.is_compiling():
        return
    hidden = (mask[:, :seen] == 0).sum(1)
    known = 0 if cache.padding is None else cache.padding.to(hidden.device)
    later = (hidden - known).tolist()
    if max(later) > 0:
        row = next(row for row, count in enumerate(later) if count > 0)
        raise ValueError(
            f"attention_mask hides {later[row]} of the columns that the cache has taken as tokens "
            f"of row {row}, which a recurrence cannot take back: begin with a new cache."
        )


class _Source:
    """A tensor of a filter, by its place, and what it was when a recurrence was made of it."""

    __slots__ = ("digest", "name", "place", "record", "trained")

    def __init__(self, place: dict[str, Any], name: str) -> None:
        self.place, self.name = place, name
        self.record, self.digest = Record(place[name]), digest(place[name])
        self.trained: bool = place[name].requires_grad

    def holds(self) -> bool:
        """Whether the tensor is what it was; where it has moved, all of its values are compared."""
        tensor = self.place.get(self.name)
        if self.record.matches(tensor):
            return True
        if tensor is None:
            return False
        if _is_here(tensor):
            if digest(tensor) != self.digest:
                return False
            self.record = Record(tensor)
        return True


def _sources(mixer: nn.Module) -> list[_Source]:
    """Parameters and buffers of a mixer's filters that can be looked at."""
    filters = [part for part in mixer.modules() if isinstance(part, Filter)]
    parts = {id(part): part for one in filters for part in one.modules()}.values()
    places = [place for part in parts for place in (part._parameters, part._buffers)]
    return [_Source(p, name) for p in places for name, tensor in p.items() if _is_here(tensor)]


def _is_here(tensor: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a tensor is there as a whole: none that is offloaded or sharded."""
    return tensor is not None and type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta


class GramianCacheLayer(LinearAttentionCacheLayerMixin):
    """The recurrence of one mixer, its state, and how many tokens it has seen.

    transformers' own linear-attention layer keeps a convolution state and a single tensor, counts
    no tokens and cannot be repeated; a mixer's state is a `State` of several tensors.
    """

    is_compileable = False  # an online convolution branches on its step counter

    def __init__(self) -> None:
        super().__init__(number_of_states=1)
        self.recurrence: Any = None
        self._snapshot: list[_Source] = []
        self._trained: list[_Source] = []
        self.tokens = 0
        self.batch_size = -1

    @property
    def state(self) -> Any:
        """The state after the last update, or None before the first one and after a reset."""
        return self.recurrent_states[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return 0 if self.state is None else self.state.nbytes

    def recurrence_of(self, mixer: Mixer, length: int) -> MixerRecurrence:
        """The frozen recurrence of `mixer` for the next `length` tokens, made where there is none.

        Without gradients it must still be one of the filter as it is: it is made anew where it is
        not and nothing is remembered, as after `reset`. Before a single token only what is trained
        is looked at. What is not noticed: single values that were edited through `.data` or numpy,
        a fused optimiser on a GPU, and filters whose weights are offloaded or sharded.

        Raises:
            ValueError: if the filter has changed since, or the cache is another model's, and a
                state is held.
        """
        if self.recurrence is not None and not torch.compiler.is_compiling():
            other = self.recurrence.mixer is not mixer
            if other or (not torch.is_grad_enabled() and self._is_stale(length)):
                if self.state is not None:
                    raise ValueError(
                        "this cache was filled by another model: begin with a new one."
                        if other
                        else "the model's filters have changed since this cache was filled, and "
                        "its recurrences are those of before: begin with a new cache."
                    )
                self.recurrence = None
        if self.recurrence is None:
            self.recurrence = mixer.recurrence()
            self._snapshot = _sources(mixer)
            trained = [source for source in self._snapshot if source.trained]
            self._trained = trained or self._snapshot
        return self.recurrence

    def _is_stale(self, length: int) -> bool:
        looked_at = self._snapshot if length > 1 else self._trained
        return any(not source.holds() for source in looked_at)

    def lazy_initialization(
        self, conv_states: Any = None, recurrent_states: Any = None, state_idx: int = 0
    ) -> None:
        """Note that a state is held from now on, and where."""
        leaves = tree_leaves(recurrent_states)  # a tensor without dimensions may be elsewhere
        self.device = next(leaf.device for leaf in leaves if leaf.ndim)
        self.is_recurrent_states_initialized[0] = True

    def update_recurrent_state(
        self, recurrent_states: Any, state_idx: int = 0, *, batch_size: int = -1, tokens: int = 0
    ) -> Any:
        """Replace the state by the one after `tokens` more tokens of `batch_size` sequences."""
        if not self.is_recurrent_states_initialized[0]:
            self.lazy_initialization(recurrent_states=recurrent_states)
        self.recurrent_states[0] = recurrent_states
        self.has_previous_state[0] = True
        self.batch_size = batch_size
        self.tokens += tokens
        return recurrent_states

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0) -> Tensor:
        """Refused: the short convolution's samples are part of the mixer's one state."""
        raise TypeError("a Gramian cache layer holds one recurrent state and no convolution state.")

    def get_seq_length(self) -> int:
        """Number of tokens seen."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over everything seen and `query_length` tokens more."""
        return self.tokens + query_length, 0

    def reset(self) -> None:
        """Forget the sequence; the recurrence stays."""
        self.recurrent_states[0] = None
        self.is_recurrent_states_initialized[0] = False
        self.has_previous_state[0] = False
        self.batch_size = -1
        self.tokens = 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices` (integers, or a boolean mask over the batch)."""
        if self.state is None:
            return
        indices = indices.to(self.device)
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(-1)
        self.recurrent_states[0] = self.state.select(indices)
        self.batch_size = len(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams that survive."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        if self.state is None:
            return
        self.recurrent_states[0] = self.state.repeat(repeats)
        self.batch_size *= repeats

    def __deepcopy__(self, memo: dict[int, Any]) -> GramianCacheLayer:
        """A copy with a state of its own: the recurrence is shared, as it holds the mixer."""
        copied = copy.copy(self)
        copied.recurrent_states = {0: None if self.state is None else self.state.clone()}
        copied.is_recurrent_states_initialized = dict(self.is_recurrent_states_initialized)
        copied.has_previous_state = dict(self.has_previous_state)
        return copied

    def detach(self) -> None:
        """Cut the state off from the graph."""
        if self.state is not None:
            self.recurrent_states[0] = self.state.detach()

    def offload(self) -> None:
        """Move the state to the CPU."""
        if self.state is not None:
            self.recurrent_states[0] = self.state.to("cpu")

    def prefetch(self) -> None:
        """Move the state back to where it was made."""
        if self.state is not None:
            self.recurrent_states[0] = self.state.to(self.device)

    @property
    def is_croppable(self) -> bool:
        """False: a recurrence does not run backwards."""
        return False

    def activate_past_recording(self) -> None:
        """Refused, as `crop` is."""
        raise ValueError("a Gramian cache cannot record its past: a recurrence keeps one state.")

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: the tokens to take back are no longer there."""
        raise ValueError("a Gramian cache cannot be cropped: a recurrence keeps one state.")


class GramianCache(Cache):
    """The generation state of a Gramian model: `past_key_values` of its forward.

    Args:
        config: the model's configuration.

    Its size is fixed by the model and the batch, whatever the length generated, but for the keys
    and values of attention. `reset` keeps the recurrences, so that a cache used again need not make
    them anew where the filters are what they were. They are snapshots: without gradients, a cache
    that holds a sequence is refused after a change of the filters. Other weights are shared with
    the model: after a change of them the next tokens are taken by the new ones, and what the state
    holds of the past is what the old ones made of it, as it is with keys and values.
    """

    layers: list[GramianCacheLayer]

    last_hidden_state: Tensor | None
    """(batch, hidden_size): after the last norm, of each row's last token; NaN of a row that has
    seen none."""

    padding: Tensor | None
    """(batch), int64: how many of the columns seen were padding; None if none was."""

    def __init__(self, config: GramianConfig) -> None:
        super().__init__(layers=[GramianCacheLayer() for _ in range(config.num_hidden_layers)])
        self.last_hidden_state: Tensor | None = None
        self.padding: Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens seen."""
        return self.layers[layer_idx].get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of a mask over everything seen and `query_length` tokens more."""
        return self.layers[layer_idx].get_mask_sizes(query_length)

    def note(self, hidden_states: Tensor, segments: Segments | None) -> None:
        """Keep what a forward pass made of each row's last token, and count padding.

        Args:
            hidden_states: (batch, length, hidden_size), of the columns that the layers have seen.
            segments: where tokens are in them.
        """
        before = self.padding
        if segments is not None:
            assert segments.real is not None
            hidden = (~segments.real).sum(1)
            self.padding = hidden if before is None else before.to(hidden.device) + hidden
        last = last_tokens(hidden_states, segments, 1)[:, 0]
        if segments is not None and segments.has_empty_rows:
            assert segments.real is not None
            old = (
                last.new_tensor(torch.nan)
                if self.last_hidden_state is None
                else self.last_hidden_state
            )
            last = torch.where(segments.real.any(1, keepdim=True), last, old.to(last))
        # A view of one column would keep all of them.
        self.last_hidden_state = last if hidden_states.shape[1] == 1 else last.clone()

    def unstarted(self) -> Tensor:
        """(batch), boolean: which rows have seen no token yet."""
        if self.padding is None:
            return torch.zeros(max(self.batch_size, 0), dtype=torch.bool)
        return self.padding >= self.get_seq_length()

    def detach(self) -> GramianCache:
        """Cut the states off from the graph, in place, and return the cache: truncated
        backpropagation through time."""
        for layer in self.layers:
            layer.detach()
        if self.last_hidden_state is not None:
            self.last_hidden_state = self.last_hidden_state.detach()
        return self

    def reset(self) -> None:
        """Forget the sequences; the recurrences stay."""
        super().reset()
        self.last_hidden_state = self.padding = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams that survive."""
        super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices` (integers, or a boolean mask over the batch)."""
        super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def __deepcopy__(self, memo: dict[int, Any]) -> GramianCache:
        copied = copy.copy(self)
        copied.layers = copy.deepcopy(self.layers, memo)
        copied._map_rows(Tensor.clone)
        return copied

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.last_hidden_state is not None:
            self.last_hidden_state = function(self.last_hidden_state)
        if self.padding is not None:
            self.padding = function(self.padding)

    @property
    def is_linear(self) -> list[bool]:
        """False of every layer: this cache counts the tokens that it has seen, so `generate` takes
        them off a whole sequence, as it does not for transformers' own linear layers."""
        return [False] * len(self.layers)

    @property
    def batch_size(self) -> int:
        """Number of sequences, -1 while the cache is empty."""
        return self.layers[0].batch_size

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' states."""
        return sum(layer.nbytes for layer in self.layers)

    def save(self, path: str | Path, model: GramianPreTrainedModel) -> None:
        """Write the state to a file, for `load`; see `gramian.models.snapshots`.

        Args:
            path: the file, written whole or not at all.
            model: the one that filled the cache; a fingerprint of it goes into the file.

        Raises:
            ValueError: on an empty cache, or one of another number of layers.
        """
        save_cache(self, path, model)

    @classmethod
    def load(cls, path: str | Path, model: GramianPreTrainedModel) -> GramianCache:
        """The cache that `save` wrote, on the device of `model`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no cache, or one of a model with other weights.
        """
        return load_cache(path, model)
