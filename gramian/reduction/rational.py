r"""Rational interpolation by gradient descent, the baseline of the paper on RTF.

The procedure is that of R. N. Parnichkun et al., "State-free inference of state-space models: the
transfer function approach", 2024 (arXiv 2405.06147), section 4.4 and appendix C.4. AdamW minimizes
`Σ_{1≤t<L} (h_t - ĥ_t)²` over the coefficients of a rational transfer function. Its kernel is the
inverse FFT of `b / a` on N ≥ L roots of unity (section 3.2), where b is the numerator of the kernel
truncated to N taps. With `e = ĥ - h`, the gradients are correlations:

    ∂/∂b_j = 2 irfft(conj(1 / A) E)_j,   ∂/∂a_j = -2 irfft(conj(B / A²) E)_j.

Kernels are first scaled to unit norm, and ĥ_0 = h_0. The descent starts from `a = b = 0`, the
paper's initialization.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from gramian._checks import check_choice, check_sizes
from gramian.ops import rational_kernel
from gramian.ops.devices import returned, work_device
from gramian.ops.precision import full_precision
from gramian.ops.reflection import step_down, step_up
from gramian.reduction._kernels import check_finite, kernel_of
from gramian.reduction.descent import Descent, descended
from gramian.reduction.switching import find_modal_form
from gramian.systems import System, TransferFunction

__all__ = ["RationalFit", "rational_interpolation"]

_STABILITIES = ("schur", "none")

_REFLECTION_LIMIT = 1 - 1e-6
"""Reflection coefficients stay below this, so that rounding does not make them 1."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RationalFit:
    """A rational transfer function that was fitted to kernels, and its distance from them.

    Attributes:
        system: The transfer function, channels (*C), with its first L taps.
        relative_error: (*C), float64: ‖h - ĥ‖₂ / ‖h‖₂ over the L taps; 0 for a silent channel.
        stable: (*C), bool: whether all poles are inside the unit circle.
    """

    system: TransferFunction
    relative_error: Tensor
    stable: Tensor

    def __repr__(self) -> str:
        error = self.relative_error
        return (
            f"RationalFit(channels={tuple(error.shape)}, order={self.system.order}, "
            f"relative_error={float(error.median()):.2e} median, {float(error.max()):.2e} max, "
            f"unstable={int((~self.stable).sum())})"
        )


