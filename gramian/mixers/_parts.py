"""Step a large state a few sequences at a time.

A step of many sequences makes intermediate results of the size of the state. If they do not fit
into the processor's cache, the memory that they take costs more than the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gramian.systems import State

__all__ = ["in_parts", "rows_in_cache"]

_BYTES = 2**22
"""About how many bytes of a state are stepped together."""


def rows_in_cache(state: State, batch: int) -> int:
    """Return how many sequences are stepped together, at most `batch`.

    All are, if the state is small, or if a part of it belongs to all sequences together.
    """
    size = 0
    for tensor in _tensors(state):
        if not tensor.ndim or tensor.shape[0] != batch:
            return batch
        size += tensor.nbytes
    if size <= 2 * _BYTES:
        return batch
    return math.ceil(batch / math.ceil(size / _BYTES))


def in_parts(
    step: Callable[[Tensor, State], tuple[Tensor, State]], z: Tensor, state: State, rows: int
) -> tuple[Tensor, State]:
    """Step a few sequences after the other, and overwrite the state.

    Args:
        step: The step.
        z: The input, (batch, …).
        state: The state, each tensor of which has the batch in its first dimension.
        rows: The number of sequences to step together.

    Returns:
        The output, (batch, …), and the new state.
    """
    outputs, states = [], []
    for first in range(0, len(z), rows):
        part = slice(first, first + rows)
        before = state.map(lambda tensor, part=part: tensor[part])  # type: ignore[misc]
        y, after = step(z[part], before)
        outputs.append(y)
        states.append(_written(before, after))
    return torch.cat(outputs), _joined(state, states)


def _tensors(fields: Iterable[Any]) -> Iterator[Tensor]:
    for field in fields:
        if isinstance(field, Tensor):
            yield field
        else:
            yield from _tensors(field)


def _written(before: Any, after: Any) -> Any:
    """Write a new state into the memory of the old one, where it has the same shape and dtype.

    Returns:
        The new state, with None in the place of what was written.
    """
    if not isinstance(before, Tensor):
        pairs = zip(before, after, strict=True)
        return tuple(_written(one, other) for one, other in pairs)
    if (before.shape, before.dtype) != (after.shape, after.dtype):
        return after
    if before.data_ptr() != after.data_ptr():
        before.copy_(after)
    return None


def _joined(state: Any, parts: Sequence[Any]) -> Any:
    """Join the parts of a state that were not written into it."""
    if isinstance(state, Tensor):
        return state if parts[0] is None else torch.cat([*parts])
    fields = [_joined(field, list(part)) for field, *part in zip(state, *parts, strict=True)]
    return type(state)(*fields) if hasattr(state, "_fields") else tuple(fields)
