"""A filter and nothing else."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gramian.filters import Filter
from gramian.mixers._mixer import Mixer, apply_mask
from gramian.ops import causal_convolution
from gramian.systems import State, System

__all__ = ["LongConvolution", "LongConvolutionState"]


class _Fields(NamedTuple):
    long: State


class LongConvolutionState(_Fields, State):
    """The state of the filter's system."""

    __slots__ = ()


class LongConvolution(Mixer):
    """Every channel of the input convolved with its filter.

    Args:
        filter: One channel for each of the input's.
    """

    def __init__(self, filter: Filter) -> None:
        super().__init__()
        if not isinstance(filter, Filter):
            raise TypeError(f"a Filter is needed, got {type(filter).__name__}.")
        self.filter = filter
        self.width = filter.channels

    @property
    def _long_shape(self) -> tuple[int, ...]:
        return (self.width,)

    def _systems(self, length: int | None = None) -> tuple[System, ...]:
        return (self.filter(length),)

    def _parallel(self, x: Tensor, mask: Tensor | None) -> Tensor:
        (system,) = self._systems(x.shape[1])
        return causal_convolution(apply_mask(x, mask), system.kernel_for(x, x.shape[1]), dim=-2)

    def _make_state(
        self, batch: int, long: tuple[State, ...], dtype: torch.dtype, device: torch.device
    ) -> State:
        return LongConvolutionState(*long)

    def _chunk(
        self, x: Tensor, state: State, mask: Tensor | None, operators: tuple[Any, ...]
    ) -> tuple[Tensor, State]:
        assert isinstance(state, LongConvolutionState)
        y, long = operators[0](apply_mask(x, mask).mT, state.long)
        return y.mT, LongConvolutionState(long)

    def _step(self, x_t: Tensor, state: State, steps: tuple[Any, ...]) -> tuple[Tensor, State]:
        assert isinstance(state, LongConvolutionState)
        y, long = steps[0](x_t, state.long)
        return y, LongConvolutionState(long)
