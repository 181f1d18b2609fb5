"""Hankel singular values of a state-space system by square-root factors.

Gramians square the condition number and lose half the digits; their triangular factors do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gramian.ops.similarity import reached

__all__ = ["check_spectral_radius", "infinite_hankel_singular_values"]


def infinite_hankel_singular_values(A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Compute the values (*C, n), descending, for a stable state matrix with bounded powers.

    Args:
        A: (*C, n, n), float64.
        B: (*C, n).
        C: (*C, n).
    """
    reach, observe = reached(A, B.unsqueeze(-2)), reached(A.mT, C.unsqueeze(-2))
    return torch.linalg.svdvals(observe @ reach.mT)


def check_spectral_radius(radius: Tensor) -> None:
    """Raise a ValueError unless every pole is inside the unit circle: the infinite horizon.

    Args:
        radius: The largest modulus of a pole, for every channel.
    """
    if bool((~(radius < 1)).any()):
        raise ValueError(
            "the infinite horizon needs every pole inside the unit circle; got spectral radius "
            f"{float(radius.max()):.6g}; give `length` for a finite one."
        )
