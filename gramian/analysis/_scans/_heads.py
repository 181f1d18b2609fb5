r"""Make readings of scans whose values are (batch, L, heads, N), the layout of most libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from gramian.analysis._scans._reading import ScanReading, heads_first, of_state, single
from gramian.systems import System

__all__ = ["decays", "delta_rule", "first", "gated_recurrence", "of_heads", "state_gates", "unit"]

_EPSILON = 1e-6  # what every implementation adds to the squared length of queries and keys


def first(result: Any) -> Tensor:
    """Return the outputs of a scan that may also return its last state."""
    return result[0] if isinstance(result, tuple | list) else result


def unit(x: Tensor) -> Tensor:
    """Return vectors (…, n) divided by their lengths, as scans normalize queries and keys."""
    return x * (x.square().sum(-1, keepdim=True) + _EPSILON).rsqrt()


def of_heads(
    system: Callable[[slice], System],
    v: Tensor,
    initial_state: Tensor | None = None,
    state_v_first: bool | None = False,
    **options: Any,
) -> ScanReading:
    """Return the reading of a scan with a system for each head.

    Args:
        system: A function that maps a slice of heads to their system.
        v: The values, (batch, L, heads, N). The outputs have the same layout.
        initial_state: (batch, heads, n, N), or None if it is zero.
        state_v_first: Whether the initial state is (batch, heads, N, n) instead.
        **options: Further arguments of the scan. Those that change the order of time are refused,
            and those that change no recurrence are ignored.
    """
    names = ("cu_seqlens", "reverse", "head_first", "cp_context", "seq_idx", "position_ids")
    single(v.shape[1], **{name: options.get(name) for name in names})
    initial = None
    if initial_state is not None:
        v_first = bool(state_v_first) or bool(options.get("transpose_state_layout"))
        initial = initial_state[0] if v_first else initial_state[0].mT
    return ScanReading(
        count=v.shape[2],
        system=system,
        values=v[0].permute(1, 2, 0),
        outputs=lambda result: first(result)[0].permute(1, 2, 0),
        initial=initial,
    )


def gated_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log: Tensor | None,
    scale: float | None = None,
    **options: Any,
) -> ScanReading:
    """Return the reading of `S_t = diag(a_t) S_{t-1} + k_t u_tᵀ`, `y_t = scale · S_tᵀ q_t`.

    Args:
        q: The queries, (batch, L, groups, n).
        k: The keys, (batch, L, groups, n).
        v: The values, (batch, L, heads, N).
        log: Logarithms of a: (batch, L, heads, n), (batch, L, heads) or, constant, (heads); None if
            a is 1.
        scale: The factor of the outputs, by default n^(-1/2).
        **options: Further arguments of the scan, as in `of_heads`.
    """
    heads = v.shape[2]
    factor = k.shape[-1] ** -0.5 if scale is None else float(scale)
    decay = decays(log, v)

    def system(channels: slice) -> System:
        inputs, outputs = (heads_first(x, heads, channels) for x in (k, q))
        return of_state(decay(channels), inputs, factor * outputs)

    return of_heads(system, v, **options)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log: Tensor | None,
    beta: Tensor,
    scale: float | None = None,
    normalized: bool = False,
    **options: Any,
) -> ScanReading:
    """Return the reading of `S_t = (I - β_t k_t k_tᵀ) diag(a_t) S_{t-1} + β_t k_t u_tᵀ`.

    The outputs are `y_t = scale · S_tᵀ q_t`.

    Args:
        q: The queries, (batch, L, groups, n).
        k: The keys, (batch, L, groups, n).
        v: The values, (batch, L, heads, N).
        log: Logarithms of a: (batch, L, heads, n), (batch, L, heads) or, constant, (heads); None if
            a is 1.
        beta: The factors β, (batch, L, heads).
        scale: The factor of the outputs, by default n^(-1/2).
        normalized: Whether the scan divides queries and keys by their lengths.
        **options: Further arguments of the scan, as in `of_heads`.

    Raises:
        ValueError: if the factors β differ between the value channels of a head.
    """
    heads = v.shape[2]
    factor = k.shape[-1] ** -0.5 if scale is None else float(scale)
    decay = decays(log, v)
    if beta.ndim != 3:
        raise ValueError(
            f"the factors β of a delta rule must be (batch, L, heads); got {tuple(beta.shape)}."
        )

    def system(channels: slice) -> System:
        key, query = (heads_first(x, heads, channels) for x in (k, q))  # (h, L, n)
        if normalized:
            key, query = unit(key), unit(query)
        rate = heads_first(beta.unsqueeze(-1), heads, channels)  # (h, L, 1)
        a = decay(channels)
        return of_state(
            decay=a,
            inputs=rate * key,
            outputs=factor * query,
            p=-rate * key,
            q=(a * key).expand_as(key),
        )

    return of_heads(system, v, **options)


def decays(log: Tensor | None, v: Tensor) -> Callable[[slice], Tensor]:
    """Return a function that maps a slice of heads to their gates, (h, L, n) or (h, L, 1).

    Args:
        log: Logarithms of the gates, (batch, L, heads, n), (batch, L, heads) or (heads); None if
            all gates are 1.
        v: The values, (batch, L, heads, N).
    """
    length, heads = v.shape[1:3]

    def decay(channels: slice) -> Tensor:
        if log is None:
            count = len(range(heads)[channels])
            return torch.ones(count, length, 1, dtype=torch.float64, device=v.device)
        if log.ndim == 1:
            return log[channels].double().exp()[:, None, None].expand(-1, length, -1)
        gate = log if log.ndim == 4 else log.unsqueeze(-1)
        return heads_first(gate, heads, channels).exp()

    return decay


def state_gates(
    g: Tensor, A_log: Tensor, dt_bias: Tensor | None, lower_bound: float | None
) -> Tensor:
    """Return logarithms of gates that a scan computes from the output of a layer.

    Args:
        g: The output of the layer, (batch, L, heads, n).
        A_log: Logarithms of rates, with one number for each head.
        dt_bias: What is added to g, with n numbers for each head; None if there is none.
        lower_bound: The least logarithm of a gate, or None.

    Returns:
        `-e^{A_log} softplus(g + bias)` or, with a bound, `bound · sigmoid(e^{A_log} (g + bias))`,
        (batch, L, heads, n).
    """
    g = g.double() if dt_bias is None else g.double() + dt_bias.double().reshape(g.shape[-2:])
    rate = A_log.double().exp().reshape(-1, 1)  # (heads, 1)
    return -rate * softplus(g) if lower_bound is None else lower_bound * torch.sigmoid(rate * g)
