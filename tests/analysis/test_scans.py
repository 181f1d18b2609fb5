"""Readings of scans are what loops over the published recurrences compute, in double precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, silu, softplus

from gramian.analysis._scans import ScanReading, read
from gramian.ess import effective_state_size

HEADS, GROUPS, N, P = 4, 2, 6, 5  # heads of the values, of the keys; size of state and of values
LENGTHS = [1, 2, 3, 63]

Arguments = dict[str, Any]
Loop = Callable[..., Any]


class Case:
    """A scan with a loop that defines it, arguments of some length, and the name of its values."""

    def __init__(self, scan: str, loop: Loop, arguments: Loop, values: str = "v", **options: Any):
        self.scan, self.loop, self.values = scan, loop, values
        self._arguments, self._options = arguments, options

    def arguments(self, length: int) -> Arguments:
        """The scan's arguments, fresh for every length, with the options of the case."""
        generator = torch.Generator().manual_seed(length)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        given = self._arguments(normal, length)
        made = {k: v(normal, length) if callable(v) else v for k, v in self._options.items()}
        return {**given, **made}


# Loops


def over_time(
    v: Tensor, step: Callable[[Tensor, int], tuple[Tensor, Tensor]], state: Tensor
) -> Tensor:
    """Outputs (1, L, heads, N) of steps that map a state (heads, n, N) to the next and outputs."""
    rows = []
    for t in range(v.shape[1]):
        state, y = step(state, t)
        rows.append(y)
    return torch.stack(rows)[None]


def start(v: Tensor, n: int, initial: Tensor | None) -> Tensor:
    return v.new_zeros(v.shape[2], n, v.shape[3]) if initial is None else initial[0]


