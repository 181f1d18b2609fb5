r"""HiPPO-LegS and its normal part.

HiPPO-LegS (Gu et al. 2020, arXiv 2008.07669, equation 3) is `x' = A x + B u` with

    A_nk = -√((2n+1)(2k+1)) for n > k, -(n+1) for n = k, 0 for n < k;   B_n = √(2n+1).

With `P_n = √(n + 1/2)`, the sum `A + P Pᵀ` is `-1/2` on its diagonal and skew-symmetric off it.
So it is normal, and `A = V (Λ - P̃ P̃*) V*` with V unitary and `P̃ = V* P` (S4, Gu et al. 2022,
arXiv 2111.00396, theorem 1 and appendix C). Since `B = √2 P`, also `B̃ = √2 P̃`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["NormalPlusLowRank", "normal_plus_low_rank"]


class NormalPlusLowRank(NamedTuple):
    """One mode of each conjugate pair, in order of rising frequency.

    Every field is (n // 2), complex128.
    """

    diagonal: Tensor
    """Λ: real part -1/2, imaginary part positive."""
    P: Tensor
    """P̃."""
    B: Tensor
    """B̃."""


@functools.lru_cache(maxsize=8)
def normal_plus_low_rank(state_size: int) -> NormalPlusLowRank:
    """Return HiPPO-LegS with an even number of real states, as diagonal plus low rank.

    The other modes are the conjugates of the returned modes. All callers share the result, so do
    not write to it.
    """
    with torch.device("cpu"):
        P = (torch.arange(state_size, dtype=torch.float64) + 0.5).sqrt()
        product = torch.outer(P, P)
        skew = product.triu(1) - product.tril(-1)  # A + P Pᵀ + 1/2
        # S = V (iω) V*, so that -iS is Hermitian with the real eigenvalues ω.
        frequencies, vectors = torch.linalg.eigh(-1j * skew)
        frequencies = frequencies[state_size // 2 :]
        # The phases of the eigenvectors are free. Here they are chosen to make P̃ and B̃ positive.
        transformed = (vectors[:, state_size // 2 :].mH @ P.to(vectors.dtype)).abs()
        transformed = transformed.to(vectors.dtype)
        diagonal = torch.complex(torch.full_like(frequencies, -0.5), frequencies)
    return NormalPlusLowRank(diagonal, transformed, transformed * 2**0.5)
