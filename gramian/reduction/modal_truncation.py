r"""Modal truncation, which keeps the modes with the most energy.

Over the taps, a mode `Re(r λ^t)` has the energy `½ |r|² Σ_t |λ|^{2t} + ½ Re(r² Σ_t λ^{2t})`. On the
infinite horizon this is near `|r|² / (2 (1 - |λ|²))` (L. A. Aguirre, "Quantitative measure of modal
dominance for continuous systems", CDC 1993). Unlike balanced truncation, this measure ignores how
modes overlap. The residues of the kept modes are fitted again to all taps.

If the system is a `gramian.Modal` or a `gramian.TransferFunction`, the modes are given by its
poles. Otherwise they are the modes of a larger balanced truncation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gramian.reduction.balanced import balanced_poles
from gramian.reduction.basis import geometric_sum
from gramian.reduction.problem import Problem, SourceModes
from gramian.reduction.residues import ModalFit, fit_residues, stabilized
from gramian.reduction.spectrum import hankel_matrices, leading_spectrum

__all__ = ["dominant_modes", "modal_truncation"]


def modal_truncation(problem: Problem, order: Tensor, rows: Tensor) -> ModalFit:
    """Fit the channels `rows` of a problem with their dominant modes.

    Args:
        problem: The kernels, the settings and, if known, the modes of the systems.
        order: (len(rows)), integers: the largest order of every fit.
        rows: The indices of the channels.
    """
    taps = problem.taps[rows]
    best = problem.silence(rows)
    everywhere = torch.arange(len(rows), device=rows.device)
    if problem.source is None:
        candidates = _realized(problem, order, rows)
    else:
        candidates = [problem.source[rows]]
    for modes in candidates:
        poles, residues = modes.poles, modes.residues
        if problem.settings.stable:
            poles = stabilized(poles, problem.settings.dtype)
        if residues is None:
            fit = fit_residues(taps, poles, torch.float64)
            poles, residues = fit.poles, fit.residues
        kept = dominant_modes(poles, residues, order, taps.shape[-1])
        problem.offer(best, torch.where(kept, poles, torch.nan), rows, everywhere)
    return best


def _realized(problem: Problem, order: Tensor, rows: Tensor) -> list[SourceModes]:
    """Return balanced truncations of at least twice the order, one per treatment of the tail."""
    taps = problem.taps[rows]
    count = min(2 * int(order.max()) + 16, max(1, taps.shape[-1]))
    found = []
    for tail in problem.settings.tails:
        spectrum = leading_spectrum(hankel_matrices(taps, tail), count)
        poles = balanced_poles(spectrum, torch.full_like(order, count))
        found.append(SourceModes(poles, None))
    return found


def dominant_modes(poles: Tensor, residues: Tensor, order: Tensor, length: int) -> Tensor:
    """Choose the modes with the most energy that fit into the order: a mask (B, m).

    Args:
        poles: (B, m), complex128: the poles, one of each pair. An unused entry is NaN or has
            residue 0.
        residues: (B, m), complex128: their residues.
        order: (B), integers: the largest order, of which a pair takes 2 and a real pole 1.
        length: The number of taps.
    """
    absent = poles.isnan() | (residues == 0)
    poles, residues = torch.where(absent, 0, poles), torch.where(absent, 0, residues)
    size = geometric_sum(poles.abs().square(), length)
    swing = geometric_sum(poles.square(), length)
    energy = residues.abs().square() * size + (residues.square() * swing).real
    energy = torch.where(absent, -1.0, torch.nan_to_num(energy, torch.inf))
    cost = torch.where(absent, order.unsqueeze(-1) + 1, 1 + (poles.imag != 0).long())
    kept = torch.zeros_like(absent)
    left = order.clone()
    for slot in energy.argsort(dim=-1, descending=True, stable=True).unbind(-1):
        slot = slot.unsqueeze(-1)
        fits = cost.gather(-1, slot).squeeze(-1) <= left
        left = torch.where(fits, left - cost.gather(-1, slot).squeeze(-1), left)
        kept.scatter_(-1, slot, fits.unsqueeze(-1))
    return kept
