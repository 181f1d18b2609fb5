r"""Drop coordinates one by one, each time the one that adds least to the error.

The squared error of a dropped set J is `Σ_{i,j ∈ J} M_ij`. If j joins J, it grows by
`M_jj + 2 Σ_{i ∈ J} M_ij`. The smallest growth is taken greedily, because finding the best set of a
given size is hard.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["eliminate", "squared_errors"]


def eliminate(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order in which coordinates are dropped, and the squared errors.

    Args:
        gram: the Gram matrices, (groups, n, n), in double precision.

    Returns:
        The order, (groups, n): the first d entries are the set J of size d. The errors
        (groups, n + 1): the entry k is the squared error if k coordinates are kept.
    """
    groups, n = gram.shape[:2]
    growth = gram.diagonal(dim1=1, dim2=2).clone()
    order = torch.empty(groups, n, dtype=torch.long)
    errors = torch.zeros(groups, n + 1, dtype=torch.float64)
    rows = torch.arange(groups)
    gram, growth = gram.cpu(), growth.cpu()
    for dropped in range(n):
        least = growth.argmin(1)
        order[:, dropped] = least
        errors[:, n - dropped - 1] = errors[:, n - dropped] + growth[rows, least]
        growth += 2 * gram[rows, least]
        growth[rows, least] = torch.inf
    return order, errors.clamp_(min=0.0)


def squared_errors(gram: Tensor, kept: Tensor) -> Tensor:
    """Return the squared error of every group, (groups), if only some coordinates are kept.

    Args:
        gram: (groups, n, n).
        kept: indices of the coordinates, (groups, k).
    """
    dropped = torch.ones(gram.shape[:2], dtype=gram.dtype, device=gram.device)
    dropped.scatter_(1, kept.to(gram.device), 0.0)
    return torch.einsum("gi,gij,gj->g", dropped, gram, dropped).clamp(min=0.0)
