r"""Read the delta rule (Yang et al. 2024a) and the gated delta rule (Yang et al. 2024b).

`S_t = (I - β_t k_t k_tᵀ) e^{g_t} S_{t-1} + β_t k_t u_tᵀ` and `y_t = S_tᵀ q_t / √n`, with one gate a
head, or none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from gramian.analysis._scans._heads import delta_rule
from gramian.analysis._scans._reading import ScanReading, register


@register("chunk_delta_rule", "fused_recurrent_delta_rule", "fused_chunk_delta_rule")
def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **options: Any,
) -> ScanReading:
    """Return the reading of the delta rule.

    Args:
        q: The queries, (batch, L, heads, n).
        k: The keys, (batch, L, heads, n).
        v: The values, (batch, L, heads, N).
        beta: The factors β, (batch, L, heads); 1 if they are None.
        scale: The factor of the outputs, by default n^(-1/2).
        initial_state: (batch, heads, n, N); None if it is zero.
        output_final_state: Whether the scan also returns its last state.
        use_qk_l2norm_in_kernel: Whether the scan normalizes queries and keys.
        **options: Further options, as in `of_heads`.
    """
    return delta_rule(
        q,
        k,
        v,
        log=None,
        beta=q.new_ones(v.shape[:3]) if beta is None else beta,
        scale=scale,
        normalized=use_qk_l2norm_in_kernel,
        initial_state=initial_state,
        **options,
    )


@register("torch_chunk_gated_delta_rule")
def transformers_gated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    **options: Any,
) -> ScanReading:
    """Return the reading of the gated delta rule in transformers, as of `gated`.

    Args:
        query: The queries, (batch, L, key heads, n).
        key: The keys, (batch, L, key heads, n).
        value: The values, (batch, L, heads, N).
        g: Logarithms of the gates, (batch, L, heads).
        beta: The factors β, (batch, L, heads).
        chunk_size: Ignored, because it does not change the recurrence.
        **options: Further arguments, as in `gated`.
    """
    return gated(query, key, value, g, beta, **options)


@register("torch_recurrent_gated_delta_rule", "chunk_gated_delta_rule", "chunk_gdn")
def gated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    gk: Tensor | None = None,
    **options: Any,
) -> ScanReading:
    """Return the reading of the gated delta rule.

    Args:
        q: The queries, (batch, L, key heads, n).
        k: The keys, (batch, L, key heads, n).
        v: The values, (batch, L, heads, N).
        g: Logarithms of the gates, (batch, L, heads); None if all gates are 1.
        beta: The factors β, (batch, L, heads); 1 if they are None.
        scale: The factor of the outputs, by default n^(-1/2).
        initial_state: (batch, heads, n, N); None if it is zero.
        output_final_state: Whether the scan also returns its last state.
        use_qk_l2norm_in_kernel: Whether the scan normalizes queries and keys.
        use_beta_sigmoid_in_kernel: Whether β is the sigmoid of what is given.
        allow_neg_eigval: Whether β is twice the sigmoid.
        use_gate_in_kernel: Whether the logarithms of the gates are `-e^{A_log} softplus(g + bias)`.
        A_log: (heads), with `use_gate_in_kernel`.
        dt_bias: (heads), with `use_gate_in_kernel`; None if there is none.
        gk: Logarithms of further gates, (batch, L, heads, n); None if there are none.
        **options: Further options, as in `of_heads`.
    """
    if beta is None:
        beta = v.new_ones(v.shape[:3])
    elif use_beta_sigmoid_in_kernel:
        beta = torch.sigmoid(beta.double()) * (2.0 if allow_neg_eigval else 1.0)
    log = g
    if g is not None and use_gate_in_kernel and A_log is not None:
        log = g.double() if dt_bias is None else g.double() + dt_bias.double()
        log = -A_log.double().exp() * softplus(log)
    if gk is not None:
        log = gk if log is None else log.double().unsqueeze(-1) + gk.double()
    return delta_rule(
        q,
        k,
        v,
        log=log,
        beta=beta,
        scale=scale,
        normalized=use_qk_l2norm_in_kernel,
        initial_state=initial_state,
        **options,
    )


@register("fused_recurrent_gated_delta_rule", "fused_recurrent_gdn")
def recurrent_gated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    **options: Any,
) -> ScanReading:
    """Return the reading of the gated delta rule in its recurrent form.

    Args:
        q: The queries, (batch, L, key heads, n).
        k: The keys, (batch, L, key heads, n).
        v: The values, (batch, L, heads, N).
        g: Logarithms of the gates, (batch, L, heads); None if all gates are 1.
        gk: Logarithms of further gates, (batch, L, heads, n); None if there are none.
        gv: Gates of the value channels, which are refused.
        beta: The factors β, (batch, L, heads); 1 if they are None.
        **options: Further arguments, as in `gated`.

    Raises:
        ValueError: if value channels have gates, since a head then has several operators.
    """
    if gv is not None:
        raise ValueError(
            f"the gated delta rule is read without gates of value channels; got gv "
            f"{tuple(gv.shape)}."
        )
    return gated(q, k, v, g, beta, gk=gk, **options)
