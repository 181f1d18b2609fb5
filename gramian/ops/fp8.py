r"""Linear maps in 8-bit floating point, emulated on any device.

A map computes `y = q(a x) q(b W)ᵀ / (a b) + bias`, where q clamps numbers to ±448 and rounds them
to `float8_e4m3fn` (4 bits of exponent, 3 of mantissa; Micikevicius et al. 2022). Products and sums
are computed in float32, whereas the matrix units of a GPU may add with fewer bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gramian.ops.packed import Linear
from gramian.ops.precision import full_precision

__all__ = ["FP8Linear", "quantize_fp8"]

_LARGEST = 448.0  # the largest number of float8_e4m3fn


class _Quantize(torch.autograd.Function):
    """Clamp and round to float8, with the derivative of the clamp only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:
        return _round(x, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        x, scale = inputs
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((x.float() * scale).abs() <= _LARGEST)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None


def _round(x: Tensor, scale: float) -> Tensor:
    scaled = (x.float() * scale).clamp(-_LARGEST, _LARGEST)
    return scaled.to(torch.float8_e4m3fn).float() / scale


def quantize_fp8(x: Tensor, scale: float) -> Tensor:
    """Round `scale x` to float8_e4m3fn, clamped to ±448, and divide by `scale` again.

    The derivative passes through the rounding, and is zero where values were clamped. Only reverse
    mode is implemented.

    Args:
        x: A real floating-point tensor of any shape.
        scale: A positive number by which values are multiplied before they are rounded.

    Returns:
        A float32 tensor of the shape of `x`. NaN stays NaN.

    Raises:
        ValueError: if `scale` is not a positive normal number of float32.
    """
    if not _is_scale(scale):
        raise ValueError(f"scale must be a positive normal number of float32; got {scale!r}.")
    quantize: Any = _Quantize.apply
    result: Tensor = quantize(x, scale)
    return result


def _is_scale(scale: Any) -> bool:
    """Return whether numbers can be multiplied and divided by `scale` in float32."""
    limits = torch.finfo(torch.float32)
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    return number and limits.tiny <= scale <= limits.max


class FP8Linear(Linear):
    """An `nn.Linear` that rounds its input and its weight to float8 before it multiplies them.

    The parameters keep their dtype, so the layer can be trained. `quantize_fp8` describes the
    derivatives.

    Args:
        in_features: The size of the input.
        out_features: The size of the output.
        scales: Two factors: a for the input and b for the weight.
        bias: Whether there is a bias, which is not rounded.

    Raises:
        ValueError: if `scales` are not two positive normal numbers of float32.
    """

    def __init__(
        self, in_features: int, out_features: int, scales: Sequence[float], bias: bool = True
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        found = tuple(scales) if isinstance(scales, Sequence) else (scales,)
        if len(found) != 2 or not all(_is_scale(scale) for scale in found):
            raise ValueError(
                "the scales of an FP8 linear map are two positive normal numbers of float32, of "
                f"the input and of the weight; got {scales!r}."
            )
        self.scales = (float(found[0]), float(found[1]))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.scales
        with full_precision():
            bias = None if self.bias is None else self.bias.float()
            y = torch.nn.functional.linear(quantize_fp8(x, a), quantize_fp8(self.weight, b), bias)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scales={self.scales}"