@full_precision()
@torch.no_grad()
def rational_interpolation(
    kernel_or_system: Tensor | System,
    order: int,
    descent: Descent | None = None,
    *,
    stability: str = "schur",
    length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RationalFit:
    """Fit rational transfer functions of degree n to kernels by gradient descent.

    This is the distillation into rational form of the paper on RTF (arXiv 2405.06147, section 4.4
    and appendix C.4), and a baseline: `reduce` is closer, and faster by orders of magnitude. The
    published setting is `Descent(1_000_000, 1e-4, schedule="constant")`; the weight decay is not
    published.

    The direct term of the result is exactly h_0. Everything is computed in float64 and without
    gradients. The result is the best set of parameters of the whole descent, for every channel.

    Args:
        kernel_or_system: A kernel (*C, L), real floating point, or a time-invariant system, whose
            first `length` taps are then fitted.
        order: The degree n of the denominators, 1 … L - 1.
        descent: The options of the descent; by default `Descent()`.
        stability: With "schur", the parameters of a denominator are `atanh` of its reflection
            coefficients, which reach every stable denominator and no other. With "none", its
            coefficients are free, as published. A kernel on a grid is finite for unstable poles
            too, so a descent may end with such poles; see `RationalFit.stable`. The recurrence of
            such a system is not its companion form.
        length: The number of taps of a system to use, as in `reduce`.
        progress: A function that is called as `progress(done, total)`, where `done` and `total` are
            numbers of channels.

    Returns:
        A `RationalFit`. Its system is in float32 for a half-precision kernel, and otherwise in the
        dtype of the kernel or system.

    Raises:
        TypeError: if the first argument is neither a real floating-point tensor nor a system.
        ValueError: if an argument is out of range, or if a kernel is not finite.
    """
    kernel = kernel_of(kernel_or_system, length)
    check_sizes(order=order)
    check_choice("stability", stability, _STABILITIES)
    shape, taps = kernel.shape[:-1], kernel.shape[-1]
    if order >= taps:
        raise ValueError(
            f"order must lie in 1 … {taps - 1} for kernels of {taps} taps; got {order}."
        )
    check_finite(kernel)
    dtype = torch.float64 if kernel.dtype == torch.float64 else torch.float32
    flat = kernel.detach().to(work_device(kernel.device), torch.float64).reshape(-1, taps)
    size = flat[:, 1:].norm(dim=-1, keepdim=True)
    loss = _RationalLoss(flat[:, 1:] / torch.where(size > 0, size, 1), stability == "schur")
    done = 0.0

    def tick(part: float) -> None:
        nonlocal done
        before, done = int(done + 1e-6), done + part * len(flat)
        if progress is not None and before < int(done + 1e-6) < len(flat):
            progress(int(done + 1e-6), len(flat))

    if progress is not None:
        progress(0, len(flat))
    start = flat.new_zeros(2, len(flat), order)
    b, parameter = descended(start, loss, descent or Descent(), tick=tick)
    reflection = _reflection(parameter) if stability == "schur" else step_down(parameter)
    a = step_up(reflection) if stability == "schur" else parameter
    b = b * size
    aliased = rational_kernel(b, a, torch.zeros_like(b[:, 0]), loss.grid, length=1)
    system = TransferFunction.from_truncated(
        b.reshape(*shape, order),
        a.reshape(*shape, order),
        (flat[:, :1] - aliased).reshape(shape),
        loss.grid,
        taps,
        reflection=reflection.reshape(*shape, order) if stability == "schur" else None,
        reducer=find_modal_form,
    )
    system = system.to(dtype)
    found = system.impulse_response(taps).reshape(-1, taps).double()
    norm = flat.norm(dim=-1)
    error = (found - flat).norm(dim=-1) / torch.where(norm > 0, norm, 1)
    if progress is not None:
        progress(len(flat), len(flat))
    return RationalFit(
        system.to(kernel.device),
        returned(error.reshape(shape), kernel.device),
        (reflection.abs() < 1).all(-1).reshape(shape).to(kernel.device),
    )


def _reflection(theta: Tensor) -> Tensor:
    return _REFLECTION_LIMIT * torch.tanh(theta)


class _RationalLoss:
    """The loss `Σ_t (h_t - ĥ_t)²` of numerators and denominators, (2, B, n), and its gradient."""

    def __init__(self, taps: Tensor, schur: bool) -> None:
        self.taps = taps
        self.schur = schur
        length = taps.shape[-1] + 1
        self.grid = length + length % 2

    def __call__(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        b, a = parameters
        order, length = b.shape[-1], self.taps.shape[-1]
        if self.schur:
            a, denominators = _stepped(_reflection(parameters[1]))
        ones = torch.ones_like(a[:, :1])
        numerator = torch.fft.rfft(torch.nn.functional.pad(b, (1, 0)), n=self.grid)
        inverse = torch.fft.rfft(torch.cat([ones, a], dim=-1), n=self.grid).reciprocal()
        spectrum = numerator * inverse
        taps = torch.fft.irfft(spectrum, n=self.grid)
        error = torch.zeros_like(taps)
        error[:, 1 : length + 1] = taps[:, 1 : length + 1] - self.taps
        back = torch.fft.rfft(error) * inverse.conj()
        pair = torch.stack([back, -back * spectrum.conj()])
        slope = 2 * torch.fft.irfft(pair, n=self.grid)[..., 1 : order + 1]
        if self.schur:
            slope[1] = _stepped_back(slope[1], _reflection(parameters[1]), denominators)
            slope[1] *= _REFLECTION_LIMIT / parameters[1].cosh().square()
        return error.square().sum(-1), slope


def _stepped(reflection: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the denominators (B, n) of reflection coefficients, and those of all lower degrees."""
    a, lower = reflection[:, :0], []
    for last in reflection.split(1, dim=-1):
        lower.append(a)
        a = torch.cat([a + last * a.flip(-1), last], dim=-1)
    return a, lower


def _stepped_back(slope: Tensor, reflection: Tensor, lower: list[Tensor]) -> Tensor:
    """Return the gradient with respect to reflection coefficients, from that of denominators."""
    found = torch.empty_like(reflection)
    for m in range(reflection.shape[-1] - 1, -1, -1):
        head, a, last = slope[:, :m], lower[m], reflection[:, m : m + 1]
        found[:, m] = slope[:, m] + (head * a.flip(-1)).sum(-1)
        slope = head + last * head.flip(-1)
    return found
