r"""Read the second gated delta rule, which has gates for what it erases and for what it writes.

`S_t = (I - k_t (b_t k_t)ᵀ) diag(e^{g_t}) S_{t-1} + k_t (w_t u_t)ᵀ` and `y_t = scale · S_tᵀ q_t`,
with gates b of key channels and w of value channels. The values of the reading are the products
`w_t u_t`, since w acts on the present input only.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gramian.analysis._scans._heads import state_gates, unit
from gramian.analysis._scans._reading import ScanReading, register
from gramian.analysis._scans.generalized_delta import diagonal_plus_low_rank


@register("chunk_gdn2", "fused_recurrent_gdn2")
def gated_delta_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    **options: Any,
) -> ScanReading:
    """Return the reading of the second gated delta rule.

    Args:
        q: The queries, (batch, L, heads, n).
        k: The keys, (batch, L, heads, n).
        v: The values before their gates, (batch, L, heads, N).
        g: Logarithms of the gates of the state, (batch, L, heads, n).
        b: Gates of what is erased, (batch, L, heads, n).
        w: Gates of what is written, (batch, L, heads, N).
        scale: The factor of the outputs, by default n^(-1/2).
        initial_state: (batch, heads, n, N); None if it is zero.
        use_qk_l2norm_in_kernel: Whether the scan normalizes queries and keys.
        use_gate_in_kernel: Whether the scan computes the gates of the state, as in `state_gates`.
        A_log: As in `state_gates`.
        dt_bias: As in `state_gates`.
        lower_bound: As in `state_gates`.
        **options: Further options, as in `of_heads`.
    """
    q, k, values = q.double(), k.double(), v.double() * w.double()
    if use_qk_l2norm_in_kernel:
        q, k = unit(q), unit(k)
    if use_gate_in_kernel and A_log is not None:
        g = state_gates(g, A_log, dt_bias, lower_bound)
    erased = g.double().exp() * b.double() * k
    return diagonal_plus_low_rank(
        q, k, values, erased, -k, g, scale, initial_state=initial_state, **options
    )
