"""Polynomials in z⁻¹ on the roots of unity, and the kernels of rational functions.

A transfer function of order n (Parnichkun et al. 2024, arXiv 2405.06147, equation 4)

    H(z) = d + (b_1 z⁻¹ + … + b_n z⁻ⁿ) / (1 + a_1 z⁻¹ + … + a_n z⁻ⁿ)

is evaluated on N roots of unity by one FFT of the numerator's and one of the denominator's
coefficients, and an inverse FFT of the ratio is its kernel on N taps: time and memory do not depend
on n ("state-free inference", section 3 there). Sampling a spectrum aliases time, so that the result
is `Σ_p h_{t+pN}`: with a numerator that is already truncated to N taps (`b (I − A^N)`) it is the
kernel itself.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from gramian.ops._blocks import Task, cut, work
from gramian.ops._operator import operator

# Grid points of one block, and the fewest rows that are worth a call to the FFT.
_CPU_BLOCK = 2**15
_CPU_MIN_ROWS = 16


def evaluate_on_roots_of_unity(coefficients: Tensor, points: int) -> Tensor:
    """Σ_j c_j z⁻ʲ at z = exp(2πik/points), k = 0 … points // 2 (the others are conjugates).

    Args:
        coefficients: (*C, n), real, from the constant term on; n ≤ points.
        points: how many roots of unity.

    Returns:
        (*C, points // 2 + 1), complex, in the precision of `coefficients`.

    Raises:
        TypeError: `coefficients` is not real floating point.
        ValueError: `points` is not positive or smaller than n, or n is 0.
    """
    _check_real("evaluate_on_roots_of_unity", coefficients=coefficients)
    if coefficients.ndim == 0 or not 1 <= coefficients.shape[-1] <= points:
        raise ValueError(
            f"evaluate_on_roots_of_unity: {points} points need between 1 and {points} "
            f"coefficients in the last dimension; their shape is {tuple(coefficients.shape)}."
        )
    return torch.fft.rfft(coefficients, n=points)


def rational_kernel(
    b: Tensor,
    a: Tensor,
    d: Tensor,
    grid: int,
    *,
    radius: float = 1.0,
    length: int | None = None,
) -> Tensor:
    """Kernel of d + (Σ_{j≥1} b_j z⁻ʲ) / (1 + Σ_{j≥1} a_j z⁻ʲ), sampled on `grid` points.

    Tap t is `Σ_p radius^(−p grid) h_{t + p grid}`, h the impulse response: on the unit circle the
    inverse FFT of the sampled spectrum, and on a larger circle, whose weights are undone, aliasing
    is damped (while the rounding errors of tap t grow by radius^t). Differentiable to any order;
    only the coefficients are kept for the backward pass.

    Args:
        b: (*C, n), real.
        a: (*C or broadcasting against it, m), real; the spectrum of a row that many channels
            share is computed once.
        d: (*C or broadcasting against it), real.
        grid: number of points, larger than n and m; even or odd.
        radius: of the circle on which the points lie.
        length: taps to return, at most `grid`; all by default.

    Returns:
        (*C, length), in the (promoted) dtype of b, a and d.

    Raises:
        TypeError: an argument is not real floating point.
        ValueError: no coefficients, `grid` not above n and m, `length` not in 1 … grid, `radius`
            not positive, or shapes that do not broadcast.
    """
    _check_real("rational_kernel", b=b, a=a, d=d)
    for name, coefficients in (("b", b), ("a", a)):
        if coefficients.ndim == 0 or not 1 <= coefficients.shape[-1] < grid:
            raise ValueError(
                f"rational_kernel: a grid of {grid} points needs between 1 and {grid - 1} "
                f"coefficients; {name} has shape {tuple(coefficients.shape)}."
            )
    length = grid if length is None else length
    if not 1 <= length <= grid:
        raise ValueError(f"rational_kernel: length={length} is not between 1 and grid={grid}.")
    if not radius > 0:
        raise ValueError(f"rational_kernel: radius={radius} is not positive.")
    try:
        channels = torch.broadcast_tensors(b[..., 0], a[..., 0], d)[0].shape
    except RuntimeError as error:
        raise ValueError(
            f"rational_kernel: the channels of b {tuple(b.shape)}, a {tuple(a.shape)} (without "
            f"their last dimensions) and d {tuple(d.shape)} do not broadcast."
        ) from error
    dtype = torch.promote_types(torch.promote_types(b.dtype, a.dtype), d.dtype)
    if dtype in (torch.float16, torch.bfloat16):
        raise TypeError(f"rational_kernel: needs float32 or float64 coefficients, not {dtype}.")
    return _rational_kernel(
        b.to(dtype).expand(*channels, -1),
        a.to(dtype).reshape(*(1,) * (len(channels) + 1 - a.ndim), *a.shape),
        d.to(dtype).expand(channels),
        grid,
        float(radius),
        length,
    )


def _check_real(function: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{function}: {name} must be real floating point, not {tensor.dtype}.")


def _weights(like: Tensor, first: int, count: int, radius: float) -> Tensor:
    """radius^first, radius^(first + 1), …"""
    exponents = torch.arange(first, first + count, dtype=torch.float64, device=like.device)
    return torch.pow(radius, exponents).to(like.dtype)


def _spectrum(coefficients: Tensor, constant: float, grid: int, radius: float) -> Tensor:
    """constant + Σ_{j≥1} c_j z⁻ʲ on the circle of `radius`: (*C, grid // 2 + 1)."""
    if radius != 1.0:
        coefficients = coefficients / _weights(coefficients, 1, coefficients.shape[-1], radius)
    leading = coefficients.new_full((*coefficients.shape[:-1], 1), constant)
    return torch.fft.rfft(torch.cat((leading, coefficients), dim=-1), n=grid)


def _coefficient_gradient(spectrum: Tensor, count: int, grid: int, radius: float) -> Tensor:
    """Adjoint of `_spectrum` but for the constant, of a spectrum whose inverse FFT is real."""
    gradient = torch.fft.irfft(spectrum, n=grid)[..., 1 : count + 1]
    return gradient if radius == 1.0 else gradient / _weights(gradient, 1, count, radius)


def _kernel(numerator: Tensor, reciprocal: Tensor, grid: int, radius: float, length: int) -> Tensor:
    """Taps of the product of two spectra, weights undone: (*C, length)."""
    taps = torch.fft.irfft(numerator * reciprocal, n=grid)[..., :length]
    return taps if radius == 1.0 else taps * _weights(taps, 0, length, radius)


def _gradients(
    g: Tensor, numerator: Tensor, reciprocal: Tensor, grid: int, radius: float
) -> tuple[Tensor, Tensor]:
    """Spectra of the numerator's gradient and, but for its sign, of the denominator's.

    With K = B / A and G the spectrum of the taps' gradient: G / Ā and G K̄ / Ā.
    """
    if radius != 1.0:
        g = g * _weights(g, 0, g.shape[-1], radius)
    # conj_physical, for in the first call of a compiled function PyTorch ignores a lazy conj here
    of_numerator = torch.fft.rfft(g, n=grid) * reciprocal.conj_physical()
    return of_numerator, of_numerator * (numerator * reciprocal).conj_physical()


@operator("rational_kernel")
def _rational_kernel(
    b: Tensor, a: Tensor, d: Tensor, grid: int, radius: float, length: int
) -> Tensor:
    """Taps for b (*C, n), a (*C or 1, m), d (*C)."""
    taps = b.new_empty(*b.shape[:-1], length)
    _, tasks = cut(taps, a, grid, _CPU_BLOCK, _CPU_MIN_ROWS)

    def evaluate(task: Task) -> None:
        reciprocal = _spectrum(a[task.shared], 1.0, grid, radius).reciprocal_()
        for block in task.blocks:
            numerator = _spectrum(b[block], 0.0, grid, radius)
            taps[block] = _kernel(numerator, reciprocal, grid, radius, length)

    work(evaluate, tasks, taps)
    taps[..., 0] += d
    return taps


@operator("rational_kernel_backward")
def _rational_kernel_backward(
    g: Tensor, b: Tensor, a: Tensor, grid: int, radius: float
) -> tuple[Tensor, Tensor]:
    """Gradients of b and a for the taps' gradient g (*C, length)."""
    of_b, of_a = torch.empty_like(b), torch.zeros_like(a)
    _, tasks = cut(g, a, grid, _CPU_BLOCK, _CPU_MIN_ROWS)

    def differentiate(task: Task) -> Tensor:
        reciprocal = _spectrum(a[task.shared], 1.0, grid, radius).reciprocal_()
        total = torch.zeros_like(reciprocal)
        for block in task.blocks:
            numerator = _spectrum(b[block], 0.0, grid, radius)
            spectra = _gradients(g[block], numerator, reciprocal, grid, radius)
            of_b[block] = _coefficient_gradient(spectra[0], b.shape[-1], grid, radius)
            total += spectra[1].sum_to_size(total.shape)
        return _coefficient_gradient(total, a.shape[-1], grid, radius).clone()

    for task, part in zip(tasks, work(differentiate, tasks, g), strict=True):
        of_a[task.shared] -= part  # several tasks may have the same denominators
    return of_b, of_a


@register_fake(_rational_kernel)
def _rational_kernel_fake(
    b: Tensor, a: Tensor, d: Tensor, grid: int, radius: float, length: int
) -> Tensor:
    return b.new_empty(*b.shape[:-1], length)


@register_fake(_rational_kernel_backward)
def _rational_kernel_backward_fake(
    g: Tensor, b: Tensor, a: Tensor, grid: int, radius: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(b), torch.empty_like(a)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    b, a, _, ctx.grid, ctx.radius, _ = inputs
    ctx.save_for_backward(b, a)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    b, a = ctx.saved_tensors
    if torch.is_grad_enabled():  # a graph of the gradient is wanted: the same formula, recorded
        reciprocal = _spectrum(a, 1.0, ctx.grid, ctx.radius).reciprocal()
        numerator = _spectrum(b, 0.0, ctx.grid, ctx.radius)
        spectra = _gradients(g, numerator, reciprocal, ctx.grid, ctx.radius)
        of_b = _coefficient_gradient(spectra[0], b.shape[-1], ctx.grid, ctx.radius)
        total = spectra[1].sum_to_size(reciprocal.shape)
        of_a = -_coefficient_gradient(total, a.shape[-1], ctx.grid, ctx.radius)
    else:
        of_b, of_a = _rational_kernel_backward(g, b, a, ctx.grid, ctx.radius)
    return of_b, of_a, g[..., 0], None, None, None


register_autograd(_rational_kernel, _backward, setup_context=_setup)
