"""Compute the rank correlation of two measurements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["rank_correlation"]


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation of two sequences of equal length.

    Equal values have the mean of their ranks. If a sequence is constant, the result is None.
    """
    ranks = torch.stack([_ranks(torch.tensor(values, dtype=torch.float64)) for values in (x, y)])
    ranks = ranks - ranks.mean(-1, keepdim=True)
    norms = torch.linalg.vector_norm(ranks, dim=-1)
    if not bool((norms > 0).all()):
        return None
    return float(ranks[0] @ ranks[1] / norms.prod())


def _ranks(values: Tensor) -> Tensor:
    _, place, count = values.unique(sorted=True, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2)[place]
