r"""Hyena: long convolutions interleaved with gates.

Projections and a short convolution compute `x^0, …, x^{N-1}, v` from the input. Then
`v ← h^n * (x^n v)` for n from N - 1 down to 1, and `y = x^0 v` (Hyena, Poli et al. 2023, definition
3.1; order N ≥ 2).

In half precision, everything between the first product and the last gate is float32, since v may
exceed 65,504, the largest number of float16, before the next gate brings it back into range.

Hyena-RTF (Parnichkun et al. 2024, section 4.3) applies `gelu(W norm(y))` to y before the output
projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gramian._checks import check_probability
from gramian.filters import Filter, build
from gramian.mixers.convolution_mixer import ConvolutionMixer, for_products, has_small_state
from gramian.mixers.mixer import apply_mask
from gramian.mixers.registry import register
from gramian.mixers.short_convolution import ShortConvolution
from gramian.ops import causal_convolution
from gramian.ops.fp8 import FP8Linear
from gramian.ops.kernels import runs_in_triton
from gramian.ops.kernels.hyena_step import hyena_step
from gramian.ops.packed import Linear
from gramian.systems import (
    DenseOperator,
    ModalRecurrence,
    ModalState,
    Recurrence,
    State,
    System,
    gated_convolution,
    working_dtype,
)

__all__ = ["Hyena", "HyenaState"]

_MIMO_NORM_EPS = 1e-6


class _Fields(NamedTuple):
    short: Tensor
    long: tuple[State, ...]


class HyenaState(_Fields, State):
    """The past of the short convolution and the states of the long convolutions.

    `short` has the last inputs of the short convolution, (batch, taps - 1, (order + 1) width).
    `long` has one state for each long convolution.
    """

    __slots__ = ()


@register("hyena")
class Hyena(ConvolutionMixer):
    """The Hyena operator of any order.

    Args:
        width: Channels of input and output.
        filter: A filter of `(order - 1) width` channels, or its configuration. The filter's channel
            `c (order - 1) + n` belongs to gate n of channel c of the mixer, as in the published
            code.
        max_length: The filter's `max_length`, if its configuration does not give it.
        order: N ≥ 2. There are N - 1 long convolutions.
        short_kernel: Taps of the short convolution.
        kernel_dropout: Probability of dropping a tap of the long convolutions in training.
        mimo_size: Width of Hyena-RTF's map across channels after the last gate, `gelu(W norm(y))`
            with an RMS norm; by default there is no such map.
        bias: Whether the input projection has a bias.
        short_bias: Whether the short convolution has a bias; by default equal to `bias`.
        out_bias: Whether the output projection has a bias; by default equal to `bias`.
        fp8_scales: Factors for the input and for the weight of the input projection. With these
            factors, the projection is computed in 8-bit floating point (`gramian.ops.fp8`), as the
            published Evo 2 models of 1, 20 and 40 billion parameters require. By default, it is
            computed without 8-bit numbers.
        input_dropout: Probability of dropping an element of the input of a long convolution, a
            product of gate and value, in training. It is the `dropout` of the published layer.

    Raises:
        ValueError: if the order is below 2, if a dropout is not a probability below 1, if
            `mimo_size` is below 1, if `fp8_scales` are not two positive numbers, or if the filter
            does not fit.
    """

    def __init__(
        self,
        width: int,
        filter: dict[str, Any] | Filter,
        max_length: int | None = None,
        order: int = 2,
        short_kernel: int = 3,
        kernel_dropout: float = 0.0,
        mimo_size: int | None = None,
        bias: bool = True,
        short_bias: bool | None = None,
        out_bias: bool | None = None,
        fp8_scales: Sequence[float] | None = None,
        input_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if order < 2:
            raise ValueError(f"the order of a Hyena must be at least 2; got {order}.")
        if mimo_size is not None and mimo_size < 1:
            raise ValueError(f"mimo_size must be at least 1 or None; got {mimo_size}.")
        defaults = {} if max_length is None else {"max_length": max_length}
        self.width = width
        self.order = order
        self.kernel_dropout = check_probability("kernel_dropout", kernel_dropout)
        self.input_dropout = check_probability("input_dropout", input_dropout)
        inner = (order + 1) * width
        self.in_proj: Linear = (
            Linear(width, inner, bias=bias)
            if fp8_scales is None
            else FP8Linear(width, inner, fp8_scales, bias=bias)
        )
        short_bias = bias if short_bias is None else short_bias
        self.short = ShortConvolution(inner, short_kernel, bias=short_bias)
        self.filter = build(filter, channels=(order - 1) * width, **defaults)
        if mimo_size is None:
            self.mimo = None
        else:
            norm = nn.RMSNorm(width, eps=_MIMO_NORM_EPS)
            self.mimo = nn.Sequential(norm, Linear(width, mimo_size), nn.GELU())
        self.mimo_size = mimo_size
        self.out_proj = Linear(
            width if mimo_size is None else mimo_size,
            width,
            bias=bias if out_bias is None else out_bias,
        )

    def config(self) -> dict[str, Any]:
        scales = self.in_proj.scales if isinstance(self.in_proj, FP8Linear) else None
        own = {
            "order": self.order,
            "short_kernel": self.short.taps,
            "input_dropout": self.input_dropout,
            "mimo_size": self.mimo_size,
            "bias": self.in_proj.bias is not None,
            "short_bias": self.short.bias is not None,
            "out_bias": self.out_proj.bias is not None,
            "fp8_scales": scales and list(scales),
        }
        return super().config() | own

    @property
    def streams(self) -> tuple[int, ...]:
        return (self.width,)

    def systems(self, length: int | None = None) -> tuple[System, ...]:
        system = self.filter(length)
        count = self.order - 1
        return tuple(system[n::count] for n in range(count))

    def project(
        self, x: Tensor, mask: Tensor | None, past: Tensor | None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Apply the input projection and the short convolution.

        Args:
            x: (batch, length, width).
            mask: (batch, length), false for padding. None if there is no padding.
            past: The short convolution's last inputs. None means zeros.

        Returns:
            The gates, the value, and the short convolution's new past. The gate that is applied
            last comes first. Each gate and the value are (batch, length, width).
        """
        z, past = self.short(apply_mask(self.in_proj(x), mask), past, mask)
        *gates, value = z.split(self.width, dim=-1)
        return gates, value, past

    def convolve_whole(self, x: Tensor, mask: Tensor | None, systems: tuple[System, ...]) -> Tensor:
        (last, *gates), value, _ = self.project(x, mask, None)
        value = for_products(value)
        for n, (gate, system) in enumerate(zip(reversed(gates), systems, strict=True)):
            value = causal_convolution(
                self._drop(apply_mask(gate * value, mask)),
                self.kernel(system, value),
                gate=last if n == len(gates) - 1 else None,
                dim=-2,
            )
        return self.finish(value.to(last.dtype))

    def _drop(self, inputs: Tensor) -> Tensor:
        if self.training and self.input_dropout > 0:
            return nn.functional.dropout(inputs, self.input_dropout)
        return inputs

    def make_operator(self, x: Tensor, channels: slice, mask: Tensor | None) -> System:
        length = x.shape[1]
        (_, *gates), _, _ = self.project(x, mask, None)
        dtype = working_dtype(x)
        inner = [apply_mask(gate, mask).mT[:, channels].to(dtype) for gate in reversed(gates)]
        systems = [system[channels] for system in self.systems(length)]
        if len(systems) == 1 and has_small_state(systems[0], length):
            return gated_convolution(systems[0], torch.ones_like(inner[0]), inner[0])
        matrix: Tensor | None = None
        for gate, system in zip(inner, systems, strict=True):  # gates (batch, channels, length)
            factor = system.matrix(length).to(dtype) * gate.unsqueeze(-2)
            if matrix is not None:
                with torch.autocast(x.device.type, enabled=False):
                    factor = factor @ matrix
            matrix = factor
        assert matrix is not None
        return DenseOperator(matrix)

    def finish(self, y: Tensor) -> Tensor:
        """Apply the maps that follow the last gate to y (…, width)."""
        return self.out_proj(y if self.mimo is None else self.mimo(y))

    def join_state(
        self, batch: int, long: tuple[State, ...], dtype: torch.dtype, device: torch.device
    ) -> State:
        shape = (batch, self.short.taps - 1, (self.order + 1) * self.width)
        return HyenaState(torch.zeros(shape, dtype=dtype, device=device), long)

    def convolve_chunk(
        self, x: Tensor, state: State, mask: Tensor | None, operators: tuple[Any, ...]
    ) -> tuple[Tensor, State]:
        assert isinstance(state, HyenaState)
        (last, *gates), value, past = self.project(x, mask, state.short)
        long = []
        value = value.to(working_dtype(value))
        for gate, operator, inner in zip(reversed(gates), operators, state.long, strict=True):
            y, inner = operator(apply_mask(gate * value, mask).mT, inner)
            value = y.mT
            long.append(inner)
        y = (last * value).to(last.dtype)
        return self.finish(y), HyenaState(past, tuple(long))

    def convolve_token(
        self, x_t: Tensor, state: State, long: tuple[Recurrence, ...]
    ) -> tuple[Tensor, State]:
        z = self.in_proj(x_t)
        if runs_in_triton(z):
            stepped = self._step_in_triton(z, state, long)
            if stepped is not None:
                return self.finish(stepped[0]), stepped[1]
        y, state = self.fused(z, state, long)
        return self.finish(y), state

    def _step_in_triton(
        self, z: Tensor, state: State, long: tuple[Recurrence, ...]
    ) -> tuple[Tensor, State] | None:
        """Run `inner` as one kernel, or return None if the kernel does not cover this layer."""
        assert isinstance(state, HyenaState)
        weight, bias = self.short.weight, self.short.bias
        if len(long) != 1 or not isinstance(long[0], ModalRecurrence):
            return None
        planes = long[0].planes
        if planes is None or bias is None or {weight.device, state.short.device} != {z.device}:
            return None
        inner = state.long[0]
        assert isinstance(inner, ModalState)
        past, modes = state.short.to(z.dtype).contiguous(), inner.modes[0].contiguous()
        y = hyena_step(z, past, weight, bias, modes, *planes)
        return y, HyenaState(past, (ModalState((modes,)),))

    def inner(self, z: Tensor, state: State, long: tuple[Recurrence, ...]) -> tuple[Tensor, State]:
        assert isinstance(state, HyenaState)
        z, past = self.short.step(z, state.short)
        last, *gates, value = z.split(self.width, dim=-1)
        states = []
        value = value.to(working_dtype(value))
        for gate, recurrence, inner in zip(reversed(gates), long, state.long, strict=True):
            value, inner = recurrence.step(gate * value, inner)
            states.append(inner)
        return (last * value).to(last.dtype), HyenaState(past, tuple(states))
