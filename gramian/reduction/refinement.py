r"""Refinement of poles by variable projection, a Levenberg–Marquardt descent on the poles alone.

The objective is `φ(λ) = min_c ‖h - Φ(λ) c‖₂²` over the taps h_1 … h_T, where Φ is the real basis
`Re λ^t, Im λ^t`. The residues c are projected out (G. H. Golub, V. Pereyra, "The differentiation of
pseudo-inverses and nonlinear least squares problems whose variables separate", 1973). The Jacobian
is approximated as by L. Kaufman ("A variable projection method for solving separable nonlinear
least squares problems", 1975). A change dω of `log λ` changes the fit by `Re(r t λ^t dω)`, so with
the columns `E = (Re t λ^t, Im t λ^t)` a step is one linear least-squares problem in [Φ E].

The Gram matrix of [Φ E] holds geometric sums `Σ_t t^p z^t`, p = 0, 1, 2, where z is a product of
two poles. These sums are computed by doubling. The right-hand side and the residual are Vandermonde
products in √T × √T blocks. So a step takes O(n² log T + n T) operations and does not form the
basis. If poles nearly coincide, the basis is formed after all, and its QR decomposition gives the
factor of the Gram matrix. Both ways use the same ridge as the final fit of the residues
(`gramian.reduction.residues`).

The descent moves a pair in decay and angle, and a real pole in decay. A pair stays a pair, and a
real pole stays real. A decay at the edge of stability stays there while the descent pushes it
outwards.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from gramian.ops.lengths import fft_length
from gramian.reduction.basis import (
    Modes,
    Vandermonde,
    basis_gram,
    geometric_sum,
    geometric_sums,
    geometric_tail_sums,
    pole_products,
)
from gramian.reduction.residues import real_basis

__all__ = ["greedy_modes", "insert_mode", "refined", "relocated", "remainder"]

_SAFE_PIVOT = 1e-10
"""The smallest squared Cholesky pivot with which the Gram matrix is accurate enough."""

_PRECISE_PIVOT = 1e-8
"""If the squared pivots are at least this, a solution with the Gram matrix needs no refinement."""

_PRECISE_ERROR = 1e-5
"""If the relative squared error is at least this, differences of squares are precise enough."""

_LARGEST_QR = 128
"""The largest number of columns [Φ E] that are factored by QR. A wider basis is not refined."""

_SMALLEST_DIRECTION = 1e-9
"""Smallest relative ridge on the residues."""

_FIRST_DAMPING = 1e-2
_LARGEST_DAMPING = 1e6

_WINDOWS = 6
"""The number of decays among which a greedy search looks for the next pole."""


def _joint_gram(sums: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Compute the inner products of the columns [Φ E], (B, 4m, 4m), from the geometric sums."""
    g0, g1, g2 = (basis_gram(s) for s in sums)
    return torch.cat([torch.cat([g0, g1], dim=-1), torch.cat([g1, g2], dim=-1)], dim=-2)


@dataclasses.dataclass
class _Point:
    """The projected problem at given poles.

    Args:
        error: (B): the objective φ, plus the ridge term and, on the infinite horizon, the energy of
            the tail.
        residues: (B, m), complex128: the best residues.
        jacobian: (B, 2m, 2m): maps changes of (-decay, angle) to changes of the fit, in an
            orthonormal basis.
        target: (B, 2m): the residual in that basis.
    """

    error: Tensor
    residues: Tensor
    jacobian: Tensor
    target: Tensor

    def put(self, where: Tensor, other: _Point) -> None:
        for field in dataclasses.fields(self):
            getattr(self, field.name)[where] = getattr(other, field.name)

    def __getitem__(self, index: Tensor) -> _Point:
        return _Point(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))


