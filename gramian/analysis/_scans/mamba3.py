r"""Read the scan of Mamba-3 (Lahoti et al. 2026) with one input and one output for each head.

The trapezoidal rule reads two inputs at every step:
`S_t = α_t S_{t-1} + (1 - λ_t) Δ_t α_t k_{t-1} u_{t-1}ᵀ + λ_t Δ_t k_t u_tᵀ` and
`y_t = S_tᵀ q_t + D u_t`, with queries and keys that are turned by the sum of all angles so far. The
system stores `x_t = S_{t-1} + (1 - λ_t) Δ_t k_{t-1} u_{t-1}ᵀ`, so that its order is n:
`x_{t+1} = α_t x_t + (λ_t Δ_t + (1 - λ_{t+1}) Δ_{t+1}) k_t u_tᵀ` and
`y_t = (α_t x_t + λ_t Δ_t k_t u_tᵀ)ᵀ q_t + D u_t`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from gramian.analysis._scans._heads import first
from gramian.analysis._scans._reading import ScanReading, heads_first, register, single
from gramian.systems import System, TimeVarying


@register("mamba3_siso_combined")
def mamba3(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    ADT: Tensor,
    DT: Tensor,
    Trap: Tensor,
    Q_bias: Tensor,
    K_bias: Tensor,
    Angles: Tensor,
    D: Tensor | None = None,
    Z: Tensor | None = None,
    Input_States: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    chunk_size: int = 64,
    return_final_states: bool = False,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> ScanReading:
    """Return the reading of Mamba-3's scan.

    Args:
        Q: The queries before bias and rotation, (batch, L, groups, n).
        K: The keys before bias and rotation, (batch, L, groups, n).
        V: The values, (batch, L, heads, N).
        ADT: Logarithms of the gates α, (batch, heads, L).
        DT: Time steps Δ, (batch, heads, L).
        Trap: Weights λ before the sigmoid, (batch, heads, L).
        Q_bias: (heads, n).
        K_bias: (heads, n).
        Angles: Angles before their tanh, (batch, L, heads, at most n / 2).
        D: The skip, (heads); None if there is none.
        Z: The output gate before its activation, (batch, L, heads, N); None if there is none.
        Input_States: Sums of angles, states (batch, heads, N, n), last keys (batch, heads, n) and
            last values (batch, heads, N); None at the start.
        chunk_size: Ignored, because it does not change the recurrence.
        return_final_states: Whether the scan also returns its last states.
        cu_seqlens: Boundaries of sequences; refused if there are several.
        **options: Options that do not change the recurrence.
    """
    single(V.shape[1], cu_seqlens=cu_seqlens)
    heads = V.shape[2]
    step, share = DT[0].double(), torch.sigmoid(Trap[0].double())  # (heads, L)
    present, earlier = share * step, (1 - share) * step
    angles = torch.tanh(Angles[0].double()) * math.pi * step.mT.unsqueeze(-1)
    angles = angles.cumsum(0)  # (L, heads, angles)
    initial = None
    if Input_States is not None:
        turned, state, key, value = (x[0].double() for x in Input_States)
        angles = angles + turned
        initial = state + earlier[:, 0, None, None] * value.unsqueeze(-1) * key.unsqueeze(-2)

    def system(channels: slice) -> System:
        turn = angles[:, channels].transpose(0, 1)  # (h, L, angles)
        q, k = (
            _rotated(heads_first(x, heads, channels) + bias[channels, None].double(), turn)
            for x, bias in ((Q, Q_bias), (K, K_bias))
        )
        decay = ADT[0, channels].double().exp().unsqueeze(-1)  # (h, L, 1)
        write = present[channels] + pad(earlier[channels, 1:], (0, 1))
        direct = present[channels] * (q * k).sum(-1)
        if D is not None:
            direct = direct + D[channels, None].double()
        return TimeVarying(decay.expand_as(k), write.unsqueeze(-1) * k, decay * q, direct)

    return ScanReading(
        count=heads,
        system=system,
        values=V[0].permute(1, 2, 0),
        outputs=lambda result: first(result)[0].permute(1, 2, 0),
        initial=initial,
        gate=None if Z is None else silu(Z[0].double()).permute(1, 2, 0),
    )


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (2 j, 2 j + 1) of vectors (…, n) by angles (…, m), and leave the rest."""
    pairs = x.unflatten(-1, (-1, 2))
    angles = pad(angles, (0, pairs.shape[-2] - angles.shape[-1]))
    a, b = pairs.unbind(-1)
    return torch.stack(
        [a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1
    ).flatten(-2)
