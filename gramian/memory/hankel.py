r"""Compute a loss that makes the Hankel singular values of filters decay.

The Hankel matrix of a kernel, `H_ij = h_{i+j+1}`, maps past inputs to future outputs. Its rank is
the smallest order that a recurrence of the kernel can have. The loss is the nuclear norm of H over
its largest singular value, `Σ_i σ_i / σ_1`. It is a convex surrogate of the rank (Fazel, Hindi and
Boyd, "A rank minimization heuristic", 2001), divided by σ_1, so that scaling a filter does not
change it. It lies between 1 and the rank.

The matrix is square and symmetric. With its eigenvectors u_i and eigenvalues θ_i = ±σ_i, the
gradient of the nuclear norm is `G = Σ_i sign(θ_i) u_i u_iᵀ` over the nonzero σ_i. This is the
subgradient of least Frobenius norm, and the gradient where all σ_i are positive. No difference of
two singular values is divided by, so repeated values do no harm. If σ_1 occurs r times, its
gradient is the mean of `sign(θ_i) u_i u_iᵀ` over the r pairs. The gradient with respect to h_{t+1}
is the sum over the antidiagonal i + j = t of G, which is a sum of convolutions u_i * u_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gramian.ops.devices import in_double_precision
from gramian.ops.hankel import Hankel
from gramian.ops.lengths import fft_length
from gramian.ops.threads import work
from gramian.reduction.spectrum import lanczos_spectrum
from gramian.systems import System, TimeInvariantSystem

__all__ = ["hankel_penalty"]

_DENSE = 256
"""The size up to which all eigenvalues of a matrix are computed."""

_LEADING = 64
"""The number of singular values that are computed for larger matrices by default."""

_RESIDUAL = 1e-5
"""The largest residual of an eigenpair, relative to the smallest eigenvalue that is sought."""

_BLOCK = 2**23
"""The maximal number of entries of the matrices, or of the Lanczos bases, that are held at once."""


@in_double_precision
def hankel_penalty(
    systems: System | Sequence[System], length: int, *, count: int | None = None
) -> Tensor:
    r"""Return the nuclear norm of Hankel matrices over their largest singular value.

    The matrix of a channel has the ⌊length/2⌋ rows and columns `h_{i+j+1}`. It is the part of the
    block `T[n:2n, :n]`, n = ⌊length/2⌋, of the operator. The result is the mean of
    `Σ_{i ≤ count} σ_i / σ_1` over the channels of a system, and then over systems. It is 1 if a
    filter has one real mode. A filter whose taps after the first are zero contributes 0. Gradients
    are exact where singular values repeat or are zero; where no gradient exists, a subgradient is
    used. Values below `n eps σ_1` count as zero, where eps belongs to the dtype of the system.

    If a system's order is at most `count`, all of its singular values are in the sum. Up to 512
    taps, eigenvalues are computed densely, in O(length³) operations per channel. Beyond that, a
    Lanczos iteration computes the leading ones from products with the matrices by FFT.

    Args:
        systems: One or more time-invariant systems with channels (*C). All channels are used.
        length: The number of taps that are used, at least 2.
        count: The number of singular values in the sum. By default, all of them for up to 512 taps,
            and 64 for longer kernels.

    Returns:
        A scalar of the systems' dtype, through which gradients flow. It is NaN if a tap is not
        finite. It can be differentiated once.

    Raises:
        TypeError: if a system is not time-invariant.
        ValueError: if `length` is below 2, `count` is below 1, or there are no channels.
    """
    if length < 2:
        raise ValueError(f"a Hankel matrix needs a length of at least 2 taps; got {length}.")
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1 or None; got {count}.")
    penalties = []
    for system in [systems] if isinstance(systems, System) else list(systems):
        if not isinstance(system, TimeInvariantSystem):
            raise TypeError(
                "a Hankel penalty takes time-invariant systems, such as those of filters; got a "
                f"{type(system).__name__}."
            )
        side = length // 2
        taps = system.impulse_response(2 * side)[..., 1:]  # (*C, 2 side - 1)
        if taps.numel():
            flat = taps.reshape(-1, taps.shape[-1])
            ratios: Any = _NuclearRatio.apply(flat, count)  # type: ignore[no-untyped-call]
            penalties.append(ratios.mean())
    if not penalties:
        raise ValueError("there are no channels to compute Hankel singular values of.")
    return torch.stack(penalties).mean()


class _NuclearRatio(torch.autograd.Function):
    """The ratios `Σ σ_i / σ_1` (B) of the Hankel matrices of taps (B, 2 side - 1)."""

    @staticmethod
    def forward(ctx: Any, taps: Tensor, count: int | None) -> Tensor:
        ratios, slopes = _ratios_and_slopes(taps.detach(), count)
        ctx.save_for_backward(slopes.to(taps.dtype))
        return ratios.to(taps.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (slopes,) = ctx.saved_tensors
        return gradients[0].unsqueeze(-1) * slopes, None


def _ratios_and_slopes(taps: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """Return the ratios (B) and their gradients (B, 2 side - 1), both float64."""
    side = (taps.shape[-1] + 1) // 2
    dtype = torch.finfo(taps.dtype)
    finite = taps.isfinite().all(-1, keepdim=True)
    sequence = torch.where(finite, taps, 0).double()
    height = sequence.abs().amax(-1, keepdim=True)
    height = torch.where(height >= dtype.tiny, height, torch.inf)  # smaller kernels count as zero
    sequence = sequence / height
    if side > _DENSE:
        count = _LEADING if count is None else count
    dense = side <= _DENSE or count is None or 7 * count > side
    entries = side * (side if dense else 8 * (count or 1) + 128)
    size = max(1, _BLOCK // entries)

    def run(start: int) -> tuple[Tensor, Tensor]:
        hankel = Hankel(sequence[start : start + size], side, side)
        theta, vectors = _pairs(hankel, count, dense)
        return _ratio_and_slope(theta, vectors, dtype.eps * side)

    parts = work(run, range(0, len(sequence), size), sequence)
    ratios = torch.cat([ratio for ratio, _ in parts])
    slopes = torch.cat([slope for _, slope in parts]) / height
    nan = torch.full_like(ratios, torch.nan)
    return torch.where(finite[:, 0], ratios, nan), torch.where(finite, slopes, nan.unsqueeze(-1))


def _pairs(hankel: Hankel, count: int | None, dense: bool) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (B, k) of descending modulus and eigenvectors (B, k, side) in rows."""
    if dense:
        theta, columns = torch.linalg.eigh(hankel.matrix())
    else:
        assert count is not None
        rows = lanczos_spectrum(hankel, count, residual=_RESIDUAL).vectors
        image = (hankel @ rows) @ rows.mT  # (B, count, count)
        theta, weights = torch.linalg.eigh((image + image.mT) / 2)
        columns = rows.mT @ weights
    place = theta.abs().argsort(dim=-1, descending=True)[:, :count]
    vectors = columns.mT.gather(1, place.unsqueeze(-1).expand(-1, -1, columns.shape[1]))
    return theta.gather(-1, place), vectors


def _ratio_and_slope(theta: Tensor, vectors: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return `Σ σ_i / σ_1` (B) and its gradient with respect to the taps (B, 2 side - 1).

    Args:
        theta: (B, k), of descending modulus: the eigenvalues.
        vectors: (B, k, side): the eigenvectors.
        tolerance: The relative distance to σ_1, or to zero, below which a value counts as equal.
    """
    values = theta.abs()
    first = values[:, :1]
    present = values > tolerance * first
    top = (values >= (1 - tolerance) * first) & present
    first = torch.where(first > 0, first, torch.inf)
    ratio = torch.where(present, values, 0).sum(-1, keepdim=True) / first
    weights = present.to(values.dtype) - ratio * top / top.sum(-1, keepdim=True).clamp_min(1)
    weights = theta.sign() * weights / first
    taps = 2 * vectors.shape[-1] - 1
    points = fft_length(taps, 1)
    spectra = torch.fft.rfft(vectors, n=points).square()
    slope = torch.fft.irfft((weights.unsqueeze(-1) * spectra).sum(1), n=points)[:, :taps]
    return ratio.squeeze(-1), slope