def _point(taps: Tensor, modes: Modes, ridge: float, infinite: bool) -> _Point:
    poles = modes.poles
    width = poles.shape[-1]
    length = taps.shape[-1]
    products = pole_products(poles)
    sums = geometric_sums(products, length)
    gram = _joint_gram(sums)  # (B, 4m, 4m)
    tail = None
    if infinite:
        tail = _joint_gram(geometric_tail_sums(products, sums, length))
        gram = gram + tail
    paired = modes.present & ~modes.real
    used = torch.cat([modes.present, paired, modes.present, paired], dim=-1)
    size = gram.diagonal(dim1=-2, dim2=-1)
    used = used & (size > 0) & size.isfinite()
    scale = torch.where(used, size, 1).rsqrt() * used  # (B, 4m)
    gram = torch.nan_to_num(gram * scale.unsqueeze(-1) * scale.unsqueeze(-2), 0.0, 0.0, 0.0)
    ridges = torch.where(used, ridge**2, 1.0)
    # The columns of the Jacobian get a ridge of the size of their rounding errors.
    ridges[:, 2 * width :].clamp_(min=1e-14)
    gram.diagonal(dim1=-2, dim2=-1).add_(ridges)
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivot = factor.diagonal(dim1=-2, dim2=-1).square().amin(-1)

    kernels = Vandermonde(poles, length)
    half = 2 * width
    front, scale0 = factor[:, :half, :half], scale[:, :half]
    goal = scale * _stacked(kernels.moments(taps))  # (B, 4m)
    weights = torch.cholesky_solve(goal[:, :half].unsqueeze(-1), front).squeeze(-1)  # scaled
    size = taps.square().sum(-1)
    error = size - (weights * goal[:, :half]).sum(-1)
    left = goal - (gram[..., :half] @ weights.unsqueeze(-1)).squeeze(-1)
    vague = (pivot < _PRECISE_PIVOT) | (error < _PRECISE_ERROR * size)
    if bool(vague.any()):
        # For these channels the formula is a difference of large numbers, so the residual itself is
        # computed and refined once. The other channels are left out, so no result depends on other
        # channels.
        better = weights
        for again in (True, False):
            plain = scale0 * better
            residual = taps - kernels.combine(_residues(plain))
            below = _stacked(kernels.moments(residual))
            if tail is not None:
                below = below - (tail[..., :half] @ plain.unsqueeze(-1)).squeeze(-1)
            below = scale * below
            below[:, :half] -= ridge**2 * better
            if again:
                change = torch.cholesky_solve(below[:, :half].unsqueeze(-1), front)
                better = better + change.squeeze(-1)
        closer = residual.square().sum(-1) + ridge**2 * better.square().sum(-1)
        if tail is not None:
            inside = tail[:, :half, :half] @ plain.unsqueeze(-1)
            closer = closer + (plain * inside.squeeze(-1)).sum(-1)
        error = torch.where(vague, closer, error)
        weights = torch.where(vague.unsqueeze(-1), better, weights)
        left = torch.where(vague.unsqueeze(-1), below, left)
    residues = _residues(scale0 * weights)
    whole = torch.linalg.solve_triangular(factor, left.unsqueeze(-1), upper=False).squeeze(-1)
    # L22ᵀ maps scaled columns of E, without their part in the span of Φ, to an orthonormal basis.
    inner = factor[:, 2 * width :, 2 * width :].mT
    target = whole[:, 2 * width :]

    unsafe = (failed != 0) | ~(pivot > _SAFE_PIVOT) | ~error.isfinite()
    if infinite or 4 * width > _LARGEST_QR:
        error = torch.where(failed != 0, torch.inf, error)
    elif bool(unsafe.any()):
        rows = torch.nonzero(unsafe).flatten()
        exact = _by_qr(taps[rows], poles[rows], scale[rows], ridge)
        error[rows], residues[rows], inner[rows], target[rows] = exact
    error = torch.where(error.isfinite(), error, torch.inf)
    return _Point(error, residues, _jacobian(inner, residues, scale, used), target)


def _stacked(moments: list[Tensor]) -> Tensor:
    """Stack the inner products with the columns [Φ E], (B, 4m), from complex moments."""
    return torch.cat([part for m in moments for part in (m.real, m.imag)], dim=-1)


def _residues(weights: Tensor) -> Tensor:
    """Return residues (B, m), complex128, from the weights (B, 2m) of `Re λ^t` and `Im λ^t`."""
    cosine, sine = weights.chunk(2, dim=-1)
    return torch.complex(cosine, -sine)


