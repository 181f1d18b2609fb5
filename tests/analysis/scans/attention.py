"""Loops over linear attention, with and without gates, RWKV, linear units and the mLSTM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tests.analysis.scans.case import (
    HEADS,
    STATE,
    Arguments,
    Case,
    N,
    P,
    attention_loop,
    over_time,
    qkv,
    simple_loop,
    some,
    start,
)


def gla_loop(q: Any, k: Any, v: Any, g: Any, scale: Any = None, initial_state: Any = None) -> Any:
    return attention_loop(q, k, v, g, scale, initial_state)


def recurrent_gla_loop(q: Any, k: Any, v: Any, gk: Any, scale: Any = None) -> Any:
    return attention_loop(q, k, v, gk, scale)


def retention_loop(q: Any, k: Any, v: Any, scale: Any = None, initial_state: Any = None) -> Any:
    rates = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(q.shape[2])]).double().log()
    return simple_loop(q, k, v, g_gamma=rates, scale=scale, initial_state=initial_state)


def lightning_loop(q: Any, k: Any, v: Any, layer_idx: int, num_layers: int) -> Any:
    H = q.shape[2]
    rates = [-8 * h / H * (1 - layer_idx / num_layers) for h in range(H)]
    return simple_loop(q, k, v, g_gamma=torch.tensor(rates, dtype=torch.float64))


def linear_loop(
    q: Any, k: Any, v: Any, scale: Any = None, initial_state: Any = None, normalize: bool = True
) -> Any:
    kernel, keys = initial_state if isinstance(initial_state, tuple) else (initial_state, 0)
    y, _ = simple_loop(q, k, v, scale=scale, initial_state=kernel)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    size = (scale * q * (k.cumsum(1) + keys)).sum(-1, keepdim=True) + 1e-10
    return (y / size if normalize else y), None


def rwkv6_loop(
    r: Any, k: Any, v: Any, w: Any, u: Any, scale: Any = None, initial_state: Any = None
) -> Any:
    scale = r.shape[-1] ** -0.5 if scale is None else scale

    def step(S: Tensor, t: int) -> tuple[Tensor, Tensor]:
        now = k[0, t, :, :, None] * v[0, t, :, None]
        y = ((S + u[:, :, None] * now) * scale * r[0, t, :, :, None]).sum(1)
        return w[0, t, :, :, None].exp() * S + now, y

    return over_time(v, step, start(v, k.shape[-1], initial_state)), None


def rwkv4_loop(time_decay: Any, time_first: Any, key: Any, value: Any, state: Any = None) -> Any:
    a = b = torch.zeros_like(key[0, 0])
    if state is not None:
        a, b = (x[0] * state[2][0].exp() for x in state[:2])
    rows = []
    for k, v in zip(key[0], value[0], strict=True):
        now = (time_first + k).exp()
        rows.append((a + now * v) / (b + now))
        keep = (-time_decay.exp()).exp()
        a, b = keep * a + k.exp() * v, keep * b + k.exp()
    return torch.stack(rows)[None], None


def unit_loop(
    hidden_states: Any, recurrent_gate: Any, reset: Any, recurrent_states: Any = None
) -> Any:
    S = torch.zeros_like(hidden_states[0, 0]) if recurrent_states is None else recurrent_states[0]
    rows = []
    for x, a, new in zip(hidden_states[0], recurrent_gate[0], reset[0], strict=True):
        S = x if bool(new) else a * S + x
        rows.append(S)
    return torch.stack(rows)[None], S


def hgrn_loop(x: Any, g: Any, initial_state: Any = None) -> Any:
    return unit_loop(x, g.exp(), torch.zeros(1, x.shape[1], 1).bool(), initial_state)


def mlstm_loop(
    query: Any,
    key: Any,
    value: Any,
    igate: Any,
    fgate: Any,
    c_initial: Any = None,
    n_initial: Any = None,
    m_initial: Any = None,
    eps: float = 1e-6,
) -> Any:
    C = (
        value.new_zeros(HEADS, key.shape[-1], value.shape[-1])
        if c_initial is None
        else c_initial[0]
    )
    n = value.new_zeros(HEADS, key.shape[-1]) if n_initial is None else n_initial[0]
    m = value.new_zeros(HEADS) if m_initial is None else m_initial[0, :, 0]
    C, n = C * m.exp()[:, None, None], n * m.exp()[:, None]
    rows = []
    for t in range(key.shape[2]):
        f, i = fgate[0, :, t].sigmoid(), igate[0, :, t].exp()
        m = torch.maximum(logsigmoid(fgate[0, :, t]) + m, igate[0, :, t])
        k, v, q = key[0, :, t], value[0, :, t], query[0, :, t] * key.shape[-1] ** -0.5
        C = f[:, None, None] * C + i[:, None, None] * k[:, :, None] * v[:, None]
        n = f[:, None] * n + i[:, None] * k
        size = (n * q).sum(-1).abs().clamp(min=1) + eps * m.exp()
        rows.append((C * q[:, :, None]).sum(1) / size[:, None])
    return torch.stack(rows, 1)[None]


def gla_arguments(normal: Any, L: int) -> Arguments:
    return qkv(normal, L) | {"g": logsigmoid(normal(1, L, HEADS, N))}


def positive(normal: Any, L: int) -> Arguments:
    return {name: x if name == "v" else x.exp() for name, x in qkv(normal, L).items()}


def rwkv6_arguments(normal: Any, L: int) -> Arguments:
    given = gla_arguments(normal, L) | {"u": normal(HEADS, N)}
    return {{"q": "r", "g": "w"}.get(k, k): v for k, v in given.items()}


def rwkv4_arguments(normal: Any, L: int) -> Arguments:
    return {
        "time_decay": normal(P),
        "time_first": normal(P),
        "key": 3 * normal(1, L, P),
        "value": normal(1, L, P),
    }


def unit_arguments(normal: Any, L: int) -> Arguments:
    reset = torch.zeros(1, L, 1, dtype=torch.bool)
    reset[:, L // 2] = True
    gate = normal(1, L, P).sigmoid()
    return {"hidden_states": normal(1, L, P), "recurrent_gate": gate, "reset": reset}


def mlstm_arguments(normal: Any, L: int) -> Arguments:
    return {
        "query": normal(1, HEADS, L, N),
        "key": normal(1, HEADS, L, N),
        "value": normal(1, HEADS, L, P),
        "igate": 2 * normal(1, HEADS, L),
        "fgate": 2 * normal(1, HEADS, L),
    }


CASES: dict[str, Case] = {
    "GLA": Case("chunk_gla", gla_loop, gla_arguments, initial_state=STATE),
    "GLA, step by step": Case(
        "fused_recurrent_gla",
        recurrent_gla_loop,
        lambda normal, L: qkv(normal, L) | {"gk": logsigmoid(normal(1, L, HEADS, N))},
        scale=1.0,
    ),
    "simple GLA": Case(
        "chunk_simple_gla",
        simple_loop,
        lambda normal, L: qkv(normal, L) | {"g": logsigmoid(normal(1, L, HEADS))},
        g_gamma=lambda normal, L: -normal(HEADS).exp(),
        scale=0.3,
    ),
    "simple GLA, constant gates": Case(
        "fused_recurrent_simple_gla",
        simple_loop,
        qkv,
        g_gamma=lambda normal, L: -normal(HEADS).exp(),
    ),
    "simple GLA, in parallel": Case(
        "parallel_simple_gla",
        simple_loop,
        lambda normal, L: qkv(normal, L) | {"g": logsigmoid(normal(1, L, HEADS))},
    ),
    "retention": Case("chunk_retention", retention_loop, qkv, initial_state=STATE),
    "lightning attention": Case(
        "chunk_lightning_attn", lightning_loop, qkv, layer_idx=3, num_layers=7
    ),
    "linear attention": Case("chunk_linear_attn", linear_loop, positive),
    "linear attention, continued": Case(
        "fused_chunk_linear_attn",
        linear_loop,
        positive,
        scale=0.8,
        initial_state=lambda normal, L: (normal(1, HEADS, N, P), normal(1, 1, HEADS, N).exp()),
    ),
    "linear attention, without a normalizer": Case(
        "fused_recurrent_linear_attn", linear_loop, qkv, normalize=False, initial_state=STATE
    ),
    "RWKV-4": Case("rwkv_linear_attention", rwkv4_loop, rwkv4_arguments, "value"),
    "RWKV-4, continued": Case(
        "rwkv_linear_attention",
        rwkv4_loop,
        rwkv4_arguments,
        "value",
        state=lambda normal, L: [normal(1, P), normal(1, P).exp(), normal(1, P)],
    ),
    "RWKV-6": Case("chunk_rwkv6", rwkv6_loop, rwkv6_arguments, scale=1.0, initial_state=STATE),
    "RG-LRU": Case(
        "_rnn_scan", unit_loop, unit_arguments, "hidden_states", recurrent_states=some(1, P)
    ),
    "HGRN": Case(
        "chunk_hgrn",
        hgrn_loop,
        lambda normal, L: {"x": normal(1, L, P), "g": logsigmoid(normal(1, L, P))},
        "x",
    ),
    "mLSTM": Case("_inference_fn", mlstm_loop, mlstm_arguments, "value", eps=1e-3),
    "mLSTM, continued": Case(
        "_train_fn",
        mlstm_loop,
        mlstm_arguments,
        "value",
        c_initial=STATE,
        n_initial=some(1, HEADS, N),
        m_initial=some(1, HEADS, 1),
    ),
}
