"""States of recurrences: named tuples of real tensors, batch first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from typing_extensions import Self

__all__ = ["State"]


class State(tuple):
    """Mixin for the named tuples that recurrences carry from step to step.

    Fields are real tensors with the batch in their first dimension, tuples of such fields, or
    further states. A tensor without dimensions (a position, say) belongs to the whole batch and is
    left alone by everything here.
    """

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        pytree.register_pytree_node(
            cls,
            lambda state: (list(state), None),
            lambda leaves, _: cls(*leaves),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A state of the same type with ``function`` applied to every batched tensor."""
        return _map(self, function)

    def select(self, indices: Tensor) -> Self:
        """The streams at ``indices`` (int64), in that order: beam search, finished sequences."""
        return self.map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def put(self, indices: Tensor, other: Self) -> Self:
        """This state with the streams at ``indices`` (int64) replaced by those of ``other``."""
        return _combine(self, other, indices)

    def repeat(self, n: int) -> Self:
        """Every stream ``n`` times, copies side by side."""
        return self.map(lambda tensor: tensor.repeat_interleave(n, dim=0))

    def detach(self) -> Self:
        """The same values, cut off from the graph: truncated backpropagation through time."""
        return self.map(Tensor.detach)

    def clone(self) -> Self:
        """A copy that a step, which consumes its state, cannot touch."""
        return self.map(Tensor.clone)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """The state on another device or in another floating-point dtype; counts stay integers."""
        return self.map(
            lambda tensor: tensor.to(
                device=device, dtype=dtype if tensor.is_floating_point() else None
            )
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all batched tensors together."""
        sizes: list[int] = []

        def count(tensor: Tensor) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        self.map(count)
        return sum(sizes)


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, State):
        return type(value)(*(_map(field, function) for field in value))
    if isinstance(value, tuple):
        return tuple(_map(field, function) for field in value)
    return function(value) if value.ndim else value


def _combine(value: Any, other: Any, indices: Tensor) -> Any:
    if isinstance(value, tuple):
        fields = (_combine(*pair, indices) for pair in zip(value, other, strict=True))
        return type(value)(*fields) if isinstance(value, State) else tuple(fields)
    if not value.ndim:
        return value
    return value.index_copy(0, indices.to(value.device), other.to(value.dtype))