def _by_qr(
    taps: Tensor, poles: Tensor, scale: Tensor, ridge: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute error, residues, L22ᵀ and target of `_point` from the basis itself."""
    width, length = poles.shape[-1], taps.shape[-1]
    basis = real_basis(poles, length)[..., :length]  # (B, 2m, T)
    place = torch.arange(length, dtype=taps.dtype, device=taps.device)
    rows = torch.cat([basis, basis * place], dim=1) * scale.unsqueeze(-1)
    rows = torch.nan_to_num(torch.cat([rows, taps.unsqueeze(1)], dim=1), 0.0, 0.0, 0.0)
    below = torch.zeros(len(taps), 2 * width, 4 * width + 1, dtype=taps.dtype, device=taps.device)
    below[:, :, : 2 * width] = torch.diag_embed(torch.where(scale[:, : 2 * width] > 0, ridge, 1.0))
    matrix = torch.cat([rows.mT, below], dim=1)
    missing = 4 * width + 1 - matrix.shape[1]
    if missing > 0:
        matrix = torch.nn.functional.pad(matrix, (0, 0, 0, missing))
    r = torch.linalg.qr(matrix, mode="r").R
    front, column = r[:, : 2 * width, : 2 * width], r[..., -1:]
    weights = torch.linalg.solve_triangular(front, column[:, : 2 * width], upper=True)
    plain = scale[:, : 2 * width] * weights.squeeze(-1)
    residues = torch.complex(plain[:, :width], -plain[:, width:])
    error = column[:, 2 * width :].square().sum((-2, -1))
    inner = r[:, 2 * width : 4 * width, 2 * width : 4 * width]
    return error, residues, inner, column[:, 2 * width : 4 * width].squeeze(-1)


def _jacobian(inner: Tensor, residues: Tensor, scale: Tensor, used: Tensor) -> Tensor:
    """Multiply L22ᵀ with `Re(r t λ^t (dx + i dy))`, x = log |λ|, y the angle: (B, 2m, 2m)."""
    width = residues.shape[-1]
    over = torch.where(used, 1 / torch.where(used, scale, 1), 0)[:, 2 * width :]
    cosine, sine = (
        inner[..., :width] * over[:, None, :width],
        inner[..., width:] * over[:, None, width:],
    )
    a, b = residues.real.unsqueeze(-2), -residues.imag.unsqueeze(-2)
    pair = used[:, None, 3 * width :]
    return torch.cat([a * cosine + b * sine, torch.where(pair, b * cosine - a * sine, 0)], dim=-1)


def refined(
    taps: Tensor,
    modes: Modes,
    *,
    ridge: float,
    limit: float | None,
    infinite: bool,
    steps: int,
    tolerance: float = 1e-3,
) -> tuple[Modes, Tensor]:
    """Descend from the given poles until the error stops falling.

    Args:
        taps: (B, T), float64: h_1 … h_T.
        modes: The modes of B channels. A channel whose final error is larger than the first keeps
            its modes.
        ridge: The size of the penalty on residues, relative to the error: the rounding error of the
            dtype that will hold them.
        limit: The smallest decay. None means that every decay is allowed, so poles may lie outside
            the unit circle.
        infinite: Whether to minimize over the infinite horizon, where taps past T are zero, instead
            of over T taps.
        steps: The largest number of evaluations.
        tolerance: A channel is done when a step lowers the squared error by less than this
            fraction.

    Returns:
        The modes, and the remaining squared error, (B), which is infinite if no error could be
        computed.
    """
    ridge = max(ridge, _SMALLEST_DIRECTION)
    floor = -math.inf if limit is None else limit
    result = dataclasses.replace(modes, decay=modes.decay.clamp(min=floor)).clone()
    norm = taps.square().sum(-1)
    point = _point(taps, result, ridge, infinite)
    errors = point.error.clone()
    rows = torch.nonzero(errors.isfinite() & (errors > 1e-24 * norm)).flatten()
    point, here, taps = point[rows], result[rows], taps[rows]
    damping = taps.new_full((len(rows),), _FIRST_DAMPING)
    growth = torch.full_like(damping, 4.0)
    for _ in range(steps):
        if not len(rows):
            break
        step, predicted = _step(point, here, damping, floor)
        trial = _moved(here, step, floor)
        there = _point(taps, trial, ridge, infinite)
        gain = point.error - there.error
        better = gain > 0
        ratio = torch.where(better, gain / predicted.clamp(min=1e-300), 0)
        factor = (1 - (2 * ratio - 1) ** 3).clamp(0.1, 1.0)
        damping = torch.where(better, damping * factor, damping * growth)
        growth = torch.where(better, 4.0, 2 * growth)
        small = torch.where(better, gain, predicted) <= tolerance * point.error
        done = small | (damping > _LARGEST_DAMPING)
        chosen = torch.nonzero(better).flatten()
        if len(chosen) == len(rows):
            point, here = there, trial
        else:
            point.put(chosen, there[chosen])
            here.put(chosen, trial[chosen])
        if bool(done.any()):
            result.put(rows[done], here[done])
            errors[rows[done]] = point.error[done]
            left = torch.nonzero(~done).flatten()
            rows, point, here = rows[left], point[left], here[left]
            taps, damping, growth = taps[left], damping[left], growth[left]
    if len(rows):
        result.put(rows, here)
        errors[rows] = point.error
    return result, errors


def _step(point: _Point, modes: Modes, damping: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Compute the damped Gauss–Newton step (B, 2m) in (log-radius, angle), and its decrease."""
    jacobian, target = point.jacobian, point.target
    width = modes.decay.shape[-1]
    slope = (jacobian.mT @ target.unsqueeze(-1)).squeeze(-1)
    held = torch.zeros_like(slope, dtype=torch.bool)
    held[:, :width] = (modes.decay <= floor) & (slope[:, :width] > 0)
    size = jacobian.norm(dim=-2)
    size = torch.where((size > 0) & ~held, 1 / size, 0)
    scaled = torch.nan_to_num(jacobian * size.unsqueeze(-2), 0.0, 0.0, 0.0)
    identity = torch.diag_embed(damping.sqrt().unsqueeze(-1).expand_as(size))
    top = torch.cat([scaled, target.unsqueeze(-1)], dim=-1)
    below = torch.nn.functional.pad(identity, (0, 1))
    r = torch.linalg.qr(torch.cat([top, below], dim=-2), mode="r").R
    answer = torch.linalg.solve_triangular(r[:, :-1, :-1], r[:, :-1, -1:], upper=True)
    fitted = (scaled @ answer).squeeze(-1)
    predicted = target.square().sum(-1) - (target - fitted).square().sum(-1)
    return size * answer.squeeze(-1), predicted


def _moved(modes: Modes, step: Tensor, floor: float) -> Modes:
    width = modes.decay.shape[-1]
    # For steps of more than one in the logarithm, the linearization is meaningless.
    step = step.clamp(-1, 1)
    decay = torch.where(modes.present, modes.decay - step[:, :width], modes.decay)
    moving = modes.present & ~modes.real
    angle = torch.where(moving, modes.angle + step[:, width:], modes.angle).abs()
    angle = torch.where(angle > math.pi, 2 * math.pi - angle, angle)
    return Modes(decay.clamp(min=floor), angle, modes.real, modes.present)


def greedy_modes(taps: Tensor, order: Tensor) -> Modes:
    """Find poles one after the other, each at the peak of the residual's spectrum.

    This is orthogonal matching pursuit (S. Mallat, Z. Zhang, "Matching pursuits with time-frequency
    dictionaries", 1993; Y. C. Pati, R. Rezaiifar, P. S. Krishnaprasad, 1993) with damped cosines of
    several decays and all frequencies. The result is a start for kernels with a flat Hankel
    spectrum, for which balanced truncation does not find the leading directions well.

    Args:
        taps: (B, T), float64: h_1 … h_T.
        order: (B), integers: the orders, at least 1. An odd order ends with a real pole.
    """
    width = int((order + 1).max()) // 2
    new = taps.new_zeros(len(taps), width)
    modes = Modes(new + 1, new + 1, new > 0, new > 0)
    residual = taps
    for slot in range(width):
        left = order - 2 * slot
        for single in (False, True):
            rows = torch.nonzero((left == 1) if single else (left >= 2)).flatten()
            if len(rows):
                insert_mode(modes, rows, torch.full_like(rows, slot), residual[rows], single)
        if slot + 1 < width:
            residual = remainder(taps, modes[:, : slot + 1])
    return modes


def relocated(taps: Tensor, modes: Modes) -> tuple[Modes, Tensor]:
    """Move the least contributing mode to the place where the residual is largest.

    A pair may also replace two real poles.

    Returns:
        The modes, and a mask (B) of the channels in which a mode was moved.
    """
    _, weights, inverse = _projected(taps, modes)
    width = modes.decay.shape[-1]
    a, b = weights[:, :width], weights[:, width:]
    blocks = [[inverse[:, i * width :, j * width :] for j in (0, 1)] for i in (0, 1)]
    (kaa, kab), (_, kbb) = [
        [c[:, :width, :width].diagonal(dim1=-2, dim2=-1) for c in row] for row in blocks
    ]
    # This is how much the squared error grows without the mode.
    pair = (kbb * a * a - 2 * kab * a * b + kaa * b * b) / (kaa * kbb - kab * kab)
    pair = torch.where(modes.present & ~modes.real & ~pair.isnan(), pair.clamp(min=0), torch.inf)
    single = torch.where(modes.present & modes.real, a * a / kaa, torch.inf)
    cost, slot = pair.min(-1)
    modes = modes.clone()
    movable = cost.isfinite()
    if width > 1:
        costs, slots = single.topk(2, dim=-1, largest=False)
        reals = costs.sum(-1) < cost
        slot = torch.where(reals, slots[:, 0], slot)
        movable = movable | reals
        rows = torch.nonzero(reals).flatten()
        modes.present[rows, slots[rows, 1]] = False
    rows = torch.nonzero(movable).flatten()
    if not len(rows):
        return modes, movable
    modes.present[rows, slot[rows]] = False
    residual = remainder(taps[rows], modes[rows])
    insert_mode(modes, rows, slot[rows], residual, single=False)
    return modes, movable


def insert_mode(modes: Modes, rows: Tensor, slot: Tensor, residual: Tensor, single: bool) -> None:
    """Put the damped cosine (or real exponential) that is nearest to `residual` into a slot."""
    length = residual.shape[-1]
    points = fft_length(2 * length, 1)
    place = torch.arange(length, dtype=torch.float32, device=residual.device)
    decays = torch.logspace(
        math.log10(0.5 / length), math.log10(min(2.0, 128 / length)), _WINDOWS
    ).to(residual.device)
    windows = torch.exp(-decays.unsqueeze(-1) * place)  # (D, T)
    windows = windows / windows.norm(dim=-1, keepdim=True)
    height = residual.abs().amax(-1, keepdim=True).clamp(min=1e-300)
    signal = (residual / height).float()
    spectrum = torch.fft.rfft(signal.unsqueeze(1) * windows, n=points)  # (B, D, N/2 + 1)
    energy = spectrum.real.square() + spectrum.imag.square()
    step = 1
    if single:
        step = points // 2
        energy = energy[..., ::step]
    else:
        energy[..., 0] = energy[..., -1] = 0
    found = energy.flatten(1).argmax(-1)
    window, bin_ = found // energy.shape[-1], found % energy.shape[-1] * step
    modes.decay[rows, slot] = decays[window].to(modes.decay)
    angle = 2 * math.pi / points * bin_.to(modes.angle)
    modes.angle[rows, slot] = torch.where(bin_ * 2 == points, math.pi, angle)
    modes.real[rows, slot] = single
    modes.present[rows, slot] = True


def remainder(taps: Tensor, modes: Modes) -> Tensor:
    """Compute the residual of the taps (B, T), with the best residues for the modes."""
    return _projected(taps, modes)[0]


def _projected(taps: Tensor, modes: Modes) -> tuple[Tensor, Tensor, Tensor]:
    """Project the taps onto the span of the modes.

    Returns:
        The residual of the taps (B, T), the weights (B, 2m) of the basis vectors of unit length,
        and the inverse of their Gram matrix (B, 2m, 2m).
    """
    poles = modes.poles
    width, length = poles.shape[-1], taps.shape[-1]
    zeroth = geometric_sum(pole_products(poles), length)
    gram = basis_gram(zeroth)
    used = torch.cat([modes.present, modes.present & ~modes.real], dim=-1)
    size = gram.diagonal(dim1=-2, dim2=-1)
    used = used & (size > 0)
    scale = torch.where(used, size, 1).rsqrt() * used
    gram = gram * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    gram.diagonal(dim1=-2, dim2=-1).add_(torch.where(used, 1e-12, 1.0))
    factor, _ = torch.linalg.cholesky_ex(gram)
    kernels = Vandermonde(poles, length)
    (moment,) = kernels.moments(taps, first=False)
    goal = scale * torch.cat([moment.real, moment.imag], dim=-1)
    weights = torch.cholesky_solve(goal.unsqueeze(-1), factor).squeeze(-1)
    plain = scale * weights
    residual = taps - kernels.combine(torch.complex(plain[:, :width], -plain[:, width:]))
    return residual, weights, torch.cholesky_inverse(factor)
