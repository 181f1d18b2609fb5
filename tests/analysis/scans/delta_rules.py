"""Loops over the delta rule and its kin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from tests.analysis.scans.case import (
    GROUPS,
    HEADS,
    STATE,
    Arguments,
    Case,
    N,
    P,
    matrices,
    qkv,
    some,
    spread,
)


def delta_loop(
    q: Any,
    k: Any,
    v: Any,
    g: Any = None,
    beta: Any = None,
    scale: Any = None,
    initial_state: Any = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Any = None,
    dt_bias: Any = None,
    lower_bound: Any = None,
    gk: Any = None,
    **options: Any,
) -> Any:
    heads = v.shape[2]
    q, k = spread(q, heads), spread(k, heads)
    if use_qk_l2norm_in_kernel:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    if use_beta_sigmoid_in_kernel:
        beta = (2 if allow_neg_eigval else 1) / (1 + (-beta).exp())
    log = (
        torch.zeros_like(k)
        if g is None
        else g.expand_as(k)
        if g.ndim == 4
        else g[..., None] + 0 * k
    )
    if use_gate_in_kernel:
        log = log + (0 if dt_bias is None else dt_bias.reshape(heads, -1))
        rate = A_log.reshape(heads, 1).exp()
        log = -rate * softplus(log) if lower_bound is None else lower_bound * (rate * log).sigmoid()
    log = log if gk is None else log + gk
    beta = v.new_ones(v.shape[:3]) if beta is None else beta
    eye = torch.eye(k.shape[-1]).double()

    def M(t: int) -> Tensor:
        erase = beta[0, t, :, None, None] * k[0, t, :, :, None] * k[0, t, :, None, :]
        return (eye - erase) @ torch.diag_embed(log[0, t].exp())

    write = lambda t: beta[0, t, :, None] * k[0, t]  # noqa: E731 (one line says it)
    initial = None if initial_state is None else initial_state
    if initial is not None and options.get("state_v_first"):
        initial = initial.mT
    return matrices(q, k, v, M, write, scale, initial), None


def transformers_delta_loop(query: Any, key: Any, value: Any, **options: Any) -> Any:
    return delta_loop(query, key, value, **options)


def general_delta_loop(
    q: Any, k: Any, v: Any, a: Any, b: Any, gk: Any = None, scale: Any = None
) -> Any:
    log = torch.zeros_like(k) if gk is None else gk
    M = lambda t: torch.diag_embed(log[0, t].exp()) + b[0, t, :, :, None] * a[0, t, :, None]  # noqa: E731 (one line says it)
    return matrices(q, k, v, M, lambda t: k[0, t], scale, None), None


def rwkv7_loop(r: Any, w: Any, k: Any, v: Any, a: Any, b: Any, scale: Any = 1.0) -> Any:
    return general_delta_loop(r, k, v, a, b, w, scale)


def recurrent_rwkv7_loop(r: Any, w: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    return general_delta_loop(r, k, v, a, b, w)


def multiplied_rwkv7_loop(r: Any, w: Any, k: Any, v: Any, kk: Any, a: Any) -> Any:
    return general_delta_loop(r, k, v, -kk, kk * a, w, 1.0)


def gdn2_loop(q: Any, k: Any, v: Any, g: Any, b: Any, w: Any, **options: Any) -> Any:
    if options.get("use_qk_l2norm_in_kernel"):
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    if options.get("use_gate_in_kernel"):
        g = -options["A_log"].exp()[:, None] * softplus(g + options["dt_bias"].reshape(HEADS, -1))
    eye = torch.eye(k.shape[-1]).double()

    def M(t: int) -> Tensor:
        erase = k[0, t, :, :, None] * (b[0, t] * k[0, t])[:, None, :]
        return (eye - erase) @ torch.diag_embed(g[0, t].exp())

    return matrices(q, k, w * v, M, lambda t: k[0, t], None, options.get("initial_state")), None


def comba_loop(q: Any, k: Any, v: Any, p: Any, g: Any, beta: Any = None, **options: Any) -> Any:
    q, k, p = (spread(x, v.shape[2]) for x in (q, k, p))
    if options.get("use_qk_l2norm_in_kernel"):
        q, k, p = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k, p))
    beta = v.new_ones(v.shape[:3]) if beta is None else beta
    eye = torch.eye(k.shape[-1]).double()

    def M(t: int) -> Tensor:
        erase = beta[0, t, :, None, None] * k[0, t, :, :, None] * p[0, t, :, None]
        return g[0, t, :, None, None].exp() * eye - erase

    return matrices(q, k, v, M, lambda t: beta[0, t, :, None] * k[0, t], None, None), None


def delta_arguments(normal: Any, L: int, groups: int = GROUPS) -> Arguments:
    """Keys of about length 1, so that the rule does not grow."""
    given = qkv(normal, L, groups)
    given["k"] = given["k"] / given["k"].norm(dim=-1, keepdim=True)
    g, beta = logsigmoid(normal(1, L, HEADS)), normal(1, L, HEADS).sigmoid()
    return given | {"g": g, "beta": beta}


def transformers_delta(normal: Any, L: int) -> Arguments:
    given = delta_arguments(normal, L)
    return {{"q": "query", "k": "key", "v": "value"}.get(k, k): v for k, v in given.items()}


def ungrouped(normal: Any, L: int) -> Arguments:
    return delta_arguments(normal, L, HEADS)


def kda_arguments(normal: Any, L: int) -> Arguments:
    return ungrouped(normal, L) | {"g": logsigmoid(normal(1, L, HEADS, N))}


def gdn2_arguments(normal: Any, L: int) -> Arguments:
    b, w = (normal(1, L, HEADS, size).sigmoid() for size in (N, P))
    given = {key: x for key, x in kda_arguments(normal, L).items() if key != "beta"}
    return given | {"b": b, "w": w}


def pair(normal: Any, L: int) -> Arguments:
    a, b = (0.3 * normal(1, L, HEADS, N) for _ in range(2))
    return qkv(normal, L) | {"a": a, "b": b}


def rwkv7_arguments(normal: Any, L: int) -> Arguments:
    given = pair(normal, L) | {"w": logsigmoid(normal(1, L, HEADS, N))}
    return {"r" if k == "q" else k: v for k, v in given.items()}


def multiplied_arguments(normal: Any, L: int) -> Arguments:
    given = rwkv7_arguments(normal, L)
    return {"kk" if k == "b" else k: v for k, v in given.items()}


NO_GATES = {"g": None, "beta": None}
CASES: dict[str, Case] = {
    "delta rule": Case("chunk_delta_rule", delta_loop, ungrouped, g=None),
    "delta rule, options": Case(
        "fused_recurrent_delta_rule",
        delta_loop,
        ungrouped,
        **NO_GATES,
        scale=0.7,
        initial_state=STATE,
        use_qk_l2norm_in_kernel=True,
    ),
    "gated delta rule": Case(
        "torch_chunk_gated_delta_rule",
        transformers_delta_loop,
        transformers_delta,
        "value",
        initial_state=STATE,
        use_qk_l2norm_in_kernel=True,
    ),
    "gated delta rule, step by step": Case(
        "torch_recurrent_gated_delta_rule",
        delta_loop,
        delta_arguments,
        initial_state=STATE,
    ),
    "gated delta rule, options": Case(
        "chunk_gated_delta_rule",
        delta_loop,
        delta_arguments,
        scale=0.7,
        initial_state=some(1, HEADS, P, N),
        state_v_first=True,
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=True,
        use_qk_l2norm_in_kernel=True,
    ),
    "gated delta rule, gates in the kernel": Case(
        "fused_recurrent_gated_delta_rule",
        delta_loop,
        delta_arguments,
        use_gate_in_kernel=True,
        A_log=some(HEADS),
        dt_bias=some(HEADS),
        use_beta_sigmoid_in_kernel=True,
        gk=lambda normal, L: logsigmoid(normal(1, L, HEADS, N)),
    ),
    "KDA in transformers": Case(
        "chunk_kimi_delta_attention",
        transformers_delta_loop,
        lambda normal, L: (
            transformers_delta(normal, L)
            | {"query": normal(1, L, HEADS, N), "key": normal(1, L, HEADS, N)}
            | {"g": logsigmoid(normal(1, L, HEADS, N))}
        ),
        "value",
        use_qk_l2norm_in_kernel=True,
    ),
    "KDA": Case("chunk_kda", delta_loop, kda_arguments, scale=0.4, initial_state=STATE),
    "KDA, gates in the kernel": Case(
        "fused_recurrent_kda",
        delta_loop,
        kda_arguments,
        use_gate_in_kernel=True,
        A_log=some(HEADS),
        dt_bias=some(HEADS * N),
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=True,
        use_qk_l2norm_in_kernel=True,
    ),
    "KDA, gates above a bound": Case(
        "chunk_kda",
        delta_loop,
        kda_arguments,
        use_gate_in_kernel=True,
        A_log=some(1, 1, HEADS, 1),
        lower_bound=-5.0,
    ),
    "diagonal plus low rank": Case(
        "chunk_dplr_delta_rule",
        general_delta_loop,
        pair,
        gk=lambda normal, L: logsigmoid(normal(1, L, HEADS, N)),
    ),
    "identity plus low rank": Case("chunk_iplr_delta_rule", general_delta_loop, pair, scale=0.5),
    "RWKV-7": Case("chunk_rwkv7", rwkv7_loop, rwkv7_arguments),
    "RWKV-7, step by step": Case("fused_recurrent_rwkv7", recurrent_rwkv7_loop, rwkv7_arguments),
    "RWKV-7, products": Case(
        "fused_mul_recurrent_rwkv7", multiplied_rwkv7_loop, multiplied_arguments
    ),
    "GDN-2": Case("chunk_gdn2", gdn2_loop, gdn2_arguments, initial_state=STATE),
    "GDN-2, gates in the kernel": Case(
        "fused_recurrent_gdn2",
        gdn2_loop,
        gdn2_arguments,
        use_gate_in_kernel=True,
        A_log=some(HEADS),
        dt_bias=some(HEADS * N),
        use_qk_l2norm_in_kernel=True,
    ),
    "Comba": Case(
        "chunk_comba",
        comba_loop,
        lambda normal, L: delta_arguments(normal, L) | {"p": normal(1, L, GROUPS, N)},
        use_qk_l2norm_in_kernel=True,
    ),
    "Comba, step by step": Case(
        "fused_recurrent_comba",
        comba_loop,
        lambda normal, L: ungrouped(normal, L) | {"p": 0.2 * normal(1, L, HEADS, N)},
        beta=None,
    ),
}
