"""Hankel singular values of a state-space system by square-root factors.

Gramians square the condition number and lose half the digits; their triangular factors do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_spectral_radius", "reachability_factor"]

_MAX_DOUBLINGS = 64


def reachability_factor(A: Tensor, B: Tensor) -> Tensor:
    """R with ``RᵀR = Σ_t A^t B Bᵀ (A^t)ᵀ`` over the infinite horizon, by doubling.

    Args:
        A: (*C, n, n), float64, spectral radius below 1.
        B: (*C, n).

    Returns:
        (*C, k, n), upper triangular, k ≤ n.
    """
    factor = B.unsqueeze(-2)
    power = A
    for _ in range(_MAX_DOUBLINGS):
        further = factor @ power.mT  # the next stretch of the horizon, as long as all before
        factor = torch.linalg.qr(torch.cat([factor, further], dim=-2), mode="r")[1]
        if bool((further.square().sum() <= 1e-34 * factor.square().sum()).all()):
            break
        power = power @ power
    return factor


def check_spectral_radius(radius: Tensor) -> None:
    """Raise a ValueError unless every pole is inside the unit circle: the infinite horizon.

    Args:
        radius: The largest modulus of a pole, for every channel.
    """
    if bool((radius >= 1).any()):
        raise ValueError(
            "the infinite horizon needs every pole inside the unit circle, got spectral radius "
            f"{float(radius.max()):.6g}; give `length` for a finite one."
        )
