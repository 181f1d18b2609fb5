"""States of recurrences: named tuples of real tensors, batch first."""

from __future__ import annotations

import inspect
import os
import pickle
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx._pytree import register_pytree_flatten_spec
from typing_extensions import Self, TypeVar, dataclass_transform

from gramian._staging import staged_file

__all__ = [
    "State",
    "StateT",
    "broadcasts",
    "check_state",
    "define_state",
    "vector_fits",
    "wrong_shapes",
]


class State(tuple[Any, ...]):
    """Base class of the named tuples that recurrences carry from step to step.

    A field is a real tensor with the batch in its first dimension, a tuple of such fields, or
    another state. A tensor without dimensions (a position, say) belongs to the whole batch, and no
    method of this class changes it. `define_state` turns a subclass into a named tuple.
    """

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "_fields"):  # the class as written, before `define_state`
            return
        pytree.register_pytree_node(
            cls,
            lambda state: (list(state), None),
            lambda leaves, _: cls(*leaves),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            flatten_with_keys_fn=lambda state: (
                [(pytree.GetAttrKey(name), getattr(state, name)) for name in state._fields],
                None,
            ),
        )
        register_pytree_flatten_spec(cls, lambda state, _: list(state))  # PyTorch 2.6 needs it
        # A state is made of tensors only, so `torch.load` may make one with `weights_only=True`.
        torch.serialization.add_safe_globals([cls])

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return a state of the same type, with `function` applied to every batched tensor."""
        return _map(self, function)

    def select(self, indices: Tensor) -> Self:
        """Select the streams at `indices` (int64), in that order, as beam search needs them."""
        return self.map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def put(self, indices: Tensor, other: Self) -> Self:
        """Return the state with the streams at `indices` (int64) replaced by `other`'s."""
        return _combine(self, other, indices)

    def repeat(self, n: int) -> Self:
        """Return a state in which `n` copies of every stream follow each other."""
        return self.map(lambda tensor: tensor.repeat_interleave(n, dim=0))

    def detach(self) -> Self:
        """Return the values detached from the graph, for truncated backpropagation in time."""
        return self.map(Tensor.detach)

    def clone(self) -> Self:
        """Copy the state, so that a step that overwrites the original leaves the copy unchanged."""
        return self.map(Tensor.clone)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Move to another device or floating-point dtype. Integer counts keep their dtype."""
        return self.map(
            lambda tensor: tensor.to(
                device=device, dtype=dtype if tensor.is_floating_point() else None
            )
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, completely or not at all.

        `load` reads the file, and so does `torch.load` with `weights_only=True`. The file does not
        say which model the state belongs to; `GramianCache.save` writes a file that does.
        """
        with staged_file(Path(path)) as stage:
            torch.save(self.clone(), stage)  # a view would be written with all that it views

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> Self:
        """Read a state that `save` has written.

        Args:
            path: The file.
            device: The device of the state; by default the device on which it was saved.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if the file cannot be read, or holds no state of this class. A class of
                your own must be imported before.
        """
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{os.fspath(path)} cannot be read as a state: it is damaged, or holds a class "
                "that is not imported."
            ) from error
        if not isinstance(state, cls):
            raise ValueError(
                f"{os.fspath(path)} holds an object of type {type(state).__name__}; a "
                f"{cls.__name__} is needed."
            )
        return state

    @property
    def nbytes(self) -> int:
        """Return the number of bytes of all batched tensors together."""
        sizes: list[int] = []

        def count(tensor: Tensor) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        self.map(count)
        return sum(sizes)


StateT = TypeVar("StateT", bound=State, default=Any)
"""The type of the states that a system and its recurrence use."""

_StateClass = TypeVar("_StateClass", bound=State)


@dataclass_transform(frozen_default=True)
def define_state(cls: type[_StateClass]) -> type[_StateClass]:
    """Make a named tuple from a subclass of `State`, with the annotated fields in their order.

    ```python
    @define_state
    class PairState(State):
        first: Tensor
        second: Tensor
    ```

    Raises:
        TypeError: if the class annotates no field.
    """
    names = list(inspect.get_annotations(cls))
    if not names:
        raise TypeError(f"the state {cls.__name__} has no annotated field.")
    fields: Any = namedtuple("_Fields", names)  # type: ignore[misc]
    kept = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    body = {**kept, "__qualname__": cls.__qualname__, "__slots__": ()}
    return type(cls.__name__, (fields, *cls.__bases__), body)


def check_state(owner: str, state: object, accepted: Sequence[type[State]]) -> None:
    """Raise a TypeError unless `state` has an accepted type.

    Args:
        owner: A name for the object that continues from the state. The message uses it as its
            subject.
        state: The given state.
        accepted: The types from which the owner can continue.
    """
    if not isinstance(state, tuple(accepted)):
        names = " or ".join(kind.__name__ for kind in accepted)
        given = type(state).__name__
        raise TypeError(f"{owner} continues from a state of type {names}; got {given}.")


def vector_fits(x: Tensor, own: tuple[int, ...], shape: torch.Size) -> bool:
    """Return whether a tensor (*B, *C', *own) can belong to a state for samples of `shape`."""
    split = x.ndim - len(own)
    if split < 0 or x.shape[split:] != own:
        return False
    return x.shape[:split] == shape or broadcasts(x.shape[:split], shape)


def broadcasts(*shapes: torch.Size, onto: torch.Size | None = None) -> bool:
    """Return whether shapes broadcast against each other and, if `onto` is given, to `onto`."""
    if onto is not None and onto in shapes and all(_spreads(shape, onto) for shape in shapes):
        return True
    try:
        shape = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return False
    return onto is None or shape == onto


def joined_shape(samples: tuple[int, ...], channels: torch.Size) -> torch.Size:
    """Return the shape to which samples and channels broadcast.

    Raises:
        RuntimeError: if they do not.
    """
    samples = torch.Size(samples)  # torch's own function takes as long as a small product
    return samples if _spreads(channels, samples) else torch.broadcast_shapes(samples, channels)


def _spreads(shape: torch.Size, onto: torch.Size) -> bool:
    """Return whether `shape` broadcasts against `onto` and leaves it as it is."""
    if len(shape) > len(onto):
        return False
    pairs = zip(reversed(shape), reversed(onto), strict=False)
    return all(size in (1, wanted) for size, wanted in pairs)


def wrong_shapes(state: State, shape: torch.Size) -> ValueError:
    """Return the error for a state whose shapes do not fit samples of `shape`."""
    found: list[str] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(str(tuple(tensor.shape)))
        return tensor

    state.map(note)
    return ValueError(
        f"samples of shape {tuple(shape)} need a state as initial_state makes one for them; got a "
        f"{type(state).__name__} of the shapes {', '.join(found)}."
    )


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
