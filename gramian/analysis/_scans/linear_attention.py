r"""Read linear attention (Katharopoulos et al. 2020, eqs. 16 to 20), with or without a normalizer.

`S_t = S_{t-1} + k_t u_tᵀ`, `z_t = z_{t-1} + k_t` and `y_t = S_tᵀ q_t / (z_t · q_t)`. The normalizer
depends on queries and keys only, so it is a factor of the operator's rows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gramian.analysis._scans._heads import gated_recurrence
from gramian.analysis._scans._reading import ScanReading, register

_EPSILON = 1e-10  # what the implementations add to the normalizer


@register("chunk_linear_attn", "fused_chunk_linear_attn")
def normalized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    **options: Any,
) -> ScanReading:
    """Return the reading of linear attention, by default with a normalizer.

    Args:
        q: The queries after the feature map, (batch, L, heads, n).
        k: The keys after the feature map, (batch, L, heads, n).
        v: The values, (batch, L, heads, N).
        scale: The factor of the queries, by default n^(-1/2).
        initial_state: (batch, heads, n, N), with a normalizer also this and the sum of earlier
            keys, (batch, 1, heads, n); None if it is zero.
        output_final_state: Whether the scan also returns its last state.
        normalize: Whether the outputs are divided by the normalizer.
        **options: Further options, as in `of_heads`.
    """
    kernel, keys = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    if normalize:
        factor = k.shape[-1] ** -0.5 if scale is None else float(scale)
        total = k.double().cumsum(1)
        if keys is not None:
            total = total + keys.double()
        size = (
            factor * (q.double() * total).sum(-1, keepdim=True) + _EPSILON
        )  # (batch, L, heads, 1)
        q = q.double() / size
    return gated_recurrence(q, k, v, None, scale, initial_state=kernel, **options)


@register("fused_recurrent_linear_attn")
def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    **options: Any,
) -> ScanReading:
    """Return the reading of linear attention, by default without a normalizer.

    Args:
        q: The queries after the feature map, (batch, L, heads, n).
        k: The keys after the feature map, (batch, L, heads, n).
        v: The values, (batch, L, heads, N).
        scale: The factor of the queries, by default n^(-1/2).
        initial_state: As in `normalized`.
        output_final_state: Whether the scan also returns its last state.
        reverse: Whether the row is read backwards, which is refused.
        normalize: Whether the outputs are divided by the normalizer.
        **options: Further options, as in `of_heads`.
    """
    return normalized(
        q,
        k,
        v,
        scale,
        initial_state,
        normalize=normalize,
        reverse=reverse,
        **options,
    )
