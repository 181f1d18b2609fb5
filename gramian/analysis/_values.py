"""Find the tensors in the arguments and results of calls, and the axis of time in each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

__all__ = [
    "PADDING",
    "changed_positions",
    "copied",
    "leaves_of",
    "perturbed",
    "sequences_in",
    "time_axis",
    "with_leaf",
]

PADDING = 12
"""The largest number of positions that a convolution may add to a short sequence."""

_CHANGE = 1e-5
"""The least relative change of a position that counts, in single precision."""


def leaves_of(value: Any) -> list[Any]:
    """Return the leaves of nested tuples, lists, mappings and outputs of transformers."""
    return pytree.tree_leaves(value)


def copied(value: Any) -> Any:
    """Return nested values with copies of their tensors, and new containers around them."""
    return pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, value)


def with_leaf(value: Any, index: int, leaf: Any) -> Any:
    """Return nested values with another leaf at an index of `leaves_of`."""
    leaves, structure = pytree.tree_flatten(value)
    leaves[index] = leaf
    return pytree.tree_unflatten(leaves, structure)


def time_axis(x: Any, length: int, longest: int = 0) -> int | None:
    """Return the axis of a tensor along which its positions lie, or None if there is none.

    Args:
        x: Any value. A value that is not a tensor has no axis of time.
        length: The number of positions.
        longest: If it is above `length` and no axis has `length` positions, an axis with more
            positions, up to `longest`, counts too. Convolutions that pad on both sides return such
            tensors.
    """
    if not isinstance(x, Tensor) or x.ndim == 0:
        return None
    fitting = [d for d in range(x.ndim) if x.shape[d] == length]
    if not fitting:
        fitting = [d for d in range(x.ndim) if length < x.shape[d] <= longest]
    if not fitting:
        return None
    size = min(x.shape[d] for d in fitting)
    fitting = [d for d in fitting if x.shape[d] == size]
    return 1 if 1 in fitting else fitting[0]


def sequences_in(value: Any, length: int, longest: int = 0) -> Iterator[tuple[int, Tensor, int]]:
    """Yield index, tensor and axis of time of the floating-point leaves that are sequences.

    Maps between positions, which have two axes of time, are no sequences: they are coefficients.
    """
    for index, leaf in enumerate(leaves_of(value)):
        axis = time_axis(leaf, length, longest)
        if axis is None or not leaf.is_floating_point():
            continue
        if sum(size == length for size in leaf.shape) == 1 or leaf.shape[axis] != length:
            yield index, leaf, axis


def perturbed(
    value: Any, length: int, positions: Sequence[int], generator: torch.Generator
) -> tuple[Any, bool]:
    """Return nested values with other numbers at some positions, and whether anything differs.

    Sequences of numbers get noise of twice their standard deviation. Integers are replaced by
    integers from other positions, so that they stay in the vocabulary. Masks do not change.
    """
    leaves, structure = pytree.tree_flatten(value)
    differs = False
    for index, x, axis in sequences_in(value, length, length + PADDING):
        if bool((x <= torch.finfo(x.dtype).min / 2).any()):
            continue  # a mask
        x = x.detach().clone()
        for position in positions:
            part = x.select(axis, position)
            scale = 2 * float(x.float().std(unbiased=False).clamp_min(0.1))
            noise = torch.randn(part.shape, generator=generator)
            part.add_(scale * noise.to(part))
        leaves[index] = x
        differs = True
    for index, x in enumerate(leaves):
        axis = time_axis(x, length)
        if axis is None or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            continue
        x = _other_integers(x, axis, positions)
        if x is not None:
            leaves[index], differs = x, True
    return pytree.tree_unflatten(leaves, structure), differs


def _other_integers(x: Tensor, axis: int, positions: Sequence[int]) -> Tensor | None:
    rows = x.movedim(axis, 0)
    flat = rows.reshape(len(rows), -1)
    steps = flat[1:] - flat[:-1]
    if bool((steps == steps[:1]).all()):
        return None  # a mask of ones, or positions
    result = x.detach().clone()
    for position in positions:
        others = (flat != flat[position]).any(-1).nonzero().flatten()
        result.select(axis, position).copy_(rows[int(others[len(others) // 2])])
    return result


def changed_positions(x: Tensor, y: Tensor, axis: int, length: int) -> set[int]:
    """Return the positions at which two tensors differ by more than rounding errors."""
    limit = max(_CHANGE, 4 * torch.finfo(x.dtype).eps)
    rows = [t.detach().movedim(axis, 0).reshape(t.shape[axis], -1)[:length].double() for t in (x, y)]
    rows = [torch.nan_to_num(r, nan=0.0, posinf=0.0, neginf=0.0) for r in rows]
    difference = (rows[0] - rows[1]).norm(dim=-1)
    scale = torch.maximum(rows[0].norm(dim=-1), rows[1].norm(dim=-1))
    return set((difference > limit * scale.clamp_min(1e-30)).nonzero().flatten().tolist())
