r"""Balanced truncation of kernels with refined poles, the default method.

Kung's method, also called the eigensystem realization algorithm (ERA), gives the poles in closed
form. The leading n left singular vectors U of a Hankel matrix span the outputs that n states can
produce after the input has ended. The span of an observability matrix `[C; CA; CA²; …]` is
invariant under a shift of its rows, so `A = U[:-1]⁺ U[1:]`, and the poles are its eigenvalues (S.
Kung, "A new identification and model reduction algorithm via singular value decomposition", 1978).
U has orthonormal columns. With l its last row, `U[:-1]ᵀ U[:-1] = I - l lᵀ`, and the inverse of this
matrix is `I + l lᵀ / (1 - lᵀl)`.

These poles are close to the best poles in l2. A descent (`gramian.reduction.refinement`) starts
from them. If the Hankel spectrum of the kernel is flat, their error is large. In that case a greedy
search gives another start, and modes are moved to places where the residual is largest. A refined
fit is kept only if its measured error is smaller.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gramian.reduction.basis import Modes
from gramian.reduction.errors import tail_energy
from gramian.reduction.problem import Problem
from gramian.reduction.refinement import greedy_modes, refined, relocated
from gramian.reduction.residues import ModalFit, fit_residues
from gramian.reduction.spectrum import Spectrum, hankel_matrices

__all__ = ["balanced", "balanced_poles", "refined_further"]

_FLAT = 0.05
"""If the relative error exceeds this, the spectrum counts as flat, and a greedy start is tried."""

_HOPELESS = 30.0
"""A start is not refined if its error is this many times that of another start."""

_LARGEST_GREEDY = 64
"""The largest order of a greedy start, which needs one transform for every pole. For larger orders,
a start of this order is tried."""

_LEAST_FACTOR = 1e-6
"""The smallest factor by which a ring of poles decays per turn. From 1e-9 on, residues are
damped."""

_AMISS = 3.0
"""A closed form counts as worse than expected if the ratio of its error to the first omitted
singular value exceeds this. Most errors are smaller than that singular value."""

_SHORT = 64
"""For kernels of at most this many taps, every lower order that might be closer is tried."""

_STEPS_DOWN = (*range(1, 33), 40, 48, 64, 80, 96, 128, 160, 192)
"""The differences between the order and the lower orders that are tried for longer kernels."""

_SCATTER = 1.08
"""The factor by which the closed forms' errors scatter about a multiple of the lower bound if the
spectrum is flat."""

_TELLING = 1.85
"""For errors above this multiple of the lower bound, the bound shows how errors fall with the
order, but not how far they can fall."""

_SUSPECT = 1.6
"""Ratio of error to lower bound that is seldom exceeded if the spectrum is not flat."""

_STEPS_REFINED = 8
"""For long kernels, lower orders are also refined if they are at most this far below the order."""

_STEPS_ALWAYS = 4
"""Lower orders that are at most this far below the order are always tried, even if the errors of a
flat spectrum suggest otherwise."""

_NEAR_BOUND = 0.7
"""If the spectrum falls, the excess of a lower order's error over its lower bound, as a fraction of
this excess at the present order."""

_FARTHEST = 0.15
"""The largest excess of an error over its lower bound that is assumed, as a fraction of the
bound."""

_SPECTRAL_ROUNDING = 1e-6
"""The fraction of a squared Frobenius norm that singular values may lose by rounding."""

_SILENT = 1e-12
"""Relative error below which no lower order is tried."""

_CLOSE = 0.05
"""Half the relative distance below which two real poles are also tried as a double pole."""

_HEAT = 8
"""Number of steps after which the different starts of a channel are compared."""

_STEPS = 8
"""Number of further steps of the leading start, by which most channels have settled."""

_STEPS_AFTER_MOVE = 8

_STEPS_FURTHER = 20

_MOVES = 1
"""The number of times that the least contributing mode is moved to another place."""


def balanced(problem: Problem, order: Tensor, rows: Tensor) -> ModalFit:
    """Find the closest fits of the given orders to the channels `rows` of a problem.

    Args:
        problem: The kernels and the settings. If `settings.refine` is false, only the closed form
            is used.
        order: (len(rows)), integers: the largest order of every fit.
        rows: The indices of the channels.
    """
    settings = problem.settings
    short = settings.lower and problem.taps.shape[-1] < _SHORT
    best = _fitted(problem, order, rows, lower=not short)
    if not short and not (settings.refine and settings.lower):
        return best
    # Before lower orders are tried, only lower bounds of their errors are known.
    least = _least_errors(problem, rows)
    for less in range(1, int(order.max()) if short else _STEPS_REFINED + 1):
        may = _may_be_closer(problem, best, order - less, rows, least)
        if not short:
            may &= _is_suspect(problem, best, order, rows, least)
        some = torch.nonzero(may).flatten()
        if not len(some):
            break
        if short:  # refine all, so that rounding is the same as if this order had been requested
            some = torch.arange(len(rows), device=rows.device)
        fit = _fitted(problem, (order[some] - less).clamp(min=1), rows[some], lower=False)
        problem.keep(best, fit, some)
    return best


def _is_suspect(
    problem: Problem, best: ModalFit, order: Tensor, rows: Tensor, least: Tensor
) -> Tensor:
    """Return a mask (len(rows)) of the long kernels for which lower orders are worth refining.

    These are the kernels whose refined errors are far above their lower bounds.
    """
    bound = least.gather(-1, order.clamp(max=least.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    flat = best.l2_error > _FLAT * problem.taps[rows].norm(dim=-1)
    far = best.l2_error > torch.where(flat, _TELLING, _SUSPECT) * bound
    return far & (order <= torch.where(flat, _STEPS_REFINED, _LARGEST_GREEDY))


def _fitted(problem: Problem, order: Tensor, rows: Tensor, *, lower: bool) -> ModalFit:
    """Fit as `balanced` does. If `lower`, also start from the best closed form of a lower order."""
    settings = problem.settings
    best = problem.silence(rows)
    everywhere = torch.arange(len(rows), device=rows.device)
    starts = []
    for tail in settings.tails:
        poles = _balanced_poles(problem, tail, order, rows)
        starts.append(problem.offer(best, poles, rows, everywhere))
    leading = torch.stack([fit.l2_error for fit in starts]).argmin(0)
    taps = problem.taps[rows]
    _offer_rings(problem, best, order, rows)
    amiss = torch.nonzero(_amiss(problem, best, order, rows)).flatten()
    if len(amiss):
        starts.append(_spread_poles(problem, order, rows, amiss))
        problem.keep(best, starts[-1][amiss], amiss)
    if lower:
        starts.append(_lower_orders(problem, best, order, rows, leading))
        problem.keep(best, starts[-1], everywhere)
    if settings.refine:
        floor = torch.finfo(settings.dtype).eps * taps.norm(dim=-1)
        open_ = torch.nonzero((best.l2_error > floor) & (order < taps.shape[-1])).flatten()
        if len(open_):
            _refine(problem, order, rows, best, starts, open_)
    return best


def _refine(
    problem: Problem,
    order: Tensor,
    rows: Tensor,
    best: ModalFit,
    starts: list[ModalFit],
    open_: Tensor,
) -> None:
    """Refine the starts of the channels `rows[open_]`, and put better fits into `best`."""
    settings = problem.settings
    taps = problem.taps[rows[open_]]
    arguments: dict[str, Any] = {
        "ridge": torch.finfo(settings.dtype).eps,
        "limit": settings.least_decay,
        "infinite": settings.fades,
    }
    flat = best.l2_error[open_] > _FLAT * taps.norm(dim=-1)
    everyone = torch.arange(len(open_), device=open_.device)
    # For a flat spectrum both treatments of the tail give similar poles, so the closer treatment is
    # enough.
    least, leading = torch.stack([fit.l2_error[open_] for fit in starts]).min(0)
    batch: list[tuple[Modes, Tensor]] = []
    for i, fit in enumerate(starts):
        near = ~flat & (fit.l2_error[open_] <= _HOPELESS * least)
        some = torch.nonzero((near | (leading == i)) & least.isfinite()).flatten()
        there = fit[open_[some]]
        batch.append((Modes.of(torch.where(there.residues != 0, there.poles, torch.nan)), some))
    greedy = torch.nonzero(flat).flatten()
    if len(greedy):
        some = order[open_[greedy]].clamp(max=_LARGEST_GREEDY)
        batch.append((greedy_modes(taps[greedy], some), greedy))

    channel = torch.cat([some for _, some in batch])
    found, errors = refined(
        taps[channel], Modes.joined([modes for modes, _ in batch]), steps=_HEAT, **arguments
    )
    # A start that is behind at this point seldom wins, so only the leading start goes on.
    error = taps.new_full((len(batch), len(open_)), torch.inf)
    place = torch.full((len(batch), len(open_)), -1, device=open_.device)
    first = 0
    for i, (_, some) in enumerate(batch):
        place[i, some] = torch.arange(first, first + len(some), device=open_.device)
        error[i, some] = errors[first : first + len(some)]
        first += len(some)
    error, choice = error.min(0)
    some = torch.nonzero(error.isfinite()).flatten()
    modes = found[place[choice, everyone][some]]
    open_, taps, flat = open_[some], taps[some], flat[some]
    modes, error = refined(taps, modes, steps=_STEPS, **arguments)

    moving = torch.nonzero(flat).flatten()
    for _ in range(_MOVES):
        if not len(moving):
            break
        trial, movable = relocated(taps[moving], modes[moving])
        moving, trial = moving[movable], trial[movable]
        trial, after = refined(taps[moving], trial, steps=_STEPS_AFTER_MOVE, **arguments)
        better = after < error[moving]
        moving = moving[better]
        modes.put(moving, trial[better])
        error[moving] = after[better]

    if settings.fades:
        _offer_fading(problem, best, modes, rows, open_)
    else:
        problem.offer(best, modes.poles_or_nan, rows, open_)


def refined_further(problem: Problem, fit: ModalFit, rows: Tensor) -> ModalFit:
    """Refine fits of the channels `rows` (indices) further, without raising their orders.

    The descent starts from the poles of `fit` and uses the settings of the problem.
    """
    settings, taps = problem.settings, problem.taps[rows]
    modes, _ = refined(
        taps,
        Modes.of(torch.where(fit.residues != 0, fit.poles, torch.nan)),
        ridge=torch.finfo(settings.dtype).eps,
        limit=settings.least_decay,
        infinite=settings.fades,
        steps=_STEPS_FURTHER,
    )
    return fit_residues(taps, modes.poles_or_nan, settings.dtype)


def _offer_fading(
    problem: Problem, best: ModalFit, modes: Modes, rows: Tensor, where: Tensor
) -> None:
    """Accept fits that are closer over the taps and no farther on the infinite horizon."""
    taps = problem.taps[rows[where]]
    fit = fit_residues(taps, modes.poles_or_nan, problem.settings.dtype)
    before = best[where]
    old, new = (
        f.l2_error.square() + tail_energy(f.poles, f.residues, taps.shape[-1] + 1)
        for f in (before, fit)
    )
    some = new <= old
    problem.keep(best, fit[some], where[some])


def _amiss(problem: Problem, best: ModalFit, order: Tensor, rows: Tensor) -> Tensor:
    """Return a mask (len(rows)) of the channels whose closed form is worse than expected.

    In such a channel, the error is large compared with the first omitted Hankel singular value, or
    the Hankel matrix has too few rows for the order.
    """
    taps = problem.taps[rows]
    missed = torch.full_like(best.l2_error, torch.inf)
    for tail in problem.settings.tails:
        values = torch.nn.functional.pad(problem.leading_values(tail)[rows], (0, 1))
        place = order.clamp(max=values.shape[-1] - 1).unsqueeze(-1)
        missed = torch.minimum(missed, values.gather(1, place).squeeze(-1))
    floor = 16 * torch.finfo(problem.settings.dtype).eps * taps.norm(dim=-1)
    large = best.l2_error > _AMISS * missed + floor
    return large | ((order >= taps.shape[-1] // 2) & (best.l2_error > floor))


def _spread_poles(problem: Problem, order: Tensor, rows: Tensor, amiss: Tensor) -> ModalFit:
    """Fit the channels `rows[amiss]` after moving multiple poles apart.

    A modal system has no multiple poles, so the closed form gives poles that nearly coincide. A
    random change δ of the shift moves m such poles about δ^(1/m) apart. The result holds the
    closest of these fits. Channels outside of `amiss` have an infinite error in the result.
    """
    found = problem.silence(rows)
    found.l2_error[:] = torch.inf
    eps = torch.finfo(problem.settings.dtype).eps
    for tail in problem.settings.tails:
        for change in (0.0, eps, 30 * eps, math.sqrt(eps), 100 * math.sqrt(eps)):
            poles = _balanced_poles(problem, tail, order[amiss], rows[amiss], change)
            if change:
                problem.offer(found, poles, rows, amiss)
            problem.offer(found, _turned(poles), rows, amiss)
    return found


def _turned(poles: Tensor) -> Tensor:
    """Replace real poles that nearly coincide by closer conjugate pairs: (B, n).

    Real poles at a distance δ approximate a double pole with residues of size 1 / δ that cancel.
    The real and the imaginary part of a conjugate pair approximate a double pole without
    cancellation, even if the pair is very close.
    """
    real = (poles.imag == 0) & ~poles.isnan()
    place = torch.where(real, poles.real, torch.inf).argsort(dim=-1)
    poles = poles.gather(-1, place)  # real poles come first, in ascending order
    value = torch.where(real.gather(-1, place), poles.real, torch.nan)
    free = torch.ones_like(value[:, 0], dtype=torch.bool)
    poles = poles.clone()
    for k in range(value.shape[-1] - 1):
        left, right = value[:, k], value[:, k + 1]
        middle, half = (left + right) / 2, (right - left) / 2
        close = free & (half <= _CLOSE * middle.abs())  # false for complex poles
        turn = _LEAST_FACTOR * middle.abs()
        poles[close, k] = torch.complex(middle, turn)[close]
        poles[close, k + 1] = torch.complex(middle, -turn)[close]
        free = ~close
    least = _LEAST_FACTOR * poles.real.abs()
    flat = (poles.imag != 0) & (poles.imag.abs() <= _CLOSE * poles.real.abs())
    return torch.where(flat, torch.complex(poles.real, least * poles.imag.sign()), poles)


def _least_errors(problem: Problem, rows: Tensor) -> Tensor:
    """Compute lower bounds (len(rows), k + 1) of the errors over the taps for the orders 0 … k.

    This is the windowed bound of `gramian.reduction.errors`, which is exact for short kernels. For
    long kernels it is an estimate, in which the rest of the Frobenius norm replaces the singular
    values that were not computed. If silence is the only treatment of the tail, the zero-extended
    matrix replaces the windowed matrix. For systems that fade, the two matrices give similar
    bounds.
    """
    tail = "free" if "free" in problem.settings.tails else "zero"
    taps = problem.taps[rows]
    count = taps.shape[-1]
    if count < _SHORT:
        hankel = hankel_matrices(taps, "free")
        values = torch.linalg.svdvals(hankel.matrix())
    else:
        hankel = hankel_matrices(taps, tail)
        values = problem.ritz(tail)[rows]
    size = min(hankel.rows, hankel.columns)
    place = torch.arange(1, count + 1, device=taps.device)
    times = torch.minimum(place, hankel.rows + hankel.columns - place).clamp(0, size)
    whole = (times * taps.square()).sum(-1, keepdim=True)
    left = values.square().flip(-1).cumsum(-1).flip(-1)
    if values.shape[-1] < size:
        rest = (1 - _SPECTRAL_ROUNDING) * whole - left[:, :1]
        left = torch.nn.functional.pad(left, (0, 1)) + rest.clamp(min=0)
    else:
        left = torch.nn.functional.pad(left, (0, 1))
    return (left / size).sqrt()


def _may_be_closer(
    problem: Problem, best: ModalFit, lower: Tensor, rows: Tensor, least: Tensor
) -> Tensor:
    """Return a mask (len(rows)) of the channels that order `lower` may fit closer than `best`."""
    floor = max(_SILENT, torch.finfo(problem.settings.dtype).eps)
    place = lower.clamp(0, least.shape[-1] - 1).unsqueeze(-1)
    bound = least.gather(-1, place).squeeze(-1)
    error = best.l2_error
    silent = error <= floor * problem.taps[rows].norm(dim=-1)
    return (lower >= 1) & (error > bound) & ~silent


def _lower_orders(
    problem: Problem, best: ModalFit, order: Tensor, rows: Tensor, leading: Tensor
) -> ModalFit:
    """Find the closest closed-form fits of lower orders.

    If no lower order is closer than `best` in a channel, the channel has an infinite error in the
    result. If an order is much lower, and the lower bounds say little about a channel, only the
    treatment `leading` of its tail is tried.

    If the spectrum is flat, lower orders can be closer by chance. They can also be closer if some
    singular vectors consist of rounding errors, because these add meaningless poles.
    """
    found = problem.silence(rows)
    found.l2_error[:] = torch.inf
    closest = best[torch.arange(len(rows), device=rows.device)]
    least = _least_errors(problem, rows)
    bound = least.gather(-1, order.clamp(max=least.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    ratio = best.l2_error / bound.clamp(min=1e-300)
    falling = 1 + (_NEAR_BOUND * (ratio - 1)).clamp(0, _FARTHEST)
    flat = best.l2_error > _FLAT * problem.taps[rows].norm(dim=-1)
    dull = flat & (ratio > _TELLING)
    even = torch.where(dull, (ratio / _SCATTER).maximum(falling), falling)
    for less in _STEPS_DOWN:
        near = less <= _STEPS_ALWAYS
        beyond = falling if near else even
        may = _may_be_closer(problem, closest, order - less, rows, beyond.unsqueeze(-1) * least)
        some = torch.nonzero(may).flatten()
        if not len(some):
            break
        for i, tail in enumerate(problem.settings.tails):
            here = some if near else some[~dull[some] | (leading[some] == i)]
            if len(here):
                poles = _balanced_poles(problem, tail, order[here] - less, rows[here])
                fit = problem.offer(closest, poles, rows, here)
                problem.keep(found, fit, here)
    found.l2_error[found.l2_error >= best.l2_error] = torch.inf
    return found


def _offer_rings(problem: Problem, best: ModalFit, order: Tensor, rows: Tensor) -> None:
    """Try rings of poles for kernels that are zero after their first n taps, n being the order.

    A ring of m poles, evenly spaced on a circle, reproduces any m taps. It repeats these taps after
    each turn, multiplied by a factor c. If the kernel is silent after the taps, c is small, but not
    smaller than rounding allows, since residues grow as 1 / c. At this order, balanced truncation
    would omit nothing and give a multiple pole at zero.
    """
    taps = problem.taps[rows]
    place = torch.arange(1, taps.shape[-1] + 1, device=taps.device)
    support = torch.where(taps != 0, place, 0).amax(-1)
    short = (support > 0) & (support <= order)
    factor = max(math.sqrt(torch.finfo(problem.settings.dtype).eps), _LEAST_FACTOR)
    for count in support[short].unique().tolist():
        where = torch.nonzero(short & (support == count)).flatten()
        size = 0.25 if count == taps.shape[-1] else factor
        if count == 2:  # each of the two parts of an imaginary pair holds one tap
            pair = torch.tensor([1j, -1j], dtype=torch.complex128, device=taps.device)
            problem.offer(best, _LEAST_FACTOR * pair.expand(len(where), -1), rows, where)
        problem.offer(best, _ring(count, size, taps).expand(len(where), -1), rows, where)
    complete = torch.nonzero(order >= taps.shape[-1]).flatten()
    if len(complete):
        ring = _ring(taps.shape[-1], 0.25, taps)
        problem.offer(best, ring.expand(len(complete), -1), rows, complete)


def _ring(count: int, factor: float, like: Tensor) -> Tensor:
    """Return the solutions λ of `λ^count = factor`, (count), in exact conjugate pairs."""
    turn = torch.arange(count, dtype=like.dtype, device=like.device)
    angle = 2 * math.pi / count * turn
    poles = torch.polar(torch.full_like(angle, factor ** (1 / count)), angle)
    poles.imag[(turn == 0) | (2 * turn == count)] = 0
    return poles


def _balanced_poles(
    problem: Problem, tail: str, order: Tensor, rows: Tensor, spread: float = 0.0
) -> Tensor:
    """Compute `balanced_poles` for the channels `rows` of a problem, piece by piece."""
    width = int(order.max())
    poles = torch.full((len(rows), width), torch.nan, dtype=torch.complex128, device=rows.device)
    for piece in problem.pieces:
        spectrum = piece.spectra[tail]
        inside = torch.nonzero((rows >= piece.first) & (rows < piece.first + len(spectrum)))
        inside = inside.flatten()
        if not len(inside):
            continue
        some = rows[inside] - piece.first
        if len(some) < len(spectrum):  # vectors are large, so avoid unnecessary copies
            spectrum = spectrum[some]
        else:
            inside = inside[some.argsort()]
        found = balanced_poles(spectrum, order[inside], spread)
        poles[inside, : found.shape[-1]] = found
    return poles


def balanced_poles(spectrum: Spectrum, order: Tensor, spread: float = 0.0) -> Tensor:
    """Compute the poles of the balanced truncation of B kernels.

    Args:
        spectrum: The Hankel spectra, with at least as many singular vectors as the largest order.
        order: (B), integers: the order of every kernel. A singular vector whose singular value is
            zero gives no pole. The last vector of a complete basis gives none either, because it
            cannot be shifted.
        spread: The size of a random change of the shift, which separates multiple poles.

    Returns:
        (B, n), complex128, in conjugate pairs. Channels of a lower order are padded with NaN.
    """
    values, vectors = spectrum.values, spectrum.vectors  # (B, k), (B, k, rows)
    size = vectors.shape[-1]
    floor = size * torch.finfo(values.dtype).eps * values[:, :1]
    rank = (values > floor).sum(-1)
    order = torch.minimum(order.clamp(max=values.shape[-1]), rank)
    width = int(order.max())
    poles = torch.full(
        (len(values), width), torch.nan, dtype=torch.complex128, device=values.device
    )
    used = vectors[:, :width]
    shift = torch.bmm(used[..., :-1], used[..., 1:].mT)  # (B, n, n)
    last = used[..., -1]  # (B, n)
    for n in order.unique().tolist():
        if n == 0:
            continue
        rows = order == n
        small, end = shift[rows, :n, :n], last[rows, :n].unsqueeze(-1)
        room = 1 - end.square().sum(-2, keepdim=True)
        gain = torch.where(room > size * torch.finfo(values.dtype).eps, 1 / room, 0)
        small = small + gain * end @ (end.mT @ small)
        if spread:
            generator = torch.Generator().manual_seed(n)
            change = torch.randn(n, n, generator=generator, dtype=small.dtype) / math.sqrt(n)
            small = small + spread * change.to(small.device)
        poles[rows, :n] = torch.linalg.eigvals(small)
    return poles
