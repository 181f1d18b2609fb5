"""Linear recurrences as one operation of a graph that is traced for every length.

The number of blocks and the rounds of `gramian.ops.scan` depend on the length, so that a graph for
any length cannot contain them. The operator hides them, in the forward and in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from gramian.ops._operator import differentiable, operator, recorded_inside_transforms, recording
from gramian.ops.derivatives import records_derivatives
from gramian.ops.scan import Diagonal, DiagonalPlusLowRank, Transition, run_blocks

__all__ = ["run_opaquely"]

_ELEMENTS = 2**24  # coefficients (batch, heads, steps, n) that are joined to blocks at once


@operator("linear_recurrence")
def run_opaquely(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    p: Tensor | None,
    q: Tensor | None,
    values: Tensor,
    memory: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run all steps of a linear recurrence as one operation of a traced graph.

    Args:
        A: (batch, heads, length, n): the gates. B, C, p and q have the same shape.
        B: The input vectors.
        C: The output vectors.
        D: (batch, heads, length): the direct terms.
        p: The left vectors of a low-rank change of the gates, or None.
        q: The right vectors of this change, or None.
        values: (batch, heads, length, N): the inputs.
        memory: (batch, heads, n, N): the state before the first step.

    Returns:
        The outputs, (batch, heads, length, N), and the state after the last step.
    """
    arguments = A, B, C, D, p, q, values
    outputs = []
    for part in _stretches(B, values):
        y, memory = _run(*(_cut(x, part) for x in arguments), memory)
        outputs.append(y)
    y = torch.cat(outputs, dim=2) if outputs else values
    return y.clone(memory_format=torch.contiguous_format), memory.clone(
        memory_format=torch.contiguous_format
    )


@register_fake(run_opaquely)
def _run_opaquely_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_contiguous_like(x) for x in arguments[-2:])  # like the values and the memory


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Run all steps by operations that have derivatives; see `run_opaquely`."""
    A, B, C, D, p, q, values, memory = arguments
    batch, heads, length = B.shape[:3]
    if length == 0:
        return values.clone(), memory.clone()
    transition: Transition = Diagonal(A.flatten(0, 1))
    if p is not None and q is not None:
        low_rank = (x.flatten(0, 1).unsqueeze(-1) for x in (p, q))
        transition = DiagonalPlusLowRank(A.flatten(0, 1), *low_rank)
    B_, C_, D_ = (x.flatten(0, 1) for x in (B, C, D))
    signal, start = values.flatten(0, 1).mT, memory.flatten(0, 1)
    y, end = run_blocks(transition, B_, C_, D_, signal, start, _block_size(B, values))
    return y.mT.unflatten(0, (batch, heads)), end.unflatten(0, (batch, heads))


def _block_size(B: Tensor, values: Tensor) -> int:
    """Return the number of steps in a block, for which it costs about as much as its states."""
    return int(1 << (max(1, min(64, B.shape[-1], values.shape[-1])) - 1).bit_length())


def _stretches(B: Tensor, values: Tensor) -> Iterator[slice]:
    """Yield stretches of time whose working memory is bounded."""
    batch, heads, length, order = B.shape
    size = _block_size(B, values)
    size *= max(1, _ELEMENTS // max(1, batch * heads * order * size))
    for begin in range(0, length, size):
        yield slice(begin, begin + size)


def _cut(x: Tensor | None, part: slice) -> Tensor | None:
    return None if x is None else x[:, :, part]


@operator("linear_recurrence_backward")
def _backward(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    p: Tensor | None,
    q: Tensor | None,
    values: Tensor,
    memory: Tensor,
    of_outputs: Tensor,
    of_end: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the arguments of `run_opaquely`; those of None are empty.

    The states before the stretches are kept, and all else is computed again, stretch by stretch.
    """
    timed = A, B, C, D, p, q, values
    parts = list(_stretches(B, values))
    starts = [memory]
    for part in parts[:-1]:
        starts.append(_run(*(_cut(x, part) for x in timed), starts[-1])[1])
    pieces: list[list[Tensor]] = []
    for part, start in zip(reversed(parts), reversed(starts), strict=False):
        with recording():
            inputs = [
                None if x is None else x.detach().requires_grad_()
                for x in (*(_cut(x, part) for x in timed), start)
            ]
            y, end = _run(*inputs)
            given = [x for x in inputs if x is not None]
            *found, of_end = torch.autograd.grad(
                (y, end), given, (of_outputs[:, :, part], of_end), materialize_grads=True
            )
        pieces.append(found)
    joined = [torch.cat(some[::-1], dim=2) for some in zip(*pieces, strict=True)]
    gradients = iter(joined or [torch.zeros_like(x) for x in timed if x is not None])
    results = [A.new_empty(0) if x is None else next(gradients) for x in timed]
    return (*results, of_end.clone())  # type: ignore[return-value]  # eight tensors


@register_fake(_backward)
def _backward_fake(A: Tensor, *others: Any) -> tuple[Tensor, ...]:
    inputs = A, *others[:-2]  # without the gradients of the outputs and of the last state
    return tuple(A.new_empty(0) if x is None else _contiguous_like(x) for x in inputs)


differentiable(_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, of_outputs: Tensor, of_end: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    if not records_derivatives():
        found = _backward(*inputs, of_outputs, of_end)
        return tuple(g if x is not None else None for x, g in zip(inputs, found, strict=True))
    run, given = _of_some(inputs, inputs)
    pieces = iter(torch.func.vjp(run, *given)[1]((of_outputs, of_end)))
    return tuple(None if x is None else next(pieces) for x in inputs)


def _tangents(
    inputs: Sequence[Tensor | None], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Return the tangents of the outputs: the derivative, by its cotangents, of the gradients."""
    run, given = _of_some(inputs, tangents)
    with torch.enable_grad(), recorded_inside_transforms():
        given = [x.view_as(x) for x in given]
        given = [x if x.requires_grad else x.requires_grad_() for x in given]
        outputs = run(*given)
        weights = [torch.zeros_like(y).requires_grad_() for y in outputs]
        gradients = torch.autograd.grad(
            outputs, given, weights, create_graph=True, materialize_grads=True
        )
        moved = [x for x in tangents if x is not None]
        return torch.autograd.grad(
            gradients, weights, moved, create_graph=True, materialize_grads=True
        )


def _of_some(
    inputs: Sequence[Tensor | None], chosen: Sequence[Tensor | None]
) -> tuple[Callable[..., tuple[Tensor, Tensor]], list[Tensor]]:
    """Return `_run` as a function of the inputs at whose places others are chosen, and these."""
    places = [i for i, one in enumerate(chosen) if one is not None]

    def run(*given: Tensor) -> tuple[Tensor, Tensor]:
        arguments = list(inputs)
        for i, one in zip(places, given, strict=True):
            arguments[i] = one
        return _run(*arguments)

    return run, [x for i, x in enumerate(inputs) if i in places and x is not None]


differentiable(run_opaquely, setup=_setup, backward=_gradients, jvp=_tangents)
