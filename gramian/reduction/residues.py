r"""Residues for given poles, by linear least squares on the taps after the direct term.

The problem is `min_r Σ_{t≥1} (h_t - Re Σ_k r_k λ_k^{t-1})²` in the real basis `Re λ^t, Im λ^t`. The
poles are rounded to the dtype of the result before the fit, and the residues after it. So the fit
and the measured errors are those of the returned system.

Usually the normal equations are enough. They come from geometric sums, are scaled to a unit
diagonal, and their solution is refined. For channels with poles that nearly coincide, the basis is
formed and the problem is solved by QR and a damped SVD. The ridge has the size of the residues'
rounding error. It keeps the residues from cancelling more digits than they have.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from gramian.ops.precision import complex_dtype
from gramian.ops.vandermonde import geometric_powers, vandermonde_product
from gramian.reduction.basis import Vandermonde, basis_gram, geometric_sum, pole_products

__all__ = [
    "ModalFit",
    "fit_residues",
    "largest_radius",
    "measured",
    "one_of_each_pair",
    "real_basis",
    "stabilized",
]

_SAFE_EIGENVALUE = 1e-11
"""Smallest eigenvalue with which normal equations of unit diagonal are accurate enough."""

_SETTLED = 1e-3
"""Another refinement of the normal equations is unnecessary if it could remove at most this part of
the residual."""

_CANCELLED = 1e-6
"""A sum of squares of `Re λ^t` or `Im λ^t` has lost digits if it is below this fraction of
`Σ |λ|^2t`."""

_SMALLEST_DIRECTIONS = (1e-5, 1e-6, 1e-7, 1e-9, 1e-11, 1e-13)
"""The limits to try. Directions of the basis whose relative singular value is below the limit are
damped. Of the limits above rounding errors, the limit with the smallest error for rounded residues
is used."""

_ROUNDING = 8
"""Rounding errors of the taps of a mode, in units of the last place of its largest tap."""


@dataclasses.dataclass
class ModalFit:
    """A fit by modes, with the values that the dtype of the result will hold.

    Attributes:
        poles: (B, m), complex128: the poles, one of each pair.
        residues: (B, m), complex128: their residues. An unused entry has residue 0.
        l2_error: (B), float64: the l2 norm of `h - ĥ` over the taps.
        l1_error: (B), float64: the l1 norm of `h - ĥ` over the taps.
    """

    poles: Tensor
    residues: Tensor
    l2_error: Tensor
    l1_error: Tensor

    def put(self, where: Tensor, other: ModalFit) -> None:
        """Replace the channels `where` (mask or indices) by the channels of `other`."""
        width = max(self.poles.shape[-1], other.poles.shape[-1])
        for name in ("poles", "residues"):
            mine, theirs = getattr(self, name), getattr(other, name)
            mine = torch.nn.functional.pad(mine, (0, width - mine.shape[-1]))
            mine[where] = torch.nn.functional.pad(theirs, (0, width - theirs.shape[-1]))
            setattr(self, name, mine)
        self.l2_error[where] = other.l2_error
        self.l1_error[where] = other.l1_error

    def orders(self) -> Tensor:
        """Return the state dimensions in real numbers, (B). An entry with residue zero counts 0."""
        return torch.where(self.residues != 0, 1 + (self.poles.imag != 0).long(), 0).sum(-1)

    def __getitem__(self, index: Tensor) -> ModalFit:
        return ModalFit(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))


def largest_radius(dtype: torch.dtype) -> float:
    """Return the largest modulus of a pole that is still stable when rounded to `dtype`."""
    return 1 - max(1.5 * torch.finfo(dtype).eps, 1e-9)


def stabilized(poles: Tensor, dtype: torch.dtype) -> Tensor:
    """Move poles so far inside the unit circle that they stay inside when rounded to `dtype`.

    A pole outside is reflected to `1 / λ̄`. Then a pole that is closer to the circle than a
    rounding error is moved inwards.
    """
    radius = poles.abs()
    poles = torch.where(radius > 1, poles / radius.square(), poles)
    radius = torch.where(radius > 1, 1 / radius, radius)
    limit = largest_radius(dtype)
    return torch.where(radius > limit, poles * (limit / radius), poles)


def fit_residues(taps: Tensor, poles: Tensor, dtype: torch.dtype) -> ModalFit:
    """Fit residues by least squares, and measure the remaining errors.

    Args:
        taps: (B, T), float64: h_1 … h_T.
        poles: (B, n), complex128: the poles, in conjugate pairs. An unused entry is NaN.
        dtype: The real dtype of the result, float32 or float64.
    """
    poles = one_of_each_pair(poles.to(complex_dtype(dtype)).to(torch.complex128), dtype)
    modes = poles.shape[-1]
    if modes == 0:
        return ModalFit(poles, poles, taps.norm(dim=-1), taps.abs().sum(-1))
    present = ~poles.isnan()
    poles = torch.where(present, poles, 0)
    used = torch.cat([present, present & (poles.imag != 0)], dim=-1)
    kernels = Vandermonde(poles, taps.shape[-1])
    weights, unsafe = _by_sums(taps, poles, kernels, used, torch.finfo(dtype).eps)
    if bool(unsafe.any()):
        basis = real_basis(poles[unsafe], taps.shape[-1])
        signal = taps[unsafe].unsqueeze(-1)
        weights[unsafe] = _least_squares(basis, used[unsafe], signal, dtype)
    weights = weights.to(dtype).double()
    residues = torch.complex(weights[:, :modes], -weights[:, modes:])
    residues = torch.where(present, residues, 0)
    error = taps - kernels.combine(residues)
    fit = ModalFit(poles, residues, error.norm(dim=-1), error.abs().sum(-1))
    failed = ~fit.l2_error.isfinite()
    if bool(failed.any()):
        fit.l2_error[failed] = torch.inf
        fit.l1_error[failed] = torch.inf
    return fit


def measured(taps: Tensor, poles: Tensor, residues: Tensor, dtype: torch.dtype) -> ModalFit:
    """Round poles and residues (B, m), one of each pair, to `dtype`, and measure their fit."""
    kind = complex_dtype(dtype)
    poles, residues = (x.to(kind).to(torch.complex128) for x in (poles, residues))
    residues = torch.where(poles.imag == 0, residues.real.to(residues.dtype), residues)
    error = taps - vandermonde_product(poles, residues, taps.shape[-1])
    fit = ModalFit(poles, residues, error.norm(dim=-1), error.abs().sum(-1))
    failed = ~fit.l2_error.isfinite()
    fit.l2_error[failed] = torch.inf
    fit.l1_error[failed] = torch.inf
    return fit


def one_of_each_pair(poles: Tensor, dtype: torch.dtype) -> Tensor:
    """Keep the real poles and those in the upper half-plane: (B, n) to (B, m).

    A pair that `dtype` cannot distinguish from the real axis becomes two equal real poles.
    """
    real = poles.imag.abs() <= torch.finfo(dtype).eps * poles.abs()
    poles = torch.where(real, poles.real.to(poles.dtype), poles)
    dropped = poles.isnan() | (poles.imag < 0)
    modes = int((~dropped).sum(-1).max()) if poles.numel() else 0
    place = dropped.to(torch.uint8).argsort(dim=-1, stable=True)[:, :modes]
    return poles.masked_fill(dropped, torch.nan).gather(-1, place)


def real_basis(poles: Tensor, length: int) -> Tensor:
    """Return the rows `Re λ^t` above the rows `Im λ^t`: (B, 2m, length)."""
    columns = max(1, math.isqrt(length))
    rows = -(-length // columns)
    inner = geometric_powers(poles, columns).unsqueeze(-2)  # (B, m, 1, J)
    outer = geometric_powers(inner[..., 0, -1] * poles, rows).unsqueeze(-1)  # (B, m, I, 1)
    # Products of denormal numbers are slow to compute and negligible.
    outer = torch.where(outer.abs() < 1e-150, 0, outer)
    basis = poles.real.new_empty(len(poles), 2, poles.shape[-1], rows, columns)
    torch.mul(outer.real, inner.real, out=basis[:, 0])
    torch.mul(outer.real, inner.imag, out=basis[:, 1])
    basis[:, 0].addcmul_(outer.imag, inner.imag, value=-1)
    basis[:, 1].addcmul_(outer.imag, inner.real)
    return basis.flatten(3).flatten(1, 2)[..., :length]


def _by_sums(
    taps: Tensor, poles: Tensor, kernels: Vandermonde, used: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Solve `argmin ‖taps - basisᵀ x‖² + eps² ‖x‖²` from geometric sums.

    The rows of the basis are scaled to unit length.

    Returns:
        x (B, 2m), and a mask (B) of the channels where x is inaccurate, because the factor is
        nearly singular or a sum is a small difference of large terms.
    """
    modes = poles.shape[-1]
    gram = basis_gram(geometric_sum(pole_products(poles), taps.shape[-1]))
    size = gram.diagonal(dim1=-2, dim2=-1)
    whole = (size[:, :modes] + size[:, modes:]).repeat(1, 2)  # Σ |λ|^2t
    cancelled = (used & ~(size > _CANCELLED * whole)).any(-1)
    scale = torch.where(used & (size > 0), size, 1).rsqrt() * used  # (B, 2m)
    gram = torch.nan_to_num(gram * scale.unsqueeze(-1) * scale.unsqueeze(-2))
    ridge = torch.where(used, eps**2, 1.0)
    gram.diagonal(dim1=-2, dim2=-1).add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(gram)

    def solved(signal: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        (moment,) = kernels.moments(signal, first=False)
        target = scale * torch.cat([moment.real, moment.imag], dim=-1) - ridge * x
        change = torch.cholesky_solve(target.unsqueeze(-1), factor).squeeze(-1)
        return change, torch.linalg.vecdot(target, change)

    x, energy = solved(taps, torch.zeros_like(scale))
    plain = scale * x
    residual = taps - kernels.combine(torch.complex(plain[:, :modes], -plain[:, modes:]))
    change, moved = solved(residual, x)
    x = scale * (x + change)
    unsafe = (failed != 0) | _is_singular(factor) | cancelled | ~x.isfinite().all(-1)
    return x, unsafe | ~_is_settled(energy, moved, residual, taps, eps)


def _is_singular(factor: Tensor) -> Tensor:
    """Return a mask (B) of the Cholesky factors (B, n, n) whose equations are nearly singular.

    The pivots do not show this. If several poles nearly coincide, the last pivots are rounding
    errors, far above the smallest eigenvalue. The squared norm of a factor's inverse, by contrast,
    is at least the reciprocal of that eigenvalue.
    """
    unit = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, unit.expand_as(factor), upper=False)
    return ~(inverse.square().sum((-2, -1)) * _SAFE_EIGENVALUE < 1)


