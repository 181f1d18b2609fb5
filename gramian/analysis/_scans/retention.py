r"""Read retention (Sun et al. 2023, eq. 6), whose heads forget at constant rates.

`S_t = γ_h S_{t-1} + k_t u_tᵀ` and `y_t = scale · S_tᵀ q_t`, with `γ_h = 1 - 2^{-5-h}` for the heads
h = 0, 1, ….
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gramian.analysis._scans._heads import gated_recurrence
from gramian.analysis._scans._reading import ScanReading, register


@register(
    "chunk_retention", "fused_chunk_retention", "fused_recurrent_retention", "parallel_retention"
)
def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    **options: Any,
) -> ScanReading:
    """Return the reading of retention.

    Args:
        q: The queries, (batch, L, heads, n).
        k: The keys, (batch, L, heads, n).
        v: The values, (batch, L, heads, N).
        scale: The factor of the outputs, by default n^(-1/2).
        initial_state: (batch, heads, n, N); None if it is zero.
        **options: Further options, as in `of_heads`.
    """
    head = torch.arange(q.shape[2], dtype=torch.float64, device=q.device)
    rates = torch.log1p(-torch.exp2(-5 - head))
    return gated_recurrence(q, k, v, rates, scale, initial_state=initial_state, **options)
