"""Hankel singular values of a state-space system, from square-root factors of its Gramians.

Forming a Gramian squares the condition number and so loses half of the digits. The triangular
factors are computed without forming the Gramians, and lose no digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gramian.ops.similarity import reached

__all__ = ["check_spectral_radius", "infinite_hankel_singular_values"]


def infinite_hankel_singular_values(A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Compute the Hankel singular values over the infinite horizon.

    Args:
        A: (*C, n, n), float64: the state matrix, which is stable and has bounded powers.
        B: (*C, n), float64: the input vector.
        C: (*C, n), float64: the output vector.

    Returns:
        (*C, n), float64, descending.
    """
    reach, observe = reached(A, B.unsqueeze(-2)), reached(A.mT, C.unsqueeze(-2))
    return torch.linalg.svdvals(observe @ reach.mT)


def check_spectral_radius(radius: Tensor) -> None:
    """Raise a ValueError unless every pole is inside the unit circle.

    If a pole is on or outside it, there are no Hankel singular values over the infinite horizon.

    Args:
        radius: (*C): for every channel, the largest modulus of a pole.
    """
    if bool((~(radius < 1)).any()):
        raise ValueError(
            "the infinite horizon needs every pole inside the unit circle; got spectral radius "
            f"{float(radius.max()):.6g}; give `length` for a finite one."
        )
