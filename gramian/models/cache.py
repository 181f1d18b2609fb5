"""The memory of a Gramian model during generation: one recurrence and its state per layer.

A layer of the cache holds the frozen recurrence of its mixer, the recurrence's state, and the
number of tokens it has seen. The block makes the recurrence at first use, inside its own forward,
where sharded parameters are gathered. The state is replaced at every update, since a recurrence
consumes the state that it is given.
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
from gramian.models.adapters import switches
from gramian.models.segments import last_tokens
from gramian.models.snapshots import load_cache, save_cache
from gramian.ops.changes import Record, digest

if TYPE_CHECKING:
    from gramian.models.configuration import GramianConfig
    from gramian.models.pretrained import GramianPreTrainedModel


CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"
"""The name of a cache in outputs and arguments of the installed release of transformers."""


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """Return the cache that was given under either of its names, or None.

    Raises:
        ValueError: if two caches were given.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("give one cache: past_key_values and cache are two names of one argument.")
    return cache if past_key_values is None else past_key_values


def check_past(cache: Any, mask: Any, inputs: tuple[Tensor | None, ...]) -> None:
    """Raise a ValueError if a mask of past and inputs hides tokens that the cache has seen.

    These are, for example, the tokens that `generate` writes after the end of a row while other
    rows continue. A state cannot take them back, so the next token would follow another past.

    Args:
        cache: the argument given as a cache.
        mask: (batch, tokens seen and length), 1 for real tokens. A mask of another shape is not
            checked, nor is any mask in a traced graph.
        inputs: (batch, length, …); the first that is not None counts.
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
    """The place of a filter's tensor, and its value when a recurrence was made from it."""

    __slots__ = ("digest", "name", "place", "record", "trained")

    def __init__(self, place: dict[str, Any], name: str) -> None:
        self.place, self.name = place, name
        self.record, self.digest = Record(place[name]), digest(place[name])
        self.trained: bool = place[name].requires_grad

    def holds(self) -> bool:
        """Return whether the tensor is unchanged.

        If another tensor has taken its place, all values are compared.
        """
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
    """Return the parameters and buffers of a mixer's filters whose values can be read."""
    filters = [part for part in mixer.modules() if isinstance(part, Filter)]
    parts = {id(part): part for one in filters for part in one.modules()}.values()
    places = [place for part in parts for place in (part._parameters, part._buffers)]
    return [_Source(p, name) for p in places for name, tensor in p.items() if _is_here(tensor)]


def _is_here(tensor: Tensor | None) -> TypeGuard[Tensor]:
    """Return whether a tensor is complete, neither offloaded nor sharded."""
    return tensor is not None and type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta


