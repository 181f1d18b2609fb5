"""Define a mixer that only convolves with a filter, in one direction or in both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gramian._checks import check_probability
from gramian.filters import Filter, build
from gramian.mixers.convolution_mixer import ConvolutionMixer
from gramian.mixers.mixer import apply_mask
from gramian.mixers.registry import register
from gramian.ops import bidirectional_convolution, causal_convolution
from gramian.systems import Recurrence, State, System

__all__ = ["LongConvolution", "LongConvolutionState"]


class _Fields(NamedTuple):
    long: State


class LongConvolutionState(_Fields, State):
    """The state of a `LongConvolution`, whose only field is the state of the filter's system."""

    __slots__ = ()


@register("long_convolution")
class LongConvolution(ConvolutionMixer):
    """A convolution of every input channel with its own filter, forward or in both directions.

    The output is `y_t = Σ_{j≥0} h_j u_{t-j}`. A bidirectional layer adds `Σ_{j≥0} g_j u_{t+1+j}`:
    tap j of the backward kernel g acts at lag -(j + 1), so the present input enters once, through
    h_0.

    Args:
        filter: A filter, or its configuration. It has one channel for each input channel. The
            filter of a bidirectional layer has two channels for each input channel: first all
            channels of h, then all channels of g.
        bidirectional: Whether the output also depends on later inputs. Such a layer has no
            recurrence and accepts whole sequences only.
        kernel_dropout: Probability of dropping a tap in training.
        width: Channels of input and output. By default, the filter determines them.
        max_length: The filter's `max_length`, if its configuration does not give it.

    Raises:
        TypeError: if `filter` is neither a filter nor a configuration.
        ValueError: if a bidirectional layer's filter has an odd number of channels, or if
            `kernel_dropout` is not a probability below 1. Bidirectional layers have neither a
            recurrence nor a state, so they also raise it if they are asked for a recurrence or
            called with a state.
    """

    def __init__(
        self,
        filter: dict[str, Any] | Filter,
        bidirectional: bool = False,
        kernel_dropout: float = 0.0,
        *,
        width: int | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(filter, Filter | Mapping):
            raise TypeError(f"a Filter is needed; got {type(filter).__name__}.")
        channels = None if width is None else 2 * width if bidirectional else width
        defaults = {"channels": channels, "max_length": max_length}
        given = {name: value for name, value in defaults.items() if value is not None}
        filter = build(filter, **given)
        if bidirectional and filter.channels % 2:
            raise ValueError(
                "a bidirectional layer takes a filter of two channels for each of its own; got "
                f"{filter.channels} channels."
            )
        self.filter = filter
        self.bidirectional = bidirectional
        self.kernel_dropout = check_probability("kernel_dropout", kernel_dropout)
        self.width = filter.channels // 2 if bidirectional else filter.channels

    @property
    def causal(self) -> bool:
        return not self.bidirectional

    def config(self) -> dict[str, Any]:
        return super().config() | {"bidirectional": self.bidirectional}

    @property
    def streams(self) -> tuple[int, ...]:
        return (self.width,)

    def systems(self, length: int | None = None) -> tuple[System, ...]:
        return (self.filter(length),)

    def convolve_whole(self, x: Tensor, mask: Tensor | None, systems: tuple[System, ...]) -> Tensor:
        kernel = self.kernel(systems[0], x)
        x = apply_mask(x, mask)
        if not self.bidirectional:  # a slice of all channels would cost a copy of its gradient
            return causal_convolution(x, kernel, dim=-2)
        past, future = kernel.unflatten(0, (2, self.width)).unbind(0)
        return bidirectional_convolution(x, past, future, dim=-2)

    def make_operator(self, x: Tensor, channels: slice, mask: Tensor | None) -> System:
        return self.filter(x.shape[1])[channels]

    def join_state(
        self, batch: int, long: tuple[State, ...], dtype: torch.dtype, device: torch.device
    ) -> State:
        return LongConvolutionState(*long)

    def convolve_chunk(
        self, x: Tensor, state: State, mask: Tensor | None, operators: tuple[Any, ...]
    ) -> tuple[Tensor, State]:
        assert isinstance(state, LongConvolutionState)
        y, long = operators[0](apply_mask(x, mask).mT, state.long)
        return y.mT, LongConvolutionState(long)

    def convolve_token(
        self, x_t: Tensor, state: State, long: tuple[Recurrence, ...]
    ) -> tuple[Tensor, State]:
        return self.fused(x_t, state, long)

    def inner(self, z: Tensor, state: State, long: tuple[Recurrence, ...]) -> tuple[Tensor, State]:
        assert isinstance(state, LongConvolutionState)
        y, inner = long[0].step(z, state.long)
        return y, LongConvolutionState(inner)

    def extra_repr(self) -> str:
        return f"bidirectional={self.bidirectional}, kernel_dropout={self.kernel_dropout}"
