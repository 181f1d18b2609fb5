r"""Read RWKV-4 (Peng et al. 2023) and RWKV-6 (Peng et al. 2024).

RWKV-6 reads the state before its update, and gives the present input a weight of its own:
`y_t = scale · (S_{t-1} + diag(u) k_t v_tᵀ)ᵀ r_t`, `S_t = diag(e^{w_t}) S_{t-1} + k_t v_tᵀ`. The
state of the system is S_{t-1} itself.

RWKV-4 averages the values of every channel with weights that decay:
`y_t = (a_{t-1} + e^{u + k_t} v_t) / (b_{t-1} + e^{u + k_t})`, with sums
`a_t = e^w a_{t-1} + e^{k_t} v_t` and `b_t = e^w b_{t-1} + e^{k_t}`. The sums b depend on keys only,
so that the operator is linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gramian.analysis._scans._heads import decays, first, of_heads
from gramian.analysis._scans._reading import ScanReading, heads_first, register
from gramian.systems import System, TimeVarying


@register("chunk_rwkv6", "fused_recurrent_rwkv6")
def rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    **options: Any,
) -> ScanReading:
    """Return the reading of RWKV-6.

    Args:
        r: The receptances, (batch, L, heads, n).
        k: The keys, (batch, L, heads, n).
        v: The values, (batch, L, heads, N).
        w: Logarithms of the gates, (batch, L, heads, n).
        u: Weights of the present input, (heads, n).
        scale: The factor of the outputs, by default n^(-1/2).
        initial_state: (batch, heads, n, N); None if it is zero.
        **options: Further options, as in `of_heads`.
    """
    heads = v.shape[2]
    factor = k.shape[-1] ** -0.5 if scale is None else float(scale)
    decay = decays(w, v)

    def system(channels: slice) -> System:
        inputs, outputs = (heads_first(x, heads, channels) for x in (k, r))  # (h, L, n)
        outputs = factor * outputs
        direct = (inputs * outputs * u[channels, None].double()).sum(-1)
        return TimeVarying(decay(channels), inputs, outputs, direct)

    return of_heads(system, v, initial_state=initial_state, **options)


@register("rwkv_linear_attention")
def rwkv4(
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: Sequence[Tensor] | None = None,
    return_state: bool = False,
) -> ScanReading:
    """Return the reading of RWKV-4.

    Args:
        time_decay: Logarithms of the rates of decay, log(-w), (channels).
        time_first: Weights of the present input, u, (channels).
        key: The keys, (batch, L, channels).
        value: The values, (batch, L, channels).
        state: a e^{-m}, b e^{-m} and m, (batch, channels) each; None at the start.
        return_state: Whether the scan also returns its last state.
    """
    rate = -time_decay.double().exp()  # (channels)
    keys = key[0].double()  # (L, channels)
    now = keys + time_first.double()
    top, total = torch.full_like(rate, -1e38), torch.zeros_like(rate)
    if state is not None:
        total, top = state[1][0].double(), state[2][0].double()
    rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for t in range(len(keys)):  # the sums are multiples of e^m, with the largest exponent m so far
        most = torch.maximum(top, now[t])
        past, present = torch.exp(top - most), torch.exp(now[t] - most)
        weight = past * total + present
        following = torch.maximum(top + rate, keys[t])
        decay, write = torch.exp(top + rate - following), torch.exp(keys[t] - following)
        rows.append((decay, write, past / weight, present / weight))
        top, total = following, decay * total + write
    decays, writes, reads, directs = (torch.stack(x, -1) for x in zip(*rows, strict=True))

    def system(channels: slice) -> System:
        a, b, c = (x[channels].unsqueeze(-1) for x in (decays, writes, reads))  # (c, L, 1)
        return TimeVarying(a, b, c, directs[channels])

    return ScanReading(
        count=len(rate),
        system=system,
        values=value[0].mT.unsqueeze(1),
        outputs=lambda result: first(result)[0].mT.unsqueeze(1),
        initial=None if state is None else state[0][0][:, None, None],
    )
