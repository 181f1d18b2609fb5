"""Define the interface of a model's blocks, and register their kinds.

The method `mix` of a block calls the mixer and computes everything around it, such as norms and
residual connections. Forward passes with and without a cache, exported programs, sharding and the
checks of `GramianConfig` all use the class of the block. So a new kind needs no change elsewhere:

    @register_block("post_norm")
    class PostNormBlock(GramianLayer):
        def __init__(self, config, layer):
            super().__init__(layer)
            self.mixer = build_mixer(config, layer)
            self.norm = make_norm(config.norm, config.hidden_size, config.rms_norm_eps)

        def mix(self, hidden_states, call):
            return apply_norm(self.norm, hidden_states + call(hidden_states))
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from gramian._registry import registering
from gramian.mixers import Mixer, MixerCall, Segments
from gramian.models.norms import NORMS

if TYPE_CHECKING:
    from gramian.models.cache import GramianCache, GramianCacheLayer

__all__ = ["BLOCKS", "GramianLayer", "register_block"]

BLOCKS: dict[str, type[GramianLayer]] = {}
"""The kinds of blocks by their names in `GramianConfig.block`."""

_BlockType = TypeVar("_BlockType", bound="type[GramianLayer]")


class GramianLayer(GradientCheckpointingLayer, abc.ABC):
    """The base class of blocks. A block is one layer of a model, with a mixer inside.

    A model builds a block as `kind(config, layer)`. The subclass makes its mixer with
    `gramian.models.build_mixer(config, layer)`, and `register_block` registers the subclass.

    Args:
        layer: index of the layer in the model and in a cache.
    """

    kind: ClassVar[str]
    """The name under which the class is registered."""

    norms: ClassVar[tuple[str, ...]] = NORMS
    """The values of `GramianConfig.norm` that this kind of block accepts."""

    options: ClassVar[tuple[str, ...]] = ()
    """The fields of `GramianConfig` that are accepted only with kinds of blocks that list them."""

    mixer: Mixer

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    @abc.abstractmethod
    def mix(self, hidden_states: Tensor, call: MixerCall) -> Tensor:
        """Call the mixer, and apply the norms, residual connections and other layers around it.

        Args:
            hidden_states: (batch, length, hidden_size).
            call: the function that runs the mixer. `mix` must call it once. The function may
                process whole sequences, continue from a state, or be part of a traced program.

        Returns:
            (batch, length, hidden_size).
        """

    @classmethod
    def default_final_norm(cls, norm: str) -> str:
        """Return the name of the norm after the last block if `GramianConfig.final_norm` is None.

        Args:
            norm: the value of `GramianConfig.norm`.
        """
        return "rms"

    def forward(
        self,
        hidden_states: Tensor,
        mask: Segments | None = None,
        past_key_values: GramianCache | None = None,
    ) -> Tensor:
        """Apply the block to hidden states.

        Args:
            hidden_states: (batch, length, hidden_size).
            mask: the positions of tokens and sequences; None if there is no padding.
            past_key_values: the cache to continue from. It is updated in place.

        Returns:
            (batch, length, hidden_size).
        """
        mixer = self.mixer
        if past_key_values is None:
            return self.mix(hidden_states, MixerCall(lambda x: mixer(x, mask=mask), mask))
        memory = past_key_values.layers[self.layer]
        call = MixerCall(lambda x: _mix_on(mixer, x, mask, memory), mask, carries_state=True)
        return self.mix(hidden_states, call)


def register_block(kind: str) -> Callable[[_BlockType], _BlockType]:
    """Return a class decorator that registers a block under the name `kind` for `GramianConfig`.

    Raises:
        ValueError: if another class is registered under that name.
    """
    return registering(BLOCKS, kind, "kind", "block")


def _mix_on(mixer: Mixer, x: Tensor, mask: Segments | None, memory: GramianCacheLayer) -> Tensor:
    """Apply a mixer to x (batch, length, hidden_size), and replace the state in `memory`."""
    batch, length = x.shape[:2]
    recurrence = memory.recurrence_of(mixer, length)
    if torch.is_grad_enabled():  # through a frozen snapshot, no gradient would reach the filters
        state = memory.state
        if state is None:
            state = recurrence.initial_state(batch, dtype=x.dtype, device=x.device)
        mixed, state = mixer(x, state, mask=mask)
    elif length == 1 and mask is None:
        state = memory.state
        if state is None:
            state = recurrence.initial_state(batch, dtype=x.dtype, device=x.device)
        mixed, state = recurrence.step(x[:, 0], state)
        mixed = mixed[:, None]
    else:
        mixed, state = recurrence.prefill(x, memory.state, mask=mask)
    memory.update_recurrent_state(state, batch_size=batch, tokens=length)
    return mixed
