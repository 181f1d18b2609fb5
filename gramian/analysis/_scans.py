r"""Return the scans in transformers' modeling files as time-varying systems.

Each function here corresponds to a scan: a function that layers of transformers call. It has the
signature of the scan, and returns the recurrence that the scan applies to its values. The published
state S_t includes the present input, but the state of the returned system does not. So the system
has `A = a_t`, `B = b_t`, `C = a_t c_t`, and `D` is `c_t · b_t` plus the skip. Output gates and
projections are left out. All value channels of a head share one operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from gramian.systems import System, TimeVarying

__all__ = ["SCANS", "Scan"]

Scan = Callable[..., tuple[int, Callable[[slice], System]]]
"""A function that maps the arguments of a scan to the number of its channels and a second function.
The second function maps a slice of the channels to their system."""


def selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    **kwargs: Any,
) -> tuple[int, Callable[[slice], System]]:
    """Return Mamba's scan (Gu and Dao 2023, algorithm 2) as one recurrence for each channel.

    Args:
        hidden_states: The values, (batch, channels, L).
        dt: Time steps before bias and softplus, (batch, channels, L).
        A: Negative rates of decay, (channels, n).
        B: Input coefficients, (batch, n, L).
        C: Output coefficients, (batch, n, L).
        D: The skip, (channels); None if there is none.
        delta_bias: Bias of the time steps, (channels); None if there is none.
        delta_softplus: Whether softplus is applied to the time steps.
        **kwargs: Arguments that are ignored, such as an output gate.

    Returns:
        The number of channels, and a function that maps a slice of channels to their system.
    """
    B, C = B[0].double().mT, C[0].double().mT  # (L, n)

    def system(channels: slice) -> System:
        step = dt[0, channels].double()  # (c, L)
        if delta_bias is not None:
            step = step + delta_bias[channels, None].double()
        if delta_softplus:
            step = softplus(step)
        decay = torch.exp(A[channels, None].double() * step.unsqueeze(-1))  # (c, L, n)
        inputs = step.unsqueeze(-1) * B
        skip = 0 if D is None else D[channels, None].double()
        return TimeVarying(decay, inputs, decay * C, (inputs * C).sum(-1) + skip)

    return hidden_states.shape[1], system


def chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **kwargs: Any,
) -> tuple[int, Callable[[slice], System]]:
    """Return Mamba2's scan (Dao and Gu 2024) as a recurrence with one gate for each head.

    Args:
        hidden_states: The values, (batch, L, heads, N).
        dt: Time steps before bias and softplus, (batch, L, heads).
        A: Negative rates of decay, (heads).
        B: Input coefficients, (batch, L, groups, n).
        C: Output coefficients, (batch, L, groups, n).
        chunk_size: Ignored, because it does not change the recurrence.
        D: The skip, (heads); None if there is none.
        dt_bias: Bias of the time steps, (heads); None if there is none.
        dt_softplus: Whether softplus is applied to the time steps.
        dt_limit: Smallest and largest time step.
        **kwargs: Arguments that are ignored.

    Returns:
        The number of heads, and a function that maps a slice of heads to their system.
    """
    heads = hidden_states.shape[2]
    group = torch.arange(heads, device=B.device) // (heads // B.shape[2])
    step = dt[0].double()
    if dt_bias is not None:
        step = step + dt_bias.double()
    if dt_softplus:
        step = softplus(step)
    step = step.clamp(*dt_limit).mT  # (heads, L)

    def system(channels: slice) -> System:
        own = step[channels, :, None]
        inputs = own * B[0][:, group[channels]].double().transpose(0, 1)  # (h, L, n)
        outputs = C[0][:, group[channels]].double().transpose(0, 1)
        decay = torch.exp(A[channels, None, None].double() * own)
        direct = (inputs * outputs).sum(-1)
        if D is not None and D.ndim == 1:
            direct = direct + D[channels, None].double()
        return TimeVarying(decay.expand_as(inputs), inputs, decay * outputs, direct)

    return heads, system


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[int, Callable[[slice], System]]:
    """Return the gated delta rule (Yang et al. 2024) as a time-varying system.

    The rule is `S_t = (I - β k kᵀ) e^g S_{t-1} + β k vᵀ`.

    Args:
        query: The queries, (batch, L, key heads, n).
        key: The keys, (batch, L, key heads, n).
        value: The values, (batch, L, heads, N).
        g: Logarithms of the gates, (batch, L, heads).
        beta: The factors β, (batch, L, heads).
        use_qk_l2norm_in_kernel: Whether queries and keys are normalized to length 1.
        **kwargs: Arguments that are ignored.

    Returns:
        The number of heads, and a function that maps a slice of heads to their system.
    """
    heads = value.shape[2]
    group = torch.arange(heads, device=key.device) // (heads // key.shape[2])

    def system(channels: slice) -> System:
        q, k = (x[0][:, group[channels]].double().transpose(0, 1) for x in (query, key))
        if use_qk_l2norm_in_kernel:
            q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
        q = q * q.shape[-1] ** -0.5  # (h, L, n)
        gate = g[0][:, channels].double().mT.exp().unsqueeze(-1)  # (h, L, 1)
        rate = beta[0][:, channels].double().mT.unsqueeze(-1)
        along = (q * k).sum(-1, keepdim=True)
        return TimeVarying(
            A=gate.expand_as(k),
            B=rate * k,
            C=gate * (q - rate * along * k),
            D=(rate * along).squeeze(-1),
            p=-rate * k,
            q=gate * k,
        )

    return heads, system


SCANS: dict[str, Scan] = {
    "mamba_selective_scan": selective_scan,
    "mamba2_chunk_scan": chunk_scan,
    "torch_chunk_gated_delta_rule": gated_delta_rule,
}
"""A mapping from the names of the functions that layers call to the functions of this module."""