def _is_settled(
    energy: Tensor, moved: Tensor, residual: Tensor, taps: Tensor, eps: float
) -> Tensor:
    """Return a mask (B) of the channels where another refinement is unnecessary.

    Let the first solution of the normal equations have the energy `energy` (B), and let a
    refinement move the fit by the energy `moved` (B). The next refinement would move it by about
    `moved² / energy`, since each refinement shrinks the error by the same factor. `residual` is the
    part of the taps that the first solution leaves.
    """
    left = residual.square().sum(-1) - moved
    floor = (eps * _SETTLED) ** 2 * taps.square().sum(-1)
    return moved.square() <= _SETTLED**2 * energy * torch.maximum(left, floor)


def _least_squares(basis: Tensor, used: Tensor, signal: Tensor, dtype: torch.dtype) -> Tensor:
    """Solve the problem of `_by_sums`, (B, 2m), from the basis itself and `signal` (B, T, 1)."""
    eps = torch.finfo(dtype).eps
    gram = torch.bmm(basis, basis.mT)
    scale = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = torch.where(scale > 0, 1 / scale, 0) * used
    scale = torch.nan_to_num(scale, posinf=0.0).unsqueeze(-1)  # (B, 2m, 1)
    gram = gram * scale * scale.mT
    ridge = torch.where(scale.squeeze(-1) > 0, eps**2, 1.0)
    gram.diagonal(dim1=-2, dim2=-1).add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(torch.nan_to_num(gram))
    target = scale * torch.bmm(basis, signal)
    x = torch.cholesky_solve(target, factor)
    residual = signal - torch.bmm(basis.mT, scale * x)
    left = scale * torch.bmm(basis, residual) - ridge.unsqueeze(-1) * x
    change = torch.cholesky_solve(left, factor)
    energy, moved = (target * x).sum((-2, -1)), (left * change).sum((-2, -1))
    x = x + change  # the refined solution
    settled = _is_settled(energy, moved, residual.squeeze(-1), signal.squeeze(-1), eps)
    unsafe = (failed != 0) | _is_singular(factor) | ~settled
    if bool(unsafe.any()):
        x[unsafe] = _damped(basis[unsafe], scale[unsafe], signal[unsafe], dtype)
    return (scale * x).squeeze(-1)


