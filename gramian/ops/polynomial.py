"""Polynomials in z⁻¹ at the roots of unity, and the kernels of rational functions.

A transfer function of order n (Parnichkun et al. 2024, arXiv 2405.06147, equation 4)

    H(z) = d + (b_1 z⁻¹ + … + b_n z⁻ⁿ) / (1 + a_1 z⁻¹ + … + a_n z⁻ⁿ)

is evaluated at N roots of unity by one FFT of the numerator's coefficients and one FFT of the
denominator's. The inverse FFT of the ratio is a kernel of N taps, so time and memory do not depend
on n ("state-free inference", section 3 of the paper). Sampling a spectrum causes aliasing in time,
so the result is `Σ_p h_{t+pN}`. If the numerator belongs to a kernel that is truncated to N taps
(`b (I − A^N)`), that sum is the truncated kernel itself.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake, register_vmap

from gramian.ops._blocks import cut
from gramian.ops._operator import batch_first, differentiable, operator
from gramian.ops.derivatives import records_derivatives
from gramian.ops.devices import has_float64
from gramian.ops.precision import complex_dtype

# The number of grid points in one block, and the fewest rows that are worth a call of the FFT.
_CPU_BLOCK = 2**17
_CPU_MIN_ROWS = 16

# The largest number of points of spectra that are kept for the backward pass. Larger spectra are
# computed again, because allocating memory for them takes as long.
_MOST_KEPT = 2**21


def evaluate_on_roots_of_unity(coefficients: Tensor, points: int) -> Tensor:
    """Evaluate Σ_j c_j z⁻ʲ at z = exp(2πik/points) for k = 0 … points // 2.

    The values at the other roots of unity are the conjugates of these.

    Args:
        coefficients: (*C, n), real: the coefficients c_j, the constant term first; n ≤ points.
        points: The number of roots of unity.

    Returns:
        (*C, points // 2 + 1), complex, in the precision of `coefficients`.

    Raises:
        TypeError: if `coefficients` is not real floating point.
        ValueError: if `points` is not positive or is smaller than n, or if n is 0.
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
    length: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute the kernel of d + (Σ_{j≥1} b_j z⁻ʲ) / (1 + Σ_{j≥1} a_j z⁻ʲ) on a grid of frequencies.

    The taps are the inverse FFT of the spectrum, sampled at `grid` points. So tap t is
    `Σ_p h_{t + p grid}`, where h is the impulse response. The result is differentiable to any
    order. The backward pass keeps the coefficients, and the spectra only if they are small.

    Args:
        b: (*C, n), real: the numerator's coefficients.
        a: (*C or broadcasting against it, m), real: the denominator's coefficients. If many
            channels share a row, its spectrum is computed once.
        d: (*C or broadcasting against it), real: the direct term.
        grid: The number of points, larger than n and m. It may be even or odd.
        length: The number of taps to return, at most `grid`, which is the default.
        dtype: The dtype of the taps; by default the (promoted) dtype of b, a and d. For float64
            taps of float32 coefficients, both polynomials and their ratio are evaluated in float64,
            because terms cancel in them. Gradients are then propagated in float32.

    Returns:
        (*C, length), in `dtype`.

    Raises:
        TypeError: if an argument is not real floating point, or if it is in half precision.
        ValueError: if there are no coefficients, `grid` is not above n and m, `length` is not in
            1 … grid, or the shapes do not broadcast.
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
    try:
        channels = torch.broadcast_tensors(b[..., 0], a[..., 0], d)[0].shape
    except RuntimeError as error:
        raise ValueError(
            f"rational_kernel: the channels of b {tuple(b.shape)}, a {tuple(a.shape)} (without "
            f"their last dimensions) and d {tuple(d.shape)} do not broadcast."
        ) from error
    own = torch.promote_types(torch.promote_types(b.dtype, a.dtype), d.dtype)
    dtype = torch.promote_types(own, dtype or own)
    for given in (own, dtype):
        if given not in (torch.float32, torch.float64):
            raise TypeError(f"rational_kernel: needs float32 or float64 coefficients, not {given}.")
    b, d = b.to(own).expand(*channels, -1), d.to(own).expand(channels)
    a = a.to(own).reshape(*(1,) * (len(channels) + 1 - a.ndim), *a.shape)
    rows = math.prod(channels) + math.prod(a.shape[:-1])
    learned = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    keep = learned and rows * (grid // 2 + 1) <= _MOST_KEPT
    taps, _, _ = _rational_kernel(b, a, d, grid, length, dtype, keep)
    return taps


def rational_impulse_response(b: Tensor, a: Tensor, d: Tensor, length: int) -> Tensor:
    """Compute the first taps of d + (Σ_{j≥1} b_j z⁻ʲ) / (1 + Σ_{j≥1} a_j z⁻ʲ).

    No pole may have a modulus above 1e5^(1/length). The function is sampled on a circle of that
    radius, at twice as many points as taps. On this circle aliasing is damped by 1e-10, but
    rounding errors grow by 1e5. The result is correct to about ten digits of the largest taps, and
    differentiable to any order. Time and memory do not depend on n.

    Args:
        b: (*C, n), real: the numerator's coefficients.
        a: (*C or broadcasting against it, m), real: the denominator's coefficients.
        d: (*C or broadcasting against it), real: the direct term.
        length: The number of taps, at least 1.

    Returns:
        (*C, length), float64.

    Raises:
        ValueError: if there are no coefficients, if `length` is below 1, or if the shapes do not
            broadcast.
    """
    grid = 2 * max(length, b.shape[-1] + 1, a.shape[-1] + 1)
    exponents = torch.arange(grid // 2, dtype=torch.float64, device=b.device)
    growth = torch.pow(1e5, 2 * exponents / grid)  # the powers of the circle's radius
    b, a = (c.double() / growth[1 : c.shape[-1] + 1] for c in (b, a))
    return rational_kernel(b, a, d.double(), grid, length=length) * growth[:length]


def single_precision_error(b: Tensor, a: Tensor, d: Tensor, grid: int) -> Tensor:
    """Bound the relative error of `rational_kernel` in float32, to first order in its rounding.

    An FFT of N points rounds every value of a spectrum by about `ε √(log2 N)` of the root of the
    coefficients' sum of squares. With K = B / A, the spectrum of the taps is then off by

        |δK| ≤ 4 ε √(log2 N) (‖b‖ + |K| ‖(1, a)‖) / |A| + 4 ε √(log2 N) |K|.

    The factor 4 covers coefficients that are themselves rounded to float32. A result near 1 or
    above says that float32 cannot represent the kernel: poles near the unit circle that are close
    to each other make |A| small and `‖a‖` large.

    Args:
        b: (*C, n), real: the numerator's coefficients.
        a: (*C, n), real: the denominator's coefficients.
        d: (*C), real: the direct term.
        grid: The number of points of the transforms.

    Returns:
        (*C): ‖ĥ − h‖₂ / ‖h‖₂ at most, over all `grid` taps; 0 for a kernel that is zero.
    """
    dtype = torch.float64 if has_float64(b.device) else torch.float32
    b, a, d = b.to(dtype), a.to(dtype), d.to(dtype)
    A, B = _spectrum(a, 1.0, grid, dtype), _spectrum(b, 0.0, grid, dtype)
    K, size = (B / A).abs(), A.abs()
    unit = 4 * torch.finfo(torch.float32).eps * math.sqrt(math.log2(max(grid, 2)))
    of_b, of_a = b.norm(dim=-1, keepdim=True), (1 + a.square().sum(-1, keepdim=True)).sqrt()
    error = unit * ((of_b + K * of_a) / size + K)
    twice = torch.full_like(size, 2.0)  # every other root of unity has a conjugate
    twice[..., 0] = 1
    if grid % 2 == 0:
        twice[..., -1] = 1
    energy = (twice * (B / A + d.unsqueeze(-1)).abs().square()).sum(-1)
    wrong = (twice * error.square()).sum(-1)
    smallest = torch.finfo(dtype).tiny
    return torch.where(energy > 0, (wrong / energy.clamp_min(smallest)).sqrt(), 0)


def _check_real(function: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{function}: {name} must be real floating point, not {tensor.dtype}.")


def _spectrum(coefficients: Tensor, constant: float, grid: int, dtype: torch.dtype) -> Tensor:
    """Evaluate constant + Σ_{j≥1} c_j z⁻ʲ in `dtype`, (*C, grid // 2 + 1)."""
    leading = coefficients.new_full((*coefficients.shape[:-1], 1), constant)
    return torch.fft.rfft(torch.cat((leading, coefficients), dim=-1).to(dtype), n=grid)


class _PaddedPolynomials:
    """Spectra of blocks of rows, computed in a scratch buffer that is padded with zeros once."""

    def __init__(self, like: Tensor, rows: int, grid: int, dtype: torch.dtype) -> None:
        self.scratch = like.new_zeros(rows, grid, dtype=dtype)
        self.written = 1

    def spectrum(self, coefficients: Tensor, constant: float) -> Tensor:
        *channels, count = coefficients.shape
        if count + 1 < self.written:
            self.scratch[:, count + 1 : self.written] = 0
        self.written = count + 1
        rows = self.scratch[: math.prod(channels)].view(*channels, -1)
        rows[..., 0] = constant
        rows[..., 1 : count + 1] = coefficients
        return torch.fft.rfft(rows)


def _coefficient_gradient(spectrum: Tensor, count: int, grid: int) -> Tensor:
    """Apply the adjoint of `_spectrum` (without the constant) to a spectrum of real taps."""
    return torch.fft.irfft(spectrum, n=grid)[..., 1 : count + 1]


@operator("rational_kernel")
def _rational_kernel(
    b: Tensor, a: Tensor, d: Tensor, grid: int, length: int, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the taps for b (*C, n), a (*C or 1, m), d (*C).

    If `keep` is set, the other two results are 1 / A and B / A on the grid, for the backward pass,
    in the precision of the coefficients. If it is not set, they are empty.
    """
    taps = b.new_empty(*b.shape[:-1], length, dtype=dtype)
    reciprocals, ratios = _empty_spectra(b, a, grid, keep)
    rows, tasks = cut(taps, a, grid, _CPU_BLOCK, _CPU_MIN_ROWS)
    polynomials = _PaddedPolynomials(b, rows, grid, dtype)

    for task in tasks:
        reciprocal = polynomials.spectrum(a[task.shared], 1.0).reciprocal_()
        if keep:
            reciprocals[task.shared] = reciprocal
        for block in task.blocks:
            ratio = polynomials.spectrum(b[block], 0.0).mul_(reciprocal)
            if keep:
                ratios[block] = ratio
            taps[block] = torch.fft.irfft(ratio, n=grid)[..., :length]
    taps[..., 0] += d
    return taps, reciprocals, ratios


def _empty_spectra(b: Tensor, a: Tensor, grid: int, keep: bool) -> tuple[Tensor, Tensor]:
    dtype = complex_dtype(b.dtype)
    if not keep:
        return b.new_empty(0, dtype=dtype), b.new_empty(0, dtype=dtype)
    shapes = ((*c.shape[:-1], grid // 2 + 1) for c in (a, b))
    of_a, of_b = (b.new_empty(shape, dtype=dtype) for shape in shapes)
    return of_a, of_b


@operator("rational_kernel_backward")
def _rational_kernel_backward(
    g: Tensor, b: Tensor, a: Tensor, reciprocals: Tensor, ratios: Tensor, grid: int
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of b and a from the taps' gradient g (*C, length).

    With K = B / A and G the spectrum of g, the gradients have the spectra G / Ā and -G K̄ / Ā.
    Ratios that the forward pass did not keep are computed in the precision of g, in which the taps
    were computed. All other values are computed in the precision of the coefficients.
    """
    of_b, of_a = torch.empty_like(b), torch.empty_like(a)
    rows, tasks = cut(g, a, grid, _CPU_BLOCK, _CPU_MIN_ROWS)
    single = complex_dtype(b.dtype)
    kept = ratios.numel() > 0
    if not kept:
        polynomials = _PaddedPolynomials(b, rows, grid, g.dtype)

    for task in tasks:
        if kept:
            adjoint = reciprocals[task.shared].conj_physical()
        else:
            reciprocal = polynomials.spectrum(a[task.shared], 1.0).reciprocal_()
            adjoint = reciprocal.to(single).conj_physical()
        total = torch.zeros_like(adjoint)
        for block in task.blocks:
            if kept:
                kernel = ratios[block].conj_physical()
            else:
                kernel = polynomials.spectrum(b[block], 0.0).mul_(reciprocal).to(single)
                kernel.conj_physical_()
            incoming = torch.fft.rfft(g[block].to(b.dtype), n=grid).mul_(adjoint)
            of_b[block] = _coefficient_gradient(incoming, b.shape[-1], grid)
            total -= incoming.mul_(kernel).sum_to_size(total.shape)
        of_a[task.shared] = _coefficient_gradient(total, a.shape[-1], grid)
    return of_b, of_a


@register_fake(_rational_kernel)
def _rational_kernel_fake(
    b: Tensor, a: Tensor, d: Tensor, grid: int, length: int, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    taps = b.new_empty(*b.shape[:-1], length, dtype=dtype)
    return taps, *_empty_spectra(b, a, grid, keep)


@register_fake(_rational_kernel_backward)
def _rational_kernel_backward_fake(
    g: Tensor, b: Tensor, a: Tensor, reciprocals: Tensor, ratios: Tensor, grid: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(b), torch.empty_like(a)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    b, a, d, ctx.grid, *_ = inputs
    _, reciprocals, ratios = output
    ctx.dtype = d.dtype
    ctx.mark_non_differentiable(reciprocals, ratios)
    ctx.save_for_backward(b, a, reciprocals, ratios)


def _backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    b, a, reciprocals, ratios = ctx.saved_tensors
    grid = ctx.grid
    if records_derivatives():  # the gradient is differentiated too: record the same formula
        reciprocal = _spectrum(a, 1.0, grid, g.dtype).reciprocal()
        kernel = _spectrum(b, 0.0, grid, g.dtype) * reciprocal
        # conj_physical, since PyTorch ignores a lazy conj in the first call of a compiled function
        incoming = torch.fft.rfft(g, n=grid) * reciprocal.conj_physical()
        total = (incoming * kernel.conj_physical()).sum_to_size(reciprocal.shape)
        of_b = _coefficient_gradient(incoming, b.shape[-1], grid).to(b.dtype)
        of_a = -_coefficient_gradient(total, a.shape[-1], grid).to(a.dtype)
    else:
        of_b, of_a = _rational_kernel_backward(g, b, a, reciprocals, ratios, grid)
    return of_b, of_a, g[..., 0].to(ctx.dtype), None, None, None, None


def _jvp(inputs: Sequence[Any], tangents: Sequence[Tensor | None]) -> tuple[Tensor, None, None]:
    """Compute the tangent of the taps.

    If the tangents of b and a have the spectra S and T, the tangent of the taps has the spectrum
    `(S - K T) / A`, where K = B / A. The tangent of d is added to tap 0.
    """
    b, a, _, grid, length, dtype, _ = inputs
    t_b, t_a, t_d, *_ = tangents
    tangent = b.new_zeros(*b.shape[:-1], length, dtype=dtype)
    if t_b is not None or t_a is not None:
        reciprocal = _spectrum(a, 1.0, grid, dtype).reciprocal()
        change = torch.zeros_like(reciprocal)
        if t_b is not None:
            change = _spectrum(t_b, 0.0, grid, dtype)
        if t_a is not None:
            kernel = _spectrum(b, 0.0, grid, dtype) * reciprocal
            change = change - kernel * _spectrum(t_a, 0.0, grid, dtype)
        tangent = tangent + torch.fft.irfft(change * reciprocal, n=grid)[..., :length]
    if t_d is not None:
        first = t_d.to(dtype).unsqueeze(-1)
        tangent = tangent + torch.nn.functional.pad(first, (0, length - 1))
    return tangent, None, None


differentiable(_rational_kernel, setup=_setup, backward=_backward, jvp=_jvp)
differentiable(_rational_kernel_backward)


@register_vmap(_rational_kernel)
def _rational_kernel_vmap(
    info: Any, in_dims: tuple[int | None, ...], *inputs: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    b, a, d, *rest, keep = inputs
    size, shared = info.batch_size, in_dims[1] is None
    taps, reciprocals, ratios = _rational_kernel(
        batch_first(b, in_dims[0], size),
        batch_first(a, in_dims[1]),
        batch_first(d, in_dims[2], size),
        *rest,
        keep,
    )
    if not keep:
        return (taps, reciprocals, ratios), (0, None, None)
    if shared:  # all mapped entries share one spectrum of the denominators
        return (taps, reciprocals.squeeze(0), ratios), (0, None, 0)
    return (taps, reciprocals, ratios), (0, 0, 0)


@register_vmap(_rational_kernel_backward)
def _rational_kernel_backward_vmap(
    info: Any, in_dims: tuple[int | None, ...], *inputs: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    *tensors, grid = inputs
    mapped = [
        batch_first(tensor, axis, info.batch_size) if tensor.numel() else tensor
        for tensor, axis in zip(tensors, in_dims, strict=False)
    ]
    return _rational_kernel_backward(*mapped, grid), (0, 0)
