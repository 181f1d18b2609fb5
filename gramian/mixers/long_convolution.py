"""A filter and nothing else, in one direction or in both."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gramian.filters import Filter
from gramian.mixers._mixer import Mixer, apply_mask, check_probability
from gramian.ops import bidirectional_convolution, causal_convolution
from gramian.systems import Recurrence, State, System

__all__ = ["LongConvolution", "LongConvolutionState"]


class _Fields(NamedTuple):
    long: State


class LongConvolutionState(_Fields, State):
    """The state of the filter's system."""

    __slots__ = ()


class LongConvolution(Mixer):
    """Every channel of the input convolved with its filter, forward or in both directions.

    ``y_t = Σ_{j≥0} h_j u_{t-j}``; bidirectional, ``+ Σ_{j≥0} g_j u_{t+1+j}``: tap j of the backward
    kernel acts at lag -(j + 1), so that the present enters once, through h_0.

    Args:
        filter: One channel for each of the input's; bidirectional, two: those of h, then those
            of g.
        bidirectional: Whether the output also looks ahead. Such a layer is no recurrence: it takes
            whole sequences only.
        kernel_dropout: Probability of dropping a tap in training.

    Raises:
        TypeError: if ``filter`` is not a filter.
        ValueError: if a bidirectional layer's filter has an odd number of channels, or
            ``kernel_dropout`` is no probability below 1; and, when a bidirectional layer is asked
            for a recurrence or given a state, since it has none.
    """

    filter: Filter

    def __init__(
        self, filter: Filter, bidirectional: bool = False, kernel_dropout: float = 0.0
    ) -> None:
        super().__init__()
        if not isinstance(filter, Filter):
            raise TypeError(f"a Filter is needed, got {type(filter).__name__}.")
        if bidirectional and filter.channels % 2:
            raise ValueError(
                "a bidirectional layer takes a filter of two channels for each of its own, got "
                f"{filter.channels} channels."
            )
        self.filter = filter
        self.bidirectional = bidirectional
        self.kernel_dropout = check_probability("kernel_dropout", kernel_dropout)
        self.width = filter.channels // 2 if bidirectional else filter.channels

    @property
    def _long_shape(self) -> tuple[int, ...]:
        return (self.width,)

    def _systems(self, length: int | None = None) -> tuple[System, ...]:
        if self.bidirectional:
            raise ValueError(
                "a bidirectional layer looks at the whole sequence: it has no recurrence and "
                "carries no state."
            )
        return (self.filter(length),)

    def _filters(self, length: int) -> tuple[System, ...]:
        return (self.filter(length),)

    def _parallel(self, x: Tensor, mask: Tensor | None, systems: tuple[System, ...]) -> Tensor:
        kernel = self._kernel(systems[0], x)
        x = apply_mask(x, mask)
        if not self.bidirectional:  # a slice of everything is not free: its gradient is copied
            return causal_convolution(x, kernel, dim=-2)
        past, future = kernel.unflatten(0, (2, self.width)).unbind(0)
        return bidirectional_convolution(x, past, future, dim=-2)

    def _operator(self, x: Tensor, channels: slice, mask: Tensor | None) -> System:
        return self._systems(x.shape[1])[0][channels]

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

    def _step(
        self, x_t: Tensor, state: State, long: tuple[Recurrence, ...]
    ) -> tuple[Tensor, State]:
        return self._fused(x_t, state, long)

    def _inner(self, z: Tensor, state: State, long: tuple[Recurrence, ...]) -> tuple[Tensor, State]:
        assert isinstance(state, LongConvolutionState)
        y, inner = long[0].step(z, state.long)
        return y, LongConvolutionState(inner)

    def extra_repr(self) -> str:
        return f"bidirectional={self.bidirectional}, kernel_dropout={self.kernel_dropout}"
