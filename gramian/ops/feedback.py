r"""The closed loop of causal kernels with feedback, computed by FFT.

With `y = k_yu ∗ u - k_yv ∗ v` and `v = k_vu ∗ u - k_vv ∗ v`, where all kernels start at lag 1, the
closed loop from u to y is the power series in z⁻¹

    K = K_yu - K_yv K_vu / (1 + K_vv).

The first L taps of K depend only on the first L taps of the four kernels (this is the Woodbury
identity for power series). The quotient is evaluated at N roots of unity, in double precision. Taps
are damped by `ρ^t`. So taps from N on alias onto the first taps with a factor of only `ρ^N`, but
rounding errors grow by `ρ^{-L}`. With N = L and `ρ^N = 1e-8`, both errors stay below single
precision. With N = 2L and `ρ^N = 1e-11`, both are three digits smaller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import register_fake, register_vmap

from gramian.ops._blocks import Task, cut
from gramian.ops._operator import batch_first, differentiable, operator
from gramian.ops.derivatives import records_derivatives
from gramian.ops.lengths import fft_length

__all__ = ["feedback_kernel"]

# The number of elements in one block on a CPU.
_CPU_NUMBERS = 2**20


def feedback_kernel(taps: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Compute the closed loop `k_yu - k_yv ∗ k_vu ∗ (δ + k_vv)^{-1}` at the lags of the taps.

    The computation is in double precision, and the result is differentiable to any order. The loop
    must be stable: `1 + K_vv` must not have zeros on or outside the unit circle.

    Args:
        taps: (*C, 4, L), real: k_yu, k_yv, k_vu and k_vv, each at the lags 1 … L.
        dtype: The dtype of the result, by default that of `taps`. A float64 result is correct to
            about 1e-11, any other to 1e-8.

    Returns:
        (*C, L): the closed loop at the lags 1 … L.
    """
    length, dtype = taps.shape[-1], dtype or taps.dtype
    flat = taps.double().reshape(-1, 4, length)
    return (
        _feedback_kernel(flat, dtype == torch.float64).reshape(*taps.shape[:-2], length).to(dtype)
    )


class _Circle(NamedTuple):
    """The points z = `e^{2πik/N} / ρ` at which the series are evaluated."""

    points: int
    """The number of points, N."""
    damping: Tensor
    """(L): the factors `ρ^t` of the taps."""
    z: Tensor
    """(N // 2 + 1), complex: the points on the upper half circle."""


