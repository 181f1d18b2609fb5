r"""Diagonal recurrences, `x_{t+1} = a_t x_t + w_t`, the core of a selective scan.

The scan is a loop over time. Each step is one call, which reads the coefficients of the step once
and writes one state. If a step is too small to be worth a call, the sequence is split into
stretches. All stretches step at the same time, each from a state of zeros. The same recurrence over
the stretches then gives the true state at the beginning of each stretch. This state, multiplied by
the products of the stretch's gates, is added to the states of the stretch. The algorithm never
divides, so gates may be zero or negative.

Let μ_t be the gradient of x_t, and g_t the gradient that reaches x_t as an output. Then
`μ_t = g_t + a_t μ_{t+1}`. So the gradient obeys the same recurrence backwards in time, and the
derivatives of the operator consist of the operator itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake, register_vmap

from gramian.ops._operator import batch_first, differentiable, operator, total

__all__ = ["apply_diagonal", "diagonal_scan"]

_CPU_STEP, _STEP = 2**12, 2**20  # a step over fewer elements is not worth a call
_LEAST = 8  # with fewer stretches, computing the products of gates does not pay


def diagonal_scan(a: Tensor, w: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the states of `x_{t+1} = a_t x_t + w_t` from `x_0 = start`.

    Args:
        a: (*S, L, n), real: the gates.
        w: (*S, L, n), of the dtype of `a`: the inputs.
        start: (*S, n), of the dtype of `a`: the state before the first step.

    Returns:
        The state before each step, (*S, L, n) in the memory layout of `w`, and the state after the
        last step, (*S, n). Both results are differentiable to any order.
    """
    states, end = _scan(a, w, start, False)
    return states, end


def apply_diagonal(
    a: Tensor, B: Tensor, C: Tensor, D: Tensor, u: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply the system `x_{t+1} = a_t x_t + B_t u_t`, `y_t = C_t · x_t + D_t u_t`.

    Args:
        a: (*S, L, n), real: the diagonals of the state matrices.
        B: (*S, L, n): the input vectors.
        C: (*S, L, n): the output vectors.
        D: (*S, L): the direct terms.
        u: (*S, L): the input.
        start: (*S, n): the state before the first step.

    Returns:
        The output y (*S, L) and the last state (*S, n).
    """
    states, end = diagonal_scan(a, B * u.unsqueeze(-1), start)
    return (C * states).sum(-1) + D * u, end


@operator("diagonal_scan")
def _scan(a: Tensor, w: Tensor, start: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Return the state before each step and the last state, in reversed time if `reverse`."""
    states = torch.empty_like(w)
    return states, _fill(states, a, w, start, reverse)


def _fill(states: Tensor, a: Tensor, w: Tensor, start: Tensor, reverse: bool) -> Tensor:
    """Write the state before each step into `states`, and return the state after the last step."""
    length = w.shape[-2]
    if length == 0:
        return start.clone()
    enough = _CPU_STEP if w.device.type == "cpu" else _STEP
    together = min(enough // max(start.numel(), 1), length // 2)
    if together < _LEAST:
        return _loop(states, a, w, start, reverse)

    size = length // together
    rest = length - size * together
    if reverse:
        many, few = slice(rest, None), slice(0, rest)
    else:
        many, few = slice(0, length - rest), slice(length - rest, None)
    inner, gates, inputs = (
        tensor[..., many, :].unflatten(-2, (together, size)) for tensor in (states, a, w)
    )
    zeros = torch.zeros_like(inputs[..., 0, :])
    ends = _loop(inner, gates, inputs, zeros, reverse)
    products = torch.empty_like(inner)
    whole = _loop(products, gates, None, torch.ones_like(zeros), reverse)
    starts = torch.empty_like(ends)
    end = _fill(starts, whole, ends, start, reverse)
    inner.addcmul_(products, starts.unsqueeze(-2))
    return _fill(states[..., few, :], a[..., few, :], w[..., few, :], end, reverse)


def _loop(states: Tensor, a: Tensor, w: Tensor | None, start: Tensor, reverse: bool) -> Tensor:
    """Compute the states step by step or, if w is None, the products of the gates instead."""
    order = slice(None, None, -1 if reverse else 1)
    outputs, gates = states.unbind(-2)[order], a.unbind(-2)[order]
    end = torch.empty_like(start)
    outputs[0].copy_(start)
    if w is None:
        for x, gate, after in zip(outputs, gates, (*outputs[1:], end), strict=True):
            torch.mul(gate, x, out=after)
    else:
        inputs = w.unbind(-2)[order]
        for x, gate, one, after in zip(outputs, gates, inputs, (*outputs[1:], end), strict=True):
            torch.addcmul(one, gate, x, out=after)
    return end


@register_fake(_scan)
def _scan_fake(a: Tensor, w: Tensor, start: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(w), torch.empty_like(start)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, _, ctx.reverse = inputs
    ctx.save_for_backward(a, output[0])


def _backward(ctx: Any, g: Tensor, g_end: Tensor) -> tuple[Tensor | None, ...]:
    a, states = ctx.saved_tensors
    of_inputs, of_start = _scan(a, g, g_end, not ctx.reverse)
    of_gates = of_inputs * states if ctx.needs_input_grad[0] else None
    return of_gates, of_inputs, of_start, None


def _jvp(
    inputs: Sequence[Any], tangents: Sequence[Tensor | None]
) -> tuple[Tensor | None, Tensor | None]:
    """Run the same recurrence on the tangents of the states, whose inputs are `t_w + t_a x`."""
    a, w, start, reverse = inputs
    t_a, t_w, t_start, _ = tangents
    driven = t_w
    if t_a is not None:
        driven = total(t_a * _scan(a, w, start, reverse)[0], t_w)
    if driven is None:
        driven = torch.zeros_like(w)
    return _scan(a, driven, torch.zeros_like(start) if t_start is None else t_start, reverse)


differentiable(_scan, setup=_setup, backward=_backward, jvp=_jvp)


@register_vmap(_scan)
def _scan_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    a: Tensor,
    w: Tensor,
    start: Tensor,
    reverse: bool,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    first = [
        batch_first(tensor, axis, info.batch_size)
        for tensor, axis in zip((a, w, start), in_dims, strict=False)
    ]
    return _scan(*first, reverse), (0, 0)
