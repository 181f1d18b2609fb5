r"""Read gated linear attention (Yang et al. 2024), with one gate for each state or for each head.

`S_t = diag(e^{g_t}) S_{t-1} + k_t u_tᵀ` and `y_t = scale · S_tᵀ q_t`. Simple gated linear attention
has one gate for each head, which may depend on the input, be constant, or both.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gramian.analysis._scans._heads import gated_recurrence
from gramian.analysis._scans._reading import ScanReading, register


@register("chunk_gla", "fused_chunk_gla")
def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    **options: Any,
) -> ScanReading:
    """Return the reading of gated linear attention.

    Args:
        q: The queries, (batch, L, heads, n).
        k: The keys, (batch, L, heads, n).
        v: The values, (batch, L, heads, N).
        g: Logarithms of the gates, (batch, L, heads, n).
        scale: The factor of the outputs, by default n^(-1/2).
        initial_state: (batch, heads, n, N); None if it is zero.
        **options: Further options, as in `of_heads`.
    """
    return gated_recurrence(q, k, v, g, scale, initial_state=initial_state, **options)


@register("fused_recurrent_gla")
def recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    **options: Any,
) -> ScanReading:
    """Return the reading of gated linear attention in its recurrent form.

    Args:
        q: The queries, (batch, L, heads, n).
        k: The keys, (batch, L, heads, n).
        v: The values, (batch, L, heads, N).
        gk: Logarithms of the gates, (batch, L, heads, n); None if all gates are 1.
        gv: Gates of the value channels, which are refused.
        scale: The factor of the outputs, by default n^(-1/2).
        initial_state: (batch, heads, n, N); None if it is zero.
        **options: Further options, as in `of_heads`.

    Raises:
        ValueError: if value channels have gates, since a head then has several operators.
    """
    if gv is not None:
        raise ValueError(
            "gated linear attention is read without gates of value channels; got gv "
            f"{tuple(gv.shape)}."
        )
    return gated_recurrence(q, k, v, gk, scale, initial_state=initial_state, **options)


@register("chunk_simple_gla", "fused_chunk_simple_gla", "fused_recurrent_simple_gla")
def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    **options: Any,
) -> ScanReading:
    """Return the reading of simple gated linear attention.

    Args:
        q: The queries, (batch, L, heads, n).
        k: The keys, (batch, L, heads, n).
        v: The values, (batch, L, heads, N).
        g: Logarithms of the gates, (batch, L, heads); None if there are none.
        g_gamma: Logarithms of constant gates, (heads); None if there are none.
        scale: The factor of the outputs, by default n^(-1/2).
        initial_state: (batch, heads, n, N); None if it is zero.
        **options: Further options, as in `of_heads`.
    """
    log = g
    if g_gamma is not None:
        log = g_gamma if g is None else g.double() + g_gamma.double()
    return gated_recurrence(q, k, v, log, scale, initial_state=initial_state, **options)


@register("parallel_simple_gla")
def parallel_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    **options: Any,
) -> ScanReading:
    """Return the reading of simple gated linear attention in its parallel form.

    Args:
        q: The queries, (batch, L, heads, n).
        k: The keys, (batch, L, heads, n).
        v: The values, (batch, L, heads, N).
        g: Logarithms of the gates, (batch, L, heads); None if there are none.
        scale: The factor of the outputs, by default n^(-1/2).
        **options: Further options, as in `of_heads`.
    """
    return gated_recurrence(q, k, v, g, scale, **options)