def _circle(taps: Tensor, precise: bool) -> _Circle:
    length = taps.shape[-1]
    points, aliasing = fft_length(length, length if precise else 1), 1e-11 if precise else 1e-8
    like: dict[str, Any] = {"dtype": taps.dtype, "device": taps.device}
    decay = math.log(aliasing) / points  # log ρ
    angle = 2 * math.pi / points * torch.arange(points // 2 + 1, **like)
    z = torch.polar(torch.full_like(angle, math.exp(-decay)), angle)
    return _Circle(points, torch.exp(decay * torch.arange(length, **like)), z)


def _spectra(taps: Tensor, circle: _Circle) -> tuple[Tensor, Tensor, Tensor]:
    """Return the spectra of k_yv, k_vu / (z + k_vv), 1 / (z + k_vv), with lag 1 moved to lag 0."""
    damped = taps[..., 1:, :] * circle.damping
    out, into, loop = torch.fft.rfft(damped, n=circle.points).unbind(-2)
    inverse = 1 / (circle.z + loop)
    return out, into * inverse, inverse


def _close(taps: Tensor, circle: _Circle) -> Tensor:
    out, into, _ = _spectra(taps, circle)
    answer = torch.fft.irfft(out * into, n=circle.points)[..., : taps.shape[-1]]
    return taps[..., 0, :] - answer / circle.damping


def _gradient(g: Tensor, taps: Tensor, circle: _Circle) -> Tensor:
    """Return the gradient of the taps (…, 4, L), given g (…, L), the gradient of the loop."""
    out, into, inverse = _spectra(taps, circle)
    incoming = torch.fft.rfft(g / circle.damping, n=circle.points)
    # conj_physical, because PyTorch ignores a lazy conj in the first call of a compiled function
    of_out = -incoming * into.conj_physical()
    of_into = -incoming * (out * inverse).conj_physical()
    of_loop = -of_into * into.conj_physical()
    gradients = torch.fft.irfft(torch.stack([of_out, of_into, of_loop], dim=-2), n=circle.points)
    gradients = gradients[..., : taps.shape[-1]] * circle.damping
    return torch.cat([g.unsqueeze(-2), gradients], dim=-2)


def _tasks(rows: Tensor) -> list[Task]:
    return cut(rows, rows[..., :1], 12 * rows.shape[-1], _CPU_NUMBERS, 1)[1]


@operator("feedback_kernel")
def _feedback_kernel(taps: Tensor, precise: bool) -> Tensor:
    """Compute the closed loops (C, L) of taps (C, 4, L), in float64."""
    kernel = taps.new_empty(taps.shape[0], taps.shape[-1])
    circle = _circle(taps, precise)

    for task in _tasks(kernel):
        kernel[task.shared] = _close(taps[task.shared], circle)
    return kernel


@operator("feedback_kernel_backward")
def _feedback_kernel_backward(g: Tensor, taps: Tensor, precise: bool) -> Tensor:
    gradient = taps.new_empty(taps.shape)
    circle = _circle(taps, precise)

    for task in _tasks(gradient[:, 0]):
        gradient[task.shared] = _gradient(g[task.shared], taps[task.shared], circle)
    return gradient


@register_fake(_feedback_kernel)
def _feedback_kernel_fake(taps: Tensor, precise: bool) -> Tensor:
    return taps.new_empty(taps.shape[0], taps.shape[-1])


@register_fake(_feedback_kernel_backward)
def _feedback_kernel_backward_fake(g: Tensor, taps: Tensor, precise: bool) -> Tensor:
    return taps.new_empty(taps.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    taps, ctx.precise = inputs
    ctx.save_for_backward(taps)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
    (taps,) = ctx.saved_tensors
    if records_derivatives():  # the gradient is differentiated too: record the same formula
        return _gradient(g, taps, _circle(taps, ctx.precise)), None
    return _feedback_kernel_backward(g, taps, ctx.precise), None


def _jvp(inputs: Sequence[Any], tangents: Sequence[Tensor | None]) -> Tensor | None:
    taps, precise = inputs
    tangent, _ = tangents
    if tangent is None:
        return None
    circle = _circle(taps, precise)
    out, into, inverse = _spectra(taps, circle)
    damped = tangent[..., 1:, :] * circle.damping
    t_out, t_into, t_loop = torch.fft.rfft(damped, n=circle.points).unbind(-2)
    change = t_out * into + out * inverse * (t_into - into * t_loop)
    answer = torch.fft.irfft(change, n=circle.points)[..., : taps.shape[-1]]
    return tangent[..., 0, :] - answer / circle.damping


differentiable(_feedback_kernel, setup=_setup, backward=_backward, jvp=_jvp)
differentiable(_feedback_kernel_backward)


@register_vmap(_feedback_kernel)
def _feedback_kernel_vmap(
    info: Any, in_dims: tuple[int | None, ...], taps: Tensor, precise: bool
) -> tuple[Tensor, int]:
    mapped = batch_first(taps, in_dims[0], info.batch_size)  # (size, C, 4, L)
    return _feedback_kernel(mapped.flatten(0, 1), precise).unflatten(0, mapped.shape[:2]), 0


@register_vmap(_feedback_kernel_backward)
def _feedback_kernel_backward_vmap(
    info: Any, in_dims: tuple[int | None, ...], g: Tensor, taps: Tensor, precise: bool
) -> tuple[Tensor, int]:
    g, taps = (
        batch_first(tensor, axis, info.batch_size)
        for tensor, axis in zip((g, taps), in_dims, strict=False)
    )
    gradient = _feedback_kernel_backward(g.flatten(0, 1), taps.flatten(0, 1), precise)
    return gradient.unflatten(0, taps.shape[:2]), 0