def _damped(basis: Tensor, scale: Tensor, signal: Tensor, dtype: torch.dtype) -> Tensor:
    """Solve the problem of `_least_squares` by QR and a damped SVD, if poles nearly coincide."""
    eps = torch.finfo(dtype).eps
    basis = torch.nan_to_num(basis, posinf=0.0, neginf=0.0)
    q, r = torch.linalg.qr((basis * scale).mT)
    left, values, right = torch.linalg.svd(r, full_matrices=False)
    moment = left.mT @ (q.mT @ signal)
    best, least = torch.zeros_like(basis[..., :1]), torch.full_like(signal[:, :1], torch.inf)
    for floor in sorted({max(eps, direction) for direction in _SMALLEST_DIRECTIONS}):
        damped = values / (values.square() + (floor * values[..., :1]) ** 2)
        x = right.mT @ (torch.where(values > 0, damped, 0).unsqueeze(-1) * moment)
        left_over = signal - basis.mT @ (scale * x).to(dtype).double()
        rounding = _ROUNDING * torch.finfo(torch.float64).eps * x.norm(dim=1, keepdim=True)
        error = torch.hypot(left_over.norm(dim=1, keepdim=True), rounding)
        best, least = torch.where(error < least, x, best), torch.minimum(error, least)
    return best
