r"""Read lightning attention (Qin et al. 2024), whose rates of decay depend on head and layer.

`S_t = λ_h S_{t-1} + k_t u_tᵀ` and `y_t = scale · S_tᵀ q_t`, with
`log λ_h = -(8 h / H) (1 - layer / layers)` for the heads h = 0, …, H - 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gramian.analysis._scans._heads import gated_recurrence
from gramian.analysis._scans._reading import ScanReading, register


@register("chunk_lightning_attn", "fused_recurrent_lightning_attn")
def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    **options: Any,
) -> ScanReading:
    """Return the reading of lightning attention.

    Args:
        q: The queries, (batch, L, heads, n).
        k: The keys, (batch, L, heads, n).
        v: The values, (batch, L, heads, N).
        layer_idx: The index of the layer.
        num_layers: The number of layers.
        scale: The factor of the outputs, by default n^(-1/2).
        initial_state: (batch, heads, n, N); None if it is zero.
        **options: Further options, as in `of_heads`.
    """
    heads = q.shape[2]
    head = torch.arange(heads, dtype=torch.float64, device=q.device)
    rates = -(8 / heads * (1 - layer_idx / num_layers)) * head
    return gated_recurrence(q, k, v, rates, scale, initial_state=initial_state, **options)