def spread(x: Tensor, heads: int) -> Tensor:
    return torch.stack([x[:, :, h // (heads // x.shape[2])] for h in range(heads)], 2)


def matrices(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    M: Callable[[int], Tensor],
    write: Callable[[int], Tensor],
    scale: float | None,
    initial_state: Tensor | None,
) -> Tensor:
    """`S_t = M_t S_{t-1} + w_t u_tᵀ`, `y_t = scale S_tᵀ q_t`, with dense matrices M_t (h, n, n)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def step(S: Tensor, t: int) -> tuple[Tensor, Tensor]:
        S = M(t) @ S + write(t).unsqueeze(-1) @ v[0, t].unsqueeze(-2)
        return S, scale * (S.mT @ q[0, t].unsqueeze(-1)).squeeze(-1)

    return over_time(v, step, start(v, k.shape[-1], initial_state))


def attention_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> Any:
    """Gates (1, L, heads, n)."""
    M = lambda t: torch.diag_embed(log[0, t].exp())  # noqa: E731 (one line says it)
    return matrices(q, k, v, M, lambda t: k[0, t], scale, initial_state), None


def gla_loop(q: Any, k: Any, v: Any, g: Any, scale: Any = None, initial_state: Any = None) -> Any:
    return attention_loop(q, k, v, g, scale, initial_state)


def recurrent_gla_loop(q: Any, k: Any, v: Any, gk: Any, scale: Any = None) -> Any:
    return attention_loop(q, k, v, gk, scale)


def simple_loop(
    q: Any,
    k: Any,
    v: Any,
    g: Any = None,
    g_gamma: Any = None,
    scale: Any = None,
    initial_state: Any = None,
) -> Any:
    log = torch.zeros_like(k)
    log = log if g is None else log + g[..., None]
    log = log if g_gamma is None else log + g_gamma[:, None]
    return attention_loop(q, k, v, log, scale, initial_state)


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


def mamba_loop(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: bool = False,
) -> Any:
    step = delta if delta_bias is None else delta + delta_bias[:, None]
    step = softplus(step) if delta_softplus else step
    S, rows = torch.zeros_like(A), []
    for t in range(u.shape[2]):
        for c in range(len(A)):
            at = [
                x[c] if x.ndim == 2 else x[0, ..., t] if x.ndim == 3 else x[0, c // 2, :, t]
                for x in (B, C)
            ]
            S = S.clone()
            S[c] = (step[0, c, t] * A[c]).exp() * S[c] + step[0, c, t] * at[0] * u[0, c, t]
            rows.append(S[c] @ at[1] + (0 if D is None else D[c] * u[0, c, t]))
    y = torch.stack(rows).reshape(-1, len(A)).mT[None]
    return y if z is None else y * silu(z)


def mamba2_loop(
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    chunk_size: int,
    D: Any = None,
    z: Any = None,
    dt_bias: Any = None,
    initial_states: Any = None,
    dt_softplus: bool = False,
    dt_limit: Any = (0.0, float("inf")),
) -> Any:
    B, C = spread(B, x.shape[2]), spread(C, x.shape[2])
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    S = None if initial_states is None else initial_states.mT
    keys = dt[..., None] * B
    y, _ = attention_loop(C, keys, x, (dt * A)[..., None] + 0 * keys, 1.0, S)
    if D is not None:
        y = y + (D[:, None] if D.ndim == 1 else D) * x
    return (y if z is None else y * silu(z)), None


def mamba3_loop(
    Q: Any,
    K: Any,
    V: Any,
    ADT: Any,
    DT: Any,
    Trap: Any,
    Q_bias: Any,
    K_bias: Any,
    Angles: Any,
    D: Any = None,
    Z: Any = None,
    Input_States: Any = None,
) -> Any:
    """Complex numbers turn pairs of coordinates."""
    heads = V.shape[2]
    turn = torch.zeros(heads, Angles.shape[-1]).double()
    S, k0, v0 = V.new_zeros(heads, P, N), V.new_zeros(heads, N), V.new_zeros(heads, P)
    if Input_States is not None:
        turn, S, k0, v0 = (x[0] for x in Input_States)
    rows = []
    for t in range(V.shape[1]):
        turn = turn + torch.tanh(Angles[0, t]) * torch.pi * DT[0, :, t, None]
        phase = torch.ones(heads, N // 2).to(torch.complex128)
        phase[:, : turn.shape[-1]] = torch.polar(torch.ones_like(turn), turn)
        q, k = (
            torch.view_as_real(
                torch.view_as_complex((spread(x, heads)[0, t] + b).reshape(heads, -1, 2)) * phase
            ).reshape(heads, N)
            for x, b in ((Q, Q_bias), (K, K_bias))
        )
        v, a = V[0, t], ADT[0, :, t].exp()
        share = Trap[0, :, t].sigmoid()
        old, new = (1 - share) * DT[0, :, t] * a, share * DT[0, :, t]
        S = a[:, None, None] * S + old[:, None, None] * v0[:, :, None] * k0[:, None]
        S = S + new[:, None, None] * v[:, :, None] * k[:, None]
        y = (S * q[:, None]).sum(-1) + (0 if D is None else D[:, None] * v)
        rows.append(y if Z is None else y * silu(Z[0, t]))
        k0, v0 = k, v
    return torch.stack(rows)[None]


# Arguments


def qkv(normal: Any, L: int, groups: int = HEADS) -> Arguments:
    return {
        "q": normal(1, L, groups, N),
        "k": normal(1, L, groups, N),
        "v": normal(1, L, HEADS, P),
    }


def gla_arguments(normal: Any, L: int) -> Arguments:
    return qkv(normal, L) | {"g": logsigmoid(normal(1, L, HEADS, N))}


def positive(normal: Any, L: int) -> Arguments:
    return {name: x if name == "v" else x.exp() for name, x in qkv(normal, L).items()}


def delta_arguments(normal: Any, L: int, groups: int = GROUPS) -> Arguments:
    """Keys of about length 1, so that the rule does not grow."""
    given = qkv(normal, L, groups)
    given["k"] = given["k"] / given["k"].norm(dim=-1, keepdim=True)
    g, beta = logsigmoid(normal(1, L, HEADS)), normal(1, L, HEADS).sigmoid()
    return given | {"g": g, "beta": beta}


def transformers_delta(normal: Any, L: int) -> Arguments:
    given = delta_arguments(normal, L)
    return {{"q": "query", "k": "key", "v": "value"}.get(k, k): v for k, v in given.items()}


def kda_arguments(normal: Any, L: int) -> Arguments:
    return delta_arguments(normal, L, HEADS) | {"g": logsigmoid(normal(1, L, HEADS, N))}


def pair(normal: Any, L: int) -> Arguments:
    a, b = (0.3 * normal(1, L, HEADS, N) for _ in range(2))
    return qkv(normal, L) | {"a": a, "b": b}


def rwkv7_arguments(normal: Any, L: int) -> Arguments:
    given = pair(normal, L) | {"w": logsigmoid(normal(1, L, HEADS, N))}
    return {"r" if k == "q" else k: v for k, v in given.items()}


def rwkv6_arguments(normal: Any, L: int) -> Arguments:
    given = rwkv7_arguments(normal, L)
    return {k: given[k] for k in "rkvw"} | {"u": normal(HEADS, N)}


def multiplied_arguments(normal: Any, L: int) -> Arguments:
    given = rwkv7_arguments(normal, L)
    return {"kk" if k == "b" else k: v for k, v in given.items()}


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


def mamba_arguments(normal: Any, L: int) -> Arguments:
    return {
        "u": normal(1, HEADS, L),
        "delta": normal(1, HEADS, L).exp(),
        "A": -normal(HEADS, N).exp(),
        "B": normal(1, N, L),
        "C": normal(1, N, L),
        "D": normal(HEADS),
    }


def mamba2_arguments(normal: Any, L: int) -> Arguments:
    return {
        "x": normal(1, L, HEADS, P),
        "dt": normal(1, L, HEADS).exp(),
        "A": -normal(HEADS).exp(),
        "B": normal(1, L, GROUPS, N),
        "C": normal(1, L, GROUPS, N),
        "chunk_size": 16,
    }


def mamba3_arguments(normal: Any, L: int) -> Arguments:
    step = normal(1, HEADS, L).exp()
    return {
        "Q": normal(1, L, GROUPS, N),
        "K": normal(1, L, GROUPS, N),
        "V": normal(1, L, HEADS, P),
        "ADT": -step * normal(1, HEADS, L).exp(),
        "DT": step,
        "Trap": normal(1, HEADS, L),
        "Q_bias": normal(HEADS, N),
        "K_bias": normal(HEADS, N),
        "Angles": normal(1, L, HEADS, N // 2 - 1),
    }


def some(*shape: int | None) -> Callable[[Any, int], Tensor]:
    """An option that is drawn anew for every length, which replaces None in the shape."""
    return lambda normal, L: normal(*(L if x is None else x for x in shape))


STATE = some(1, HEADS, N, P)
NO_GATES = {"g": None, "beta": None}
CASES: dict[str, Case] = {
    "mamba": Case("selective_scan_fn", mamba_loop, mamba_arguments, "u"),
    "mamba, bias and gate": Case(
        "mamba_selective_scan",
        mamba_loop,
        mamba_arguments,
        "u",
        delta_bias=some(HEADS),
        delta_softplus=True,
        z=some(1, HEADS, None),
    ),
    "mamba, constant B": Case(
        "selective_scan_ref", mamba_loop, mamba_arguments, "u", B=some(HEADS, N), D=None
    ),
    "mamba2": Case("mamba2_chunk_scan", mamba2_loop, mamba2_arguments, "x"),
    "mamba2, options": Case(
        "mamba_chunk_scan_combined",
        mamba2_loop,
        mamba2_arguments,
        "x",
        D=some(HEADS),
        z=some(1, None, HEADS, P),
        dt_bias=some(HEADS),
        dt_softplus=True,
        dt_limit=(0.3, 1.5),
        initial_states=some(1, HEADS, P, N),
    ),
    "mamba2, skips of channels": Case(
        "mamba_chunk_scan",
        mamba2_loop,
        mamba2_arguments,
        "x",
        D=some(HEADS, P),
        z=some(1, None, HEADS, P),
    ),
    "mamba3": Case("mamba3_siso_combined", mamba3_loop, mamba3_arguments, "V"),
    "mamba3, options": Case(
        "mamba3_siso_combined",
        mamba3_loop,
        mamba3_arguments,
        "V",
        D=some(HEADS),
        Z=some(1, None, HEADS, P),
        Input_States=lambda normal, L: (
            normal(1, HEADS, N // 2 - 1),
            normal(1, HEADS, P, N),
            normal(1, HEADS, N),
            normal(1, HEADS, P),
        ),
    ),
    "delta rule": Case("chunk_delta_rule", delta_loop, delta_arguments, g=None),
    "delta rule, options": Case(
        "fused_recurrent_delta_rule",
        delta_loop,
        delta_arguments,
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
        "chunk_dplr_delta_rule", general_delta_loop, pair, gk=lambda normal, L: None
    ),
    "identity plus low rank": Case("chunk_iplr_delta_rule", general_delta_loop, pair, scale=0.5),
    "RWKV-7": Case("chunk_rwkv7", rwkv7_loop, rwkv7_arguments),
    "RWKV-7, step by step": Case("fused_recurrent_rwkv7", recurrent_rwkv7_loop, rwkv7_arguments),
    "RWKV-7, products": Case(
        "fused_mul_recurrent_rwkv7", multiplied_rwkv7_loop, multiplied_arguments
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
        lambda normal, L: delta_arguments(normal, L) | {"p": 0.2 * normal(1, L, GROUPS, N)},
        beta=None,
    ),
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


def reading_of(case: Case, arguments: Arguments) -> tuple[ScanReading, Any]:
    return read(case.scan, (), arguments), case.loop(**arguments)


def dense(case: Case, arguments: Arguments, reading: ScanReading) -> Tensor:
    """(count, L, L): what the loop makes of an impulse in all value channels, for every position."""
    values = arguments[case.values]
    length = reading.values.shape[-1]
    time = list(values.shape).index(length)

    def outputs(v: Tensor) -> Tensor:
        given = {**arguments, case.values: v}
        return reading_of(case, given)[0].outputs(case.loop(**given))

    zero, columns = outputs(0 * values), []
    for j in range(length):
        impulse = torch.zeros_like(values)
        impulse.select(time, j).fill_(1)
        columns.append(outputs(impulse) - zero)
    gate = 1 if reading.gate is None else reading.gate.unsqueeze(-1)
    return (torch.stack(columns, -1) / gate)[:, 0]  # (count, N, L, L) before the first is taken


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", CASES)
def test_a_reading_predicts_what_a_loop_returns(name: str, length: int) -> None:
    case = CASES[name]
    reading, result = reading_of(case, case.arguments(length))
    assert reading.values.shape[0] == reading.count and reading.values.shape[2] == length
    assert reading.disagreement(result) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_the_operator_and_its_state_sizes_are_those_of_the_loops_impulse_responses(
    name: str,
) -> None:
    case, length = CASES[name], 23
    arguments = case.arguments(length)
    reading, _ = reading_of(case, arguments)
    T = dense(case, arguments, reading)
    system = reading.system(slice(1, reading.count))
    difference = (system.matrix(length) - T[1:]).norm()
    assert difference < 1e-10 * T.norm()
    sizes = effective_state_size(system, at=[1, 9, 20])
    for position, size in zip([1, 9, 20], sizes.unbind(-1), strict=True):
        s = torch.linalg.svdvals(T[1:, position:, :position])
        p = s / s.sum(-1, keepdim=True)
        torch.testing.assert_close(size, torch.special.entr(p).sum(-1).exp(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_another_result_disagrees(name: str) -> None:
    case = CASES[name]
    reading, result = reading_of(case, case.arguments(23))
    outputs = result[0] if isinstance(result, tuple) else result
    assert reading.disagreement(outputs * 1.001) == pytest.approx(1e-3, rel=0.1)
    assert reading.disagreement(outputs.roll(1, dims=-1)) > 1e-2
