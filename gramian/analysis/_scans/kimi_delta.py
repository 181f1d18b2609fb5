r"""Read Kimi delta attention (Kimi Team 2025, eq. 1): the delta rule with a gate for each state.

`S_t = (I - β_t k_t k_tᵀ) diag(e^{g_t}) S_{t-1} + β_t k_t u_tᵀ` and `y_t = S_tᵀ q_t / √n`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gramian.analysis._scans._heads import delta_rule, state_gates
from gramian.analysis._scans._reading import ScanReading, register


@register("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
def transformers_kda(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **options: Any
) -> ScanReading:
    """Return the reading of Kimi delta attention in transformers, as of `kda`.

    Args:
        query: The queries, (batch, L, heads, n).
        key: The keys, (batch, L, heads, n).
        value: The values, (batch, L, heads, N).
        g: Logarithms of the gates, (batch, L, heads, n).
        beta: The factors β, (batch, L, heads).
        **options: Further arguments, as in `kda`.
    """
    return kda(query, key, value, g, beta, **options)


@register("chunk_kda", "fused_recurrent_kda")
def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    **options: Any,
) -> ScanReading:
    """Return the reading of Kimi delta attention.

    Args:
        q: The queries, (batch, L, key heads, n).
        k: The keys, (batch, L, key heads, n).
        v: The values, (batch, L, heads, N).
        g: Logarithms of the gates, (batch, L, heads, n).
        beta: The factors β, (batch, L, heads).
        scale: The factor of the outputs, by default n^(-1/2).
        initial_state: (batch, heads, n, N); None if it is zero.
        use_qk_l2norm_in_kernel: Whether the scan normalizes queries and keys.
        use_gate_in_kernel: Whether the logarithms of the gates are `-e^{A_log} softplus(g + bias)`
            or, with a lower bound, `bound · sigmoid(e^{A_log} (g + bias))`.
        use_beta_sigmoid_in_kernel: Whether β is the sigmoid of what is given.
        allow_neg_eigval: Whether β is twice the sigmoid.
        A_log: What has one number for each head, with `use_gate_in_kernel`.
        dt_bias: What has n numbers for each head, with `use_gate_in_kernel`; None if there is none.
        lower_bound: The least logarithm of a gate, with `use_gate_in_kernel`.
        **options: Further options, as in `of_heads`.
    """
    if use_beta_sigmoid_in_kernel:
        beta = torch.sigmoid(beta.double()) * (2.0 if allow_neg_eigval else 1.0)
    if use_gate_in_kernel and A_log is not None:
        g = state_gates(g, A_log, dt_bias, lower_bound)
    return delta_rule(
        q,
        k,
        v,
        g,
        beta,
        scale,
        normalized=use_qk_l2norm_in_kernel,
        initial_state=initial_state,
        **options,
    )
