"""Loops over the recurrences of Mamba, Mamba2 and Mamba-3."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import silu, softplus

from tests.analysis.scans.case import (
    GROUPS,
    HEADS,
    Arguments,
    Case,
    N,
    P,
    attention_loop,
    some,
    spread,
)


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
    "mamba, groups": Case(
        "selective_scan_fn",
        mamba_loop,
        mamba_arguments,
        "u",
        B=some(1, GROUPS, N, None),
        C=some(1, GROUPS, N, None),
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
}
