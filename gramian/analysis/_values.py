"""Find the tensors in the arguments and results of calls, and the axis of time in each of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "changed_positions",
    "copied",
    "is_padded_before",
    "leaves_of",
    "perturbed",
    "sequences_in",
    "sharing",
    "streams_of",
    "time_axis",
    "window",
    "with_leaf",
    "with_leaves",
]

_STREAMS = 4
"""The largest number of sequences that may lie one after the other along one axis."""

_CHANGE = 1e-5
"""The least relative change of a position that counts, in single precision."""


def leaves_of(value: Any) -> list[Any]:
    """Return the leaves of nested tuples, lists, mappings and dataclasses of tensors."""
    if isinstance(value, MutableMapping):
        return [leaf for inner in value.values() for leaf in leaves_of(inner)]
    if isinstance(value, list | tuple):
        return [leaf for inner in value for leaf in leaves_of(inner)]
    if _holds_tensors(value):
        return [leaf for f in fields(value) for leaf in leaves_of(getattr(value, f.name))]
    return [value]


def _holds_tensors(value: Any) -> bool:
    """Return whether a value is an instance of a dataclass that has tensors as fields."""
    if not is_dataclass(value) or isinstance(value, type) or hasattr(value, "get_seq_length"):
        return False
    return any(isinstance(getattr(value, f.name, None), Tensor) for f in fields(value))


def with_leaves(value: Any, leaves: Iterator[Any]) -> Any:
    """Return nested values of the same structure and types with other leaves."""
    if isinstance(value, MutableMapping):
        result = copy.copy(value)
        for key, inner in value.items():
            result[key] = with_leaves(inner, leaves)
        return result
    if isinstance(value, list | tuple):
        inner_values = [with_leaves(inner, leaves) for inner in value]
        named = isinstance(value, tuple) and hasattr(value, "_fields")
        return type(value)(*inner_values) if named else type(value)(inner_values)
    if _holds_tensors(value):
        result = copy.copy(value)
        for f in fields(value):  # of frozen dataclasses, too
            object.__setattr__(result, f.name, with_leaves(getattr(value, f.name), leaves))
        return result
    return next(leaves)


def copied(value: Any) -> Any:
    """Return nested values with copies of their tensors and caches, and new containers."""
    return with_leaves(value, map(_copied_leaf, leaves_of(value)))


def _copied_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().clone()
    if hasattr(leaf, "get_seq_length"):  # a cache of transformers, to which a call adds its input
        return copy.deepcopy(leaf)
    return leaf


def sharing(value: Any, others: Any) -> Any:
    """Return nested values, in which tensors that equal some of `others` are replaced by these.

    So tensors that are equal are held once. Neither they nor the others may be changed in place.
    """
    held = [leaf for leaf in leaves_of(others) if isinstance(leaf, Tensor)]

    def shared(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return next((one for one in held if _same(one, leaf)), leaf)

    return with_leaves(value, map(shared, leaves_of(value)))


def _same(one: Tensor, other: Tensor) -> bool:
    alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return alike and torch.equal(one, other)


def with_leaf(value: Any, index: int, leaf: Any) -> Any:
    """Return nested values with another leaf at an index of `leaves_of`."""
    leaves = leaves_of(value)
    leaves[index] = leaf
    return with_leaves(value, iter(leaves))


def time_axis(x: Any, length: int, longest: int = 0) -> int | None:
    """Return the axis of a tensor along which its positions lie, or None if there is none.

    Args:
        x: Any value. A value that is not a tensor has no axis of time.
        length: The number of positions.
        longest: If it is above `length` and no axis has `length` positions, an axis with more
            positions, up to `longest`, counts too. Convolutions that pad on both sides return such
            tensors. So does an axis of several streams, one sequence after the other, but not the
            first axis: copies of tokens, as for several experts, lie there in any order.
    """
    if not isinstance(x, Tensor) or x.ndim == 0:
        return None
    fitting = [d for d in range(x.ndim) if x.shape[d] == length]
    if not fitting:
        fitting = [d for d in range(x.ndim) if length < x.shape[d] <= longest]
    if not fitting:
        fitting = [d for d in range(1, x.ndim) if streams_of(x.shape[d], length) > 1]
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
        axes = sum(
            size == length or (d > 0 and streams_of(size, length) > 1)
            for d, size in enumerate(leaf.shape)
        )
        if axes == 1 or (leaf.shape[axis] != length and length < leaf.shape[axis] <= longest):
            yield index, leaf, axis


def streams_of(size: int, length: int) -> int:
    """Return how many sequences lie one after the other along an axis of a size: 1 to 4."""
    count, rest = divmod(size, length)
    return count if not rest and 2 <= count <= _STREAMS else 1


def window(
    x: Tensor, axis: int, length: int, padded_before: bool, streams: int | None = None
) -> Tensor:
    """Return the positions of a sequence as a view with the axis of time in front.

    Args:
        x: A sequence of at least `length` positions.
        axis: Its axis of time.
        length: The number of positions.
        padded_before: Whether further positions come before the sequence, as in the arguments of a
            call. In the results of a call they may come after it, too.
        streams: The number of sequences along the axis. They become a dimension after that of time.
            By default it follows from the size.
    """
    rows = x.movedim(axis, 0)
    streams = streams_of(len(rows), length) if streams is None else streams
    if streams > 1:
        return rows.unflatten(0, (streams, length)).movedim(1, 0)
    return rows[len(rows) - length :] if padded_before else rows[:length]


def is_padded_before(x: Tensor, y: Tensor, axis: int, length: int, position: int) -> bool:
    """Return whether the further positions of a result come before the sequence.

    They do if no earlier place responds to a change than the one that it would have then: this is
    the reading with the least mixing.

    Args:
        x: The result, with at least `length` positions.
        y: The result after a change at a position and possibly at later ones.
        axis: Its axis of time.
        length: The number of positions.
        position: The position.
    """
    further = x.shape[axis] - length
    if not further or streams_of(x.shape[axis], length) > 1:
        return False
    changed = changed_positions(x.movedim(axis, 0), y.movedim(axis, 0))
    return bool(changed) and min(changed) >= position + further


def perturbed(
    value: Any,
    length: int,
    longest: int,
    positions: Sequence[int],
    generator: torch.Generator,
    padded_before: bool = False,
) -> Any:
    """Return nested values with other numbers at some positions.

    Sequences of numbers get noise of twice their standard deviation. Integers are replaced by
    integers from other positions, so that they stay in the vocabulary. Masks do not change.
    `longest` is that of `time_axis`, and `padded_before` that of `window`.
    """
    leaves = leaves_of(value)
    for index, x, axis in sequences_in(value, length, longest):
        if bool((x <= torch.finfo(x.dtype).min / 2).any()):
            continue  # a mask
        leaves[index] = x = x.detach().clone()
        rows = window(x, axis, length, padded_before)
        scale = 2 * float(x.float().std(unbiased=False).clamp_min(0.1))
        for position in positions:
            noise = torch.randn(rows[position].shape, generator=generator)
            rows[position] += scale * noise.to(rows)
    for index, x in enumerate(leaves):
        along = time_axis(x, length)
        if (
            along is None
            or x.shape[along] != length
            or x.is_floating_point()
            or x.is_complex()
            or x.dtype == torch.bool
        ):
            continue
        other = _other_integers(x, along, positions)
        if other is not None:
            leaves[index] = other
    return with_leaves(value, iter(leaves))


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


def changed_positions(x: Tensor, y: Tensor) -> set[int]:
    """Return the positions, in the first axis, at which x and y differ by more than rounding."""
    limit = max(_CHANGE, 4 * torch.finfo(x.dtype).eps) if x.is_floating_point() else 0.0
    rows = [t.detach().reshape(len(t), -1).double() for t in (x, y)]
    rows = [torch.nan_to_num(r, nan=0.0, posinf=0.0, neginf=0.0) for r in rows]
    difference = (rows[0] - rows[1]).norm(dim=-1)
    scale = torch.maximum(rows[0].norm(dim=-1), rows[1].norm(dim=-1))
    return set((difference > limit * scale.clamp_min(1e-30)).nonzero().flatten().tolist())
