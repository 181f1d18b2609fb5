"""The interface of a model's blocks, and the registry of their kinds.

The method `mix` of a block applies everything around its mixer. Forward passes with and without a
cache, exported programs, sharding and the checks of `GramianConfig` all use the block's class, so a
new kind needs no change elsewhere:

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

from gramian.mixers import Mixer, MixerCall, Segments
from gramian.models.norms import NORMS

if TYPE_CHECKING:
    from gramian.models.cache import GramianCache, GramianCacheLayer

__all__ = ["BLOCKS", "GramianLayer", "register_block"]

BLOCKS: dict[str, type[GramianLayer]] = {}
"""The kinds of blocks by their names in `GramianConfig.block`."""

_BlockType = TypeVar("_BlockType", bound="type[GramianLayer]")


class GramianLayer(GradientCheckpointingLayer, abc.ABC):
    """The base class of blocks: one layer of a model, a mixer and everything around it.

    A subclass is built as `kind(config, layer)`, makes its mixer with
    `gramian.models.build_mixer(config, layer)`, and is registered with `register_block`.

    Args:
        layer: number of the layer, which selects its part of a cache.
    """

    kind: ClassVar[str]
    """The name under which the class is registered."""

    norms: ClassVar[tuple[str, ...]] = NORMS
    """The accepted values of `GramianConfig.norm`."""

    options: ClassVar[tuple[str, ...]] = ()
    """Fields of `GramianConfig` that are refused with other kinds of blocks."""

    mixer: Mixer

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    @abc.abstractmethod
    def mix(self, hidden_states: Tensor, call: MixerCall) -> Tensor:
        """Apply norms, residual connections and whatever else surrounds the mixer.

        Args:
            hidden_states: (batch, length, hidden_size).
            call: the mixer, to be called once. It may run on whole sequences, from a state, or in
                a traced program.

        Returns:
            (batch, length, hidden_size).
        """

    @classmethod
    def default_final_norm(cls, norm: str) -> str:
        """Return the norm after the last block if `GramianConfig.final_norm` is None.

        Args:
            norm: `GramianConfig.norm`.
        """
        return "rms"

    def forward(
        self,
        hidden_states: Tensor,
        mask: Segments | None = None,
        past_key_values: GramianCache | None = None,
    ) -> Tensor:
        """Map (batch, length, hidden_size) to the same; a cache, if given, is updated."""
        mixer = self.mixer
        if past_key_values is None:
            return self.mix(hidden_states, MixerCall(lambda x: mixer(x, mask=mask), mask))
        memory = past_key_values.layers[self.layer]
        call = MixerCall(lambda x: _mix_on(mixer, x, mask, memory), mask, carries_state=True)
        return self.mix(hidden_states, call)


def register_block(kind: str) -> Callable[[_BlockType], _BlockType]:
    """Return a class decorator that registers a block for `GramianConfig` as `block=kind`.

    Raises:
        ValueError: if another class has that name.
    """

    def add(cls: _BlockType) -> _BlockType:
        if BLOCKS.get(kind, cls) is not cls:
            raise ValueError(f"the block {kind!r} is already registered.")
        cls.kind = kind
        BLOCKS[kind] = cls
        return cls

    return add


def _mix_on(mixer: Mixer, x: Tensor, mask: Segments | None, memory: GramianCacheLayer) -> Tensor:
    """Apply `mixer` to (batch, length, hidden_size) from the state in `memory`."""
    batch, length = x.shape[:2]
    recurrence = memory.recurrence_of(mixer, length)
    if torch.is_grad_enabled():  # a frozen snapshot would cut the filters off from the loss
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
