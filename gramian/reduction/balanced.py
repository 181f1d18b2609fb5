r"""Balanced truncation of kernels, refined: the default method.

Kung's method, or the eigensystem realisation algorithm (ERA), gives the poles in closed form.

The leading n left singular vectors U of a Hankel matrix span the outputs that n states can leave
behind. The span of an observability matrix ``[C; CA; CA²; …]`` is invariant under a shift of its
rows, so ``A = U[:-1]⁺ U[1:]``, and the poles are its eigenvalues (S. Kung, "A new identification
and model reduction algorithm via singular value decomposition", 1978). U has orthonormal columns,
so with l its last row ``U[:-1]ᵀ U[:-1] = I - l lᵀ``, whose inverse is ``I + l lᵀ / (1 - lᵀl)``.

These poles are near the best, not the best, in l2. They are the starts of a descent
(`gramian.reduction.refinement`), and where they leave much of the kernel, because its Hankel
spectrum is flat, a greedy search gives another start and modes are moved to where they are missed.
What comes out of it is kept only where its measured error is smaller.
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
from gramian.reduction.spectrum import Spectrum

__all__ = ["balanced", "balanced_poles", "refined_further"]

_FLAT = 0.05
"""Relative error from which a greedy start is tried: there a spectrum has no few leading values."""

_HOPELESS = 30.0
"""A start this many times farther than another one is not refined."""

_LARGEST_GREEDY = 64
"""The largest order of a greedy start, which takes a transform for every pole."""

_HEAT = 8
"""Steps after which the starts of a channel are compared."""

_STEPS = 8
"""Steps of the leading start after that: most channels have settled by then."""

_STEPS_AFTER_MOVE = 8

_STEPS_FURTHER = 20

_MOVES = 1
"""How often the mode that is missed least is moved elsewhere."""


def balanced(problem: Problem, order: Tensor, rows: Tensor) -> ModalFit:
    """The closest fits of the given orders to the channels ``rows`` of a problem.

    Args:
        problem: Kernels and settings; ``settings.refine`` false: closed form only.
        order: (len(rows)), integers.
        rows: Channels, indices.
    """
    settings = problem.settings
    best = problem.silence(rows)
    everywhere = torch.arange(len(rows), device=rows.device)
    starts = []
    for tail in settings.tails:
        poles = _balanced_poles(problem, tail, order, rows)
        starts.append(problem.offer(best, poles, rows, everywhere))
    taps = problem.taps[rows]
    complete = torch.nonzero(order >= taps.shape[-1]).flatten()
    if len(complete):
        problem.offer(best, _ring(taps[complete]), rows, complete)
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
    """Refine the starts of the channels ``rows[open_]`` and improve ``best``."""
    settings = problem.settings
    taps = problem.taps[rows[open_]]
    arguments: dict[str, Any] = {
        "ridge": torch.finfo(settings.dtype).eps,
        "limit": settings.least_decay,
        "infinite": settings.fades,
    }
    flat = best.l2_error[open_] > _FLAT * taps.norm(dim=-1)
    everyone = torch.arange(len(open_), device=open_.device)
    # Of a flat spectrum both treatments of the tail give much the same: the closer one will do.
    least, leading = torch.stack([fit.l2_error[open_] for fit in starts]).min(0)
    batch: list[tuple[Modes, Tensor]] = []
    for i, fit in enumerate(starts):
        near = ~flat & (fit.l2_error[open_] <= _HOPELESS * least)
        some = torch.nonzero((near | (leading == i)) & least.isfinite()).flatten()
        there = fit[open_[some]]
        batch.append((Modes.of(torch.where(there.residues != 0, there.poles, torch.nan)), some))
    greedy = torch.nonzero(flat & (order[open_] <= _LARGEST_GREEDY)).flatten()
    if len(greedy):
        batch.append((greedy_modes(taps[greedy], order[open_[greedy]]), greedy))

    channel = torch.cat([some for _, some in batch])
    found, errors = refined(
        taps[channel], Modes.joined([modes for modes, _ in batch]), steps=_HEAT, **arguments
    )
    # A start that is behind by then seldom wins: only the leading one goes on.
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
    """Fits of the channels ``rows`` (indices), of their orders at most, refined under the settings
    of the problem from poles that are there."""
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
    """Keep what is closer over the taps, unless it pays for that with its tail."""
    taps = problem.taps[rows[where]]
    fit = fit_residues(taps, modes.poles_or_nan, problem.settings.dtype)
    before = best[where]
    old, new = (
        f.l2_error.square() + tail_energy(f.poles, f.residues, taps.shape[-1] + 1)
        for f in (before, fit)
    )
    some = new <= old
    problem.keep(best, fit[some], where[some])


def _ring(taps: Tensor) -> Tensor:
    """As many poles as taps, evenly spaced on a circle: they reproduce any taps, (B, T).

    Balanced truncation leaves nothing out at this order, and ends in a defective pole at zero.
    """
    count = taps.shape[-1]
    angle = 2 * math.pi / count * torch.arange(count, dtype=taps.dtype, device=taps.device)
    poles = torch.polar(torch.full_like(angle, 0.25 ** (1 / count)), angle)
    poles.imag[(angle == 0) | (2 * torch.arange(count, device=taps.device) == count)] = 0
    return poles.expand(len(taps), -1)


def _balanced_poles(problem: Problem, tail: str, order: Tensor, rows: Tensor) -> Tensor:
    """`balanced_poles` of the channels ``rows`` of a problem, piece after piece."""
    width = int(order.max())
    poles = torch.full((len(rows), width), torch.nan, dtype=torch.complex128, device=rows.device)
    for piece in problem.pieces:
        spectrum = piece.spectra[tail]
        inside = torch.nonzero((rows >= piece.first) & (rows < piece.first + len(spectrum)))
        inside = inside.flatten()
        if not len(inside):
            continue
        some = rows[inside] - piece.first
        if len(some) < len(spectrum):  # vectors are large: none is copied without need
            spectrum = spectrum[some]
        else:
            inside = inside[some.argsort()]
        found = balanced_poles(spectrum, order[inside])
        poles[inside, : found.shape[-1]] = found
    return poles


def balanced_poles(spectrum: Spectrum, order: Tensor) -> Tensor:
    """The poles of the balanced truncation of B kernels.

    Args:
        spectrum: At least as many singular vectors as the largest order.
        order: (B), integers. Singular vectors without a singular value have no poles, nor has the
            last vector of a complete basis, which cannot be shifted.

    Returns:
        (B, n), complex128, in conjugate pairs; channels of a lower order are padded with NaN.
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
        poles[rows, :n] = torch.linalg.eigvals(small)
    return poles
