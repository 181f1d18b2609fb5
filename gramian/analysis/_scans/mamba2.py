r"""Read the chunk scan of Mamba2 (Dao and Gu 2024, listing 1), with one gate a head.

`S_t = exp(Δ_t a) S_{t-1} + Δ_t B_t u_tᵀ` and `y_t = S_tᵀ C_t + D u_t`, with one number a for each
head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from gramian.analysis._scans._reading import ScanReading, heads_first, of_state, register, single
from gramian.systems import System


@register(
    "mamba2_chunk_scan",
    "mamba_chunk_scan_combined",
    "mamba_chunk_scan",
    "ssd_chunk_scan_combined_ref",
)
def chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **kwargs: Any,
) -> ScanReading:
    """Return the reading of Mamba2's scan.

    Args:
        x: The values, (batch, L, heads, N); `hidden_states` in transformers.
        dt: Time steps before bias and softplus, (batch, L, heads).
        A: Negative rates of decay, (heads).
        B: Input coefficients, (batch, L, groups, n).
        C: Output coefficients, (batch, L, groups, n).
        chunk_size: Ignored, because it does not change the recurrence.
        D: The skip, (heads), or (heads, N), which is left out of the operator; None if there is
            none.
        z: The output gate before its activation, (batch, L, heads, N); None if there is none.
        dt_bias: Bias of the time steps, (heads); None if there is none.
        initial_states: (batch, heads, N, n); None if they are zero.
        seq_idx: The index of every position's sequence; refused if there are several.
        cu_seqlens: Boundaries of sequences; refused if there are several.
        dt_softplus: Whether softplus is applied to the time steps.
        dt_limit: Smallest and largest time step.
        **kwargs: Options that do not change the recurrence.
    """
    single(x.shape[1], seq_idx=seq_idx, cu_seqlens=cu_seqlens)
    heads = x.shape[2]
    values = x[0].permute(1, 2, 0)  # (heads, N, L)
    gate = None if z is None else silu(z[0].double()).permute(1, 2, 0)
    step = dt[0].double()
    if dt_bias is not None:
        step = step + dt_bias.double()
    if dt_softplus:
        step = softplus(step)
    step = step.clamp(*dt_limit).mT.unsqueeze(-1)  # (heads, L, 1)

    def system(channels: slice) -> System:
        inputs = step[channels] * heads_first(B, heads, channels)  # (h, L, n)
        outputs = heads_first(C, heads, channels)
        decay = torch.exp(A[channels, None, None].double() * step[channels])
        skip = D[channels, None].double() if D is not None and D.ndim == 1 else 0.0
        return of_state(decay, inputs, outputs, skip)

    def outputs(result: Any) -> Tensor:
        y = (result[0] if isinstance(result, tuple) else result)[0].permute(1, 2, 0)
        if D is None or D.ndim == 1:
            return y
        skip = D.double().unsqueeze(-1) * values
        return y - (skip if gate is None else skip * gate)

    initial = None if initial_states is None else initial_states[0]
    return ScanReading(heads, system, values, outputs, initial, gate)
