"""Define the cache of a Gramian model. For each layer it holds a recurrence and its state.

A layer of the cache holds the frozen recurrence of a mixer, the state of the recurrence, and the
number of tokens that the state has seen. The recurrence is made when it is first used, within the
block's own forward, where sharded parameters are gathered. Every update replaces the state, because
a recurrence overwrites the state from which it continues.
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
from gramian.models.initialization import own_tensors
from gramian.models.segments import last_tokens
from gramian.models.snapshots import load_cache, save_cache
from gramian.ops.changes import Record, digest

if TYPE_CHECKING:
    from gramian.models.configuration import GramianConfig
    from gramian.models.pretrained import GramianPreTrainedModel


CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"
"""The name of the cache in inputs and outputs, which depends on the release of transformers."""


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """Return the cache that was passed under one of the two names, or None if there is none.

    Raises:
        ValueError: if two caches were given.
        TypeError: if the cache is not a `GramianCache`.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("give one cache: past_key_values and cache are two names of one argument.")
    given = cache if past_key_values is None else past_key_values
    if given is not None and not isinstance(given, GramianCache):
        raise TypeError(
            "past_key_values must be a GramianCache, which model.make_cache() makes; got "
            f"{type(given).__name__}."
        )
    return given


def check_past(cache: Any, mask: Any, inputs: tuple[Tensor | None, ...]) -> None:
    """Raise a ValueError if the mask hides tokens that the cache has seen.

    For example, `generate` writes such tokens after the end of a row while other rows continue. A
    state cannot forget them, so the next token would follow tokens that the mask hides.

    Args:
        cache: the argument that was passed as a cache.
        mask: (batch, columns of the past + length), 1 for real tokens. A mask of another shape is
            not checked. In a traced graph, no mask is checked.
        inputs: the possible inputs, (batch, length, …); the first that is not None is used.
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
    """A tensor of a filter: the place that holds it, and its value when a recurrence was made."""

    __slots__ = ("digest", "name", "place", "record", "trained")

    def __init__(self, place: dict[str, Any], name: str) -> None:
        self.place, self.name = place, name
        self.record, self.digest = Record(place[name]), digest(place[name])
        self.trained: bool = place[name].requires_grad

    def holds(self) -> bool:
        """Return whether the tensor has kept its value.

        If the place now holds another tensor, a digest of all its values is compared.
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
    return [
        _Source(place, name)
        for part in parts
        for place, name, tensor in own_tensors(part)
        if _is_here(tensor)
    ]


def _is_here(tensor: Tensor | None) -> TypeGuard[Tensor]:
    """Return whether a tensor is complete, neither offloaded nor sharded."""
    return tensor is not None and type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta


class GramianCacheLayer(LinearAttentionCacheLayerMixin):
    """The part of a cache for one layer: a recurrence, its state and the number of tokens seen.

    The linear-attention layer of transformers keeps a convolution state and a single tensor, does
    not count tokens and cannot repeat sequences. This layer counts tokens, and its state is a
    `State` of several tensors.
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
        """The state after the last update; None before the first update and after a reset."""
        return self.recurrent_states[0]

    @property
    def nbytes(self) -> int:
        """The bytes of the state."""
        return 0 if self.state is None else self.state.nbytes

    def recurrence_of(self, mixer: Mixer, length: int) -> MixerRecurrence:
        """Return the frozen recurrence of a mixer. If there is none yet, make it.

        With gradients disabled, the recurrence must agree with the present weights of the filters.
        If it does not, and the layer holds no state, as after `reset`, the recurrence is made
        again. If only one token follows, only trainable tensors are compared. Some changes go
        unnoticed: edits of single values through `.data` or numpy, the steps of a fused optimizer
        on a GPU, and changes of offloaded or sharded weights.

        Args:
            mixer: the mixer of the layer.
            length: number of tokens that the recurrence will process next.

        Raises:
            ValueError: if the layer holds a state, and either a filter has changed since the
                recurrence was made, or the cache belongs to another model.
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
        """Record that the layer holds a state from now on, and the device of that state."""
        leaves = tree_leaves(recurrent_states)  # scalars may be on another device
        self.device = next(leaf.device for leaf in leaves if leaf.ndim)
        self.is_recurrent_states_initialized[0] = True

    def update_recurrent_state(
        self, recurrent_states: Any, state_idx: int = 0, *, batch_size: int = -1, tokens: int = 0
    ) -> Any:
        """Replace the state by the state after `tokens` more tokens of `batch_size` sequences."""
        if not self.is_recurrent_states_initialized[0]:
            self.lazy_initialization(recurrent_states=recurrent_states)
        self.recurrent_states[0] = recurrent_states
        self.has_previous_state[0] = True
        self.batch_size = batch_size
        self.tokens += tokens
        return recurrent_states

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0) -> Tensor:
        """Raise a TypeError, because the mixer's state contains the past of short convolutions."""
        raise TypeError("a Gramian cache layer holds one recurrent state and no convolution state.")

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of a mask over all tokens seen and `query_length` new tokens."""
        return self.tokens + query_length, 0

    def reset(self) -> None:
        """Forget the sequences, but keep the recurrence."""
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
        """Keep the states of the beams that survive a step of beam search, in their new order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        if self.state is None:
            return
        self.recurrent_states[0] = self.state.repeat(repeats)
        self.batch_size *= repeats

    def __deepcopy__(self, memo: dict[int, Any]) -> GramianCacheLayer:
        """Return a copy that shares the recurrence and has its own copy of the state."""
        copied = copy.copy(self)
        copied.recurrent_states = {0: None if self.state is None else self.state.clone()}
        copied.is_recurrent_states_initialized = dict(self.is_recurrent_states_initialized)
        copied.has_previous_state = dict(self.has_previous_state)
        return copied

    def detach(self) -> None:
        """Detach the state from the autograd graph."""
        if self.state is not None:
            self.recurrent_states[0] = self.state.detach()

    def offload(self) -> None:
        """Move the state to the CPU."""
        if self.state is not None:
            self.recurrent_states[0] = self.state.to("cpu")

    def prefetch(self) -> None:
        """Move the state back to the device on which it was created."""
        if self.state is not None:
            self.recurrent_states[0] = self.state.to(self.device)

    @property
    def is_croppable(self) -> bool:
        """False, because a recurrence does not run backwards."""
        return False

    def activate_past_recording(self) -> None:
        """Raise a ValueError, because the cache keeps no earlier states."""
        raise ValueError("a Gramian cache cannot record its past: a recurrence keeps one state.")

    def crop(self, tokens_to_remove: int) -> None:
        """Raise a ValueError, because tokens cannot be removed from a state."""
        raise ValueError("a Gramian cache cannot be cropped: a recurrence keeps one state.")


