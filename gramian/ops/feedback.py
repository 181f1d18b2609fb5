r"""Causal kernels in a feedback loop, by FFT.

Of ``y = k_yu ∗ u - k_yv ∗ v``, ``v = k_vu ∗ u - k_vv ∗ v`` the closed loop is, as power series in
z⁻¹,

    K = K_yu - K_yv K_vu / (1 + K_vv),

whose first L taps follow from the first L taps of the four: the identity of Woodbury, for series.
The quotient is evaluated on a circle of N roots of unity, in double precision. Damped by ``ρ^t``,
the taps from N on return to the first ones (aliasing) ``ρ^N`` times as large, and rounding errors
grow by ``ρ^{-L}``: with N = L and ``ρ^N = 1e-8`` both stay below single precision, with N = 2L and
``1e-11`` three digits further.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from gramian.ops._blocks import Task, cut, work
from gramian.ops._lengths import fft_length
from gramian.ops._operator import operator

__all__ = ["feedback_kernel"]

# Numbers that one block on a processor holds.
_CPU_NUMBERS = 2**18


def feedback_kernel(taps: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The closed loop ``k_yu - k_yv ∗ k_vu ∗ (δ + k_vv)^{-1}``, truncated to the taps given.

    Computed in double precision; differentiable to any order. The loop must be stable: ``1 + K_vv``
    without zeros on or outside the unit circle.

    Args:
        taps: (*C, 4, L), real: k_yu, k_yv, k_vu and k_vv.
        dtype: Of the result, by default that of ``taps``; float64 is correct to about 1e-11, all
            else to 1e-8.

    Returns:
        (*C, L).
    """
    length, dtype = taps.shape[-1], dtype or taps.dtype
    flat = taps.double().reshape(-1, 4, length)
    return (
        _feedback_kernel(flat, dtype == torch.float64).reshape(*taps.shape[:-2], length).to(dtype)
    )


def _spectra(taps: Tensor, precise: bool) -> tuple[Any, ...]:
    """The spectra of k_yv and of the quotients K_vu / (1 + K_vv) and 1 / (1 + K_vv), the damping
    (L), and the number of points."""
    length = taps.shape[-1]
    points, aliasing = fft_length(length, length if precise else 1), 1e-11 if precise else 1e-8
    time = torch.arange(length, dtype=taps.dtype, device=taps.device)
    damping = torch.exp(math.log(aliasing) / points * time)
    out, into, loop = torch.fft.rfft(taps[..., 1:, :] * damping, n=points).unbind(-2)
    inverse = 1 / (1 + loop)
    return out, into * inverse, inverse, damping, points


def _close(taps: Tensor, precise: bool) -> Tensor:
    out, into, _, damping, points = _spectra(taps, precise)
    answer = torch.fft.irfft(out * into, n=points)[..., : taps.shape[-1]]
    return taps[..., 0, :] - answer / damping


def _gradient(g: Tensor, taps: Tensor, precise: bool) -> Tensor:
    """The gradient of the taps (…, 4, L) for that of the closed loop, g (…, L)."""
    out, into, inverse, damping, points = _spectra(taps, precise)
    incoming = torch.fft.rfft(g / damping, n=points)
    # conj_physical, for in the first call of a compiled function PyTorch ignores a lazy conj
    of_out = -incoming * into.conj_physical()
    of_into = -incoming * (out * inverse).conj_physical()
    of_loop = -of_into * into.conj_physical()
    gradients = torch.fft.irfft(torch.stack([of_out, of_into, of_loop], dim=-2), n=points)
    return torch.cat([g.unsqueeze(-2), gradients[..., : taps.shape[-1]] * damping], dim=-2)


def _tasks(rows: Tensor) -> list[Task]:
    return cut(rows, rows[..., :1], 12 * rows.shape[-1], _CPU_NUMBERS, 1)[1]


@operator("feedback_kernel")
def _feedback_kernel(taps: Tensor, precise: bool) -> Tensor:
    """(C, 4, L) to (C, L), float64."""
    kernel = taps.new_empty(taps.shape[0], taps.shape[-1])

    def evaluate(task: Task) -> None:
        kernel[task.shared] = _close(taps[task.shared], precise)

    work(evaluate, _tasks(kernel), kernel)
    return kernel


@operator("feedback_kernel_backward")
def _feedback_kernel_backward(g: Tensor, taps: Tensor, precise: bool) -> Tensor:
    gradient = taps.new_empty(taps.shape)

    def differentiate(task: Task) -> None:
        gradient[task.shared] = _gradient(g[task.shared], taps[task.shared], precise)

    work(differentiate, _tasks(gradient[:, 0]), g)
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
    # If a graph of the gradient is wanted, the formula is recorded.
    differentiate = _gradient if torch.is_grad_enabled() else _feedback_kernel_backward
    return differentiate(g, taps, ctx.precise), None


register_autograd(_feedback_kernel, _backward, setup_context=_setup)
