r"""Read the selective scan of Mamba (Gu and Dao 2023, algorithm 2), with one recurrence a channel.

`S_t = exp(Δ_t A) S_{t-1} + Δ_t B_t u_t` and `y_t = C_t · S_t + D u_t`, where `exp(Δ_t A)` is
diagonal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from gramian.analysis._scans._reading import ScanReading, of_state, register, single
from gramian.systems import System


@register("mamba_selective_scan", "selective_scan_fn", "selective_scan_ref")
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **kwargs: Any,
) -> ScanReading:
    """Return the reading of Mamba's scan.

    Args:
        u: The values, (batch, channels, L); `hidden_states` in transformers.
        delta: Time steps before bias and softplus, (batch, channels, L); `dt` in transformers.
        A: Negative rates of decay, (channels, n).
        B: Input coefficients: (batch, n, L), (batch, groups, n, L) or, constant, (channels, n).
        C: Output coefficients, like B.
        D: The skip, (channels); None if there is none.
        z: The output gate before its activation, (batch, channels, L); None if there is none.
        delta_bias: Bias of the time steps, (channels); None if there is none.
        delta_softplus: Whether softplus is applied to the time steps.
        return_last_state: Whether the scan also returns its last state.
        **kwargs: Options that do not change the recurrence.
    """
    length = u.shape[-1]
    single(length, **{name: kwargs.get(name) for name in ("seq_idx", "cu_seqlens", "position_ids")})
    if A.is_complex():
        raise ValueError(f"the rates of a selective scan must be real; got {A.dtype}.")

    def system(channels: slice) -> System:
        step = delta[0, channels].double()  # (c, L)
        if delta_bias is not None:
            step = step + delta_bias[channels, None].double()
        if delta_softplus:
            step = softplus(step)
        step = step.unsqueeze(-1)  # (c, L, 1)
        decay = torch.exp(A[channels, None].double() * step)  # (c, L, n)
        inputs = step * _coefficients(B, u.shape[1], channels)
        outputs = _coefficients(C, u.shape[1], channels)
        skip = 0.0 if D is None else D[channels, None].double()
        return of_state(decay, inputs, outputs.expand_as(inputs), skip)

    return ScanReading(
        count=u.shape[1],
        system=system,
        values=u[0].unsqueeze(1),
        outputs=lambda result: (result[0] if isinstance(result, tuple) else result)[0].unsqueeze(1),
        gate=None if z is None else silu(z[0].double()).unsqueeze(1),
    )


def _coefficients(x: Tensor, count: int, channels: slice) -> Tensor:
    """Return coefficients of some channels, as (c, L, n), (1, L, n) or (c, 1, n)."""
    if x.ndim == 2:
        return x[channels, None].double()
    if x.ndim == 3:
        return x[:1].double().mT
    group = torch.arange(count, device=x.device)[channels] // (count // x.shape[1])
    return x[0, group].double().mT