class GramianCache(Cache):
    """The generation state of a Gramian model, which `forward` accepts as `past_key_values`.

    Args:
        config: the model's configuration.

    The size of the cache depends on the model and the batch, but not on the length of the text,
    except for the keys and values of attention.

    The recurrences are made at the first use, from the weights that the filters have at that time.
    `reset` keeps the recurrences for the next sequences, and they are made again only if the
    filters have changed. If the filters change while the cache holds a sequence, using the cache
    without gradients is an error. The cache shares all other weights with the model. If these
    change, the new weights process the next tokens, but the state of the past still comes from the
    old weights. The same is true of the keys and values of attention.
    """

    layers: list[GramianCacheLayer]

    last_hidden_state: Tensor | None
    """The output of the last norm at each row's last token, (batch, hidden_size).

    A row that has had no token yet has NaN here.
    """

    padding: Tensor | None
    """The number of columns so far that were padding, (batch), int64; None if no column was."""

    def __init__(self, config: GramianConfig) -> None:
        super().__init__(layers=[GramianCacheLayer() for _ in range(config.num_hidden_layers)])
        self.last_hidden_state: Tensor | None = None
        self.padding: Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens seen."""
        return self.layers[layer_idx].get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return length and offset of a mask over all tokens seen and `query_length` new tokens."""
        return self.layers[layer_idx].get_mask_sizes(query_length)

    def note(self, hidden_states: Tensor, segments: Segments | None) -> None:
        """Keep the hidden state of each row's last token, and count the padding.

        Args:
            hidden_states: (batch, length, hidden_size), the output for the newest columns.
            segments: the positions of the tokens in these columns; None if there is no padding.
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
        # A view of one column would keep the memory of all columns.
        self.last_hidden_state = last if hidden_states.shape[1] == 1 else last.clone()

    def unstarted(self) -> Tensor:
        """Return for every row whether it has had no token yet, (batch), boolean."""
        if self.padding is None:
            return torch.zeros(max(self.batch_size, 0), dtype=torch.bool)
        return self.padding >= self.get_seq_length()

    def detach(self) -> GramianCache:
        """Detach the states from the autograd graph, in place, and return the cache.

        Calling `detach` between chunks gives truncated backpropagation through time.
        """
        for layer in self.layers:
            layer.detach()
        if self.last_hidden_state is not None:
            self.last_hidden_state = self.last_hidden_state.detach()
        return self

    def reset(self) -> None:
        """Forget the sequences, but keep the recurrences."""
        super().reset()
        self.last_hidden_state = self.padding = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the states of the beams that survive a step of beam search, in their new order."""
        super().reorder_cache(beam_idx)
        _map_rows(self, lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices` (integers, or a boolean mask over the batch)."""
        super().batch_select_indices(indices)
        _map_rows(self, lambda rows: rows[indices.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        super().batch_repeat_interleave(repeats)
        _map_rows(self, lambda rows: rows.repeat_interleave(repeats, dim=0))

    def __deepcopy__(self, memo: dict[int, Any]) -> GramianCache:
        copied = copy.copy(self)
        copied.layers = copy.deepcopy(self.layers, memo)
        _map_rows(copied, Tensor.clone)
        return copied

    @property
    def is_linear(self) -> list[bool]:
        """False for every layer.

        `generate` must remove the tokens that the cache has seen from the sequence. It would not do
        so if the layers were declared linear.
        """
        return [False] * len(self.layers)

    @property
    def batch_size(self) -> int:
        """The number of sequences, or -1 while the cache is empty."""
        return self.layers[0].batch_size

    @property
    def nbytes(self) -> int:
        """The bytes of the states of all layers."""
        return sum(layer.nbytes for layer in self.layers)

    def save(self, path: str | Path, model: GramianPreTrainedModel) -> None:
        """Write the state to a file that `load` reads; see `gramian.models.snapshots`.

        Args:
            path: the file. It is written completely or not at all.
            model: the model that filled the cache. Its fingerprint is stored in the file.

        Raises:
            ValueError: if the cache is empty, or has another number of layers than the model.
        """
        save_cache(self, path, model)

    @classmethod
    def load(cls, path: str | Path, model: GramianPreTrainedModel) -> GramianCache:
        """Return the cache that `save` wrote, on the device of `model`.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if the file holds no cache, or the cache of a model with other weights.
        """
        return load_cache(path, model)


def _map_rows(cache: GramianCache, function: Callable[[Tensor], Tensor]) -> None:
    """Apply a function to the tensors of a cache that have one row for each sequence."""
    if cache.last_hidden_state is not None:
        cache.last_hidden_state = function(cache.last_hidden_state)
    if cache.padding is not None:
        cache.padding = function(cache.padding)