class GramianCacheLayer(LinearAttentionCacheLayerMixin):
    """The recurrence of one mixer, its state, and how many tokens it has seen.

    transformers' own linear-attention layer keeps a convolution state and a single tensor, does not
    count tokens and cannot be repeated; a mixer's state is a `State` of several tensors.
    """

    is_compileable = False  # an online convolution branches on its step counter

    def __init__(self) -> None:
        super().__init__(number_of_states=1)
        self.recurrence: Any = None
        self._snapshot: list[_Source] = []
        self._trained: list[_Source] = []
        self._adapted: list[Filter] = []
        self._switches: list[Any] = []
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
        """Return the frozen recurrence of `mixer` for the next `length` tokens, made if missing.

        Without gradients, the recurrence must agree with the filter's present weights: it is made
        again if it does not and no state is held, as after `reset`. Before a single token, only
        trainable tensors are compared. Some changes go unnoticed: single values edited through
        `.data` or numpy, the steps of a fused optimizer on a GPU, and filters whose weights are
        offloaded or sharded.

        Raises:
            ValueError: if a state is held, and the filter has changed since or the cache belongs
                to another model.
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
            filters = [part for part in mixer.modules() if isinstance(part, Filter)]
            self._adapted = [one for one in filters if switches(one)]
            self._switches = [switches(one) for one in self._adapted]
            trained = [source for source in self._snapshot if source.trained]
            self._trained = trained or self._snapshot
        return self.recurrence

    def _is_stale(self, length: int) -> bool:
        looked_at = self._snapshot if length > 1 else self._trained
        return any(not source.holds() for source in looked_at) or (
            bool(self._adapted) and [switches(one) for one in self._adapted] != self._switches
        )

    def lazy_initialization(
        self, conv_states: Any = None, recurrent_states: Any = None, state_idx: int = 0
    ) -> None:
        """Record that a state is held from now on, and on which device."""
        leaves = tree_leaves(recurrent_states)  # a tensor without dimensions may be elsewhere
        self.device = next(leaf.device for leaf in leaves if leaf.ndim)
        self.is_recurrent_states_initialized[0] = True

    def update_recurrent_state(
        self, recurrent_states: Any, state_idx: int = 0, *, batch_size: int = -1, tokens: int = 0
    ) -> Any:
        """Replace the state by that after `tokens` more tokens of `batch_size` sequences."""
        if not self.is_recurrent_states_initialized[0]:
            self.lazy_initialization(recurrent_states=recurrent_states)
        self.recurrent_states[0] = recurrent_states
        self.has_previous_state[0] = True
        self.batch_size = batch_size
        self.tokens += tokens
        return recurrent_states

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0) -> Tensor:
        """Raise a TypeError: the short convolution's samples are part of the mixer's state."""
        raise TypeError("a Gramian cache layer holds one recurrent state and no convolution state.")

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of a mask over all tokens seen and `query_length` more."""
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
        """Return a copy with its own state; the recurrence is shared, as it holds the mixer."""
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
        """Move the state back to the device on which it was made."""
        if self.state is not None:
            self.recurrent_states[0] = self.state.to(self.device)

    @property
    def is_croppable(self) -> bool:
        """Return False, as a recurrence does not run backwards."""
        return False

    def activate_past_recording(self) -> None:
        """Raise a ValueError, as `crop` does."""
        raise ValueError("a Gramian cache cannot record its past: a recurrence keeps one state.")

    def crop(self, tokens_to_remove: int) -> None:
        """Raise a ValueError: the state cannot take tokens back."""
        raise ValueError("a Gramian cache cannot be cropped: a recurrence keeps one state.")


class GramianCache(Cache):
    """The generation state of a Gramian model: `past_key_values` of its forward.

    Args:
        config: the model's configuration.

    Its size depends on the model and the batch but not on the length generated, except for the
    keys and values of attention. `reset` keeps the recurrences, so that a cache can be used again
    without making them again if the filters have not changed. The recurrences are snapshots:
    without gradients, a cache that holds a sequence is refused after a change of the filters. Other
    weights are shared with the model: after a change the new ones process the next tokens, while
    the state of the past is still that of the old ones, as with keys and values.
    """

    layers: list[GramianCacheLayer]

    last_hidden_state: Tensor | None
    """(batch, hidden_size): the output of the last norm at each row's last token; NaN for a row
    that has seen no token."""

    padding: Tensor | None
    """(batch), int64: the number of columns seen that were padding; None if there was none."""

    def __init__(self, config: GramianConfig) -> None:
        super().__init__(layers=[GramianCacheLayer() for _ in range(config.num_hidden_layers)])
        self.last_hidden_state: Tensor | None = None
        self.padding: Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens seen."""
        return self.layers[layer_idx].get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return length and offset of a mask over all tokens seen and `query_length` more."""
        return self.layers[layer_idx].get_mask_sizes(query_length)

    def note(self, hidden_states: Tensor, segments: Segments | None) -> None:
        """Keep the hidden state of each row's last token, and count padding.

        Args:
            hidden_states: (batch, length, hidden_size), of the columns that the layers have seen.
            segments: where tokens stand in them.
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
        """Return which rows have seen no token yet, (batch), boolean."""
        if self.padding is None:
            return torch.zeros(max(self.batch_size, 0), dtype=torch.bool)
        return self.padding >= self.get_seq_length()

    def detach(self) -> GramianCache:
        """Cut the states off from the graph, in place, and return the cache.

        This gives truncated backpropagation through time.
        """
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
        """False for every layer.

        This cache counts the tokens that it has seen, so `generate` removes them from the sequence,
        which it does not do for transformers' own linear layers.
        """
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
            path: the file, which is written whole or not at all.
            model: the model that filled the cache; its fingerprint is stored in the file.

        Raises:
            ValueError: on an empty cache, or one of another number of layers.
        """
        save_cache(self, path, model)

    @classmethod
    def load(cls, path: str | Path, model: GramianPreTrainedModel) -> GramianCache:
        """Return the cache that `save` wrote, on the device of `model`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds no cache, or that of a model with other weights.
        """
        return load_cache(path, model)
