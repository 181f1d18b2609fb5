"""Record calls of modules and functions of a model, make them again, and replace functions."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Call",
    "clone",
    "function_calls",
    "is_static",
    "named_arguments",
    "replaced",
    "tensors",
    "time_axis",
    "with_argument",
]

# Arguments that hold positions, not tokens. Masks are recognized by the end of their names.
_STATIC = {
    "alibi",
    "cache_params",
    "cache_position",
    "cos",
    "cu_seqlens",
    "decoder_position_ids",
    "past_key_values",
    "position_bias",
    "position_embeddings",
    "position_embeddings_global",
    "position_embeddings_local",
    "position_id",
    "position_ids",
    "rope_embeddings",
    "seq_idx",
    "sin",
}


@dataclass(eq=False)
class Call:
    """One call of a module or function: what was called with what, and what it returned."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    length: int = 0
    inner: list[Call] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)

    def within(self, chosen: set[int]) -> Iterator[Call]:
        """Yield the chosen calls that were made during this one."""
        for call in self.inner:
            if id(call) in chosen:
                yield call
            yield from call.within(chosen)

    def again(self, args: tuple[Any, ...] | None = None, kwargs: Any = None) -> Any:
        """Call the target again, with other arguments where they are given."""
        with torch.no_grad():
            return self.target(
                *clone(self.args if args is None else args),
                **clone(self.kwargs if kwargs is None else kwargs),
            )


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a nest of tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors(entry)
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors(entry)
    elif hasattr(value, "to_tuple"):
        yield from tensors(value.to_tuple())


def clone(value: Any) -> Any:
    """Return a nest of tuples, lists and dictionaries with copies of its tensors."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[clone(entry) for entry in value])
    if isinstance(value, list | tuple):
        return type(value)(clone(entry) for entry in value)
    if type(value) is dict:
        return {key: clone(entry) for key, entry in value.items()}
    if isinstance(value, MutableMapping):
        copied = copy.copy(value)
        for key, entry in value.items():
            copied[key] = clone(entry)
        return copied
    if hasattr(value, "get_seq_length"):
        return copy.deepcopy(value)
    return value


def time_axis(x: Any, length: int) -> int | None:
    """Return the axis of a tensor that has the given length, or None."""
    axes = [d for d in range(x.ndim) if x.shape[d] == length] if isinstance(x, Tensor) else []
    return 1 if 1 in axes else next(iter(axes), None)


def is_static(name: str) -> bool:
    """Return whether an argument holds positions or a mask, and not tokens."""
    return name in _STATIC or name.endswith("mask")


def named_arguments(call: Call) -> dict[str, Any]:
    """Return the arguments of a call by their names."""
    function = call.target.forward if isinstance(call.target, nn.Module) else call.target
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        names = []
    names += [f"argument {i}" for i in range(len(names), len(call.args))]
    return dict(zip(names, call.args, strict=False)) | call.kwargs


def with_argument(call: Call, name: str, value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with another value for one of them."""
    position = list(named_arguments(call)).index(name)
    if position < len(call.args):
        return (*call.args[:position], value, *call.args[position + 1 :]), call.kwargs
    return call.args, {**call.kwargs, name: value}


def callables(module: nn.Module) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Yield owner, name and value of the functions that a module's code can call by a name."""
    seen: set[str] = set()
    for cls in type(module).__mro__:
        place = sys.modules.get(cls.__module__)
        if place is None or cls.__module__.startswith("torch."):
            break
        if cls.__module__ in seen:
            continue
        seen.add(cls.__module__)
        for name, value in list(vars(place).items()):
            if _is_function(value) and not isinstance(value, type):
                yield place, name, value
    for name, value in list(vars(module).items()):
        if _is_function(value):
            yield module, name, value
    plain = set(dir(nn.Module)) | {"forward"}
    for name in dir(type(module)):
        if name in plain or name.startswith("__"):
            continue
        value = inspect.getattr_static(type(module), name)
        if isinstance(value, types.FunctionType):
            yield module, name, getattr(module, name)


def _is_function(value: Any) -> bool:
    return isinstance(value, types.FunctionType | functools.partial) or (
        callable(value) and hasattr(value, "__wrapped__") and not isinstance(value, type)
    )


@contextlib.contextmanager
def replaced(module: nn.Module, make: Callable[[str, Any], Any]) -> Iterator[None]:
    """Replace the functions that a module's code calls by those that `make` returns."""
    undo: list[tuple[Any, str, Any, bool]] = []
    try:
        for owner, name, value in callables(module):
            substitute = make(name, value)
            if substitute is not None:
                undo.append((owner, name, value, name in vars(owner)))
                owner.__dict__[name] = substitute
        yield
    finally:
        for owner, name, value, was_there in reversed(undo):
            if was_there:
                owner.__dict__[name] = value
            else:
                owner.__dict__.pop(name)


def function_calls(module: nn.Module, call: Call) -> list[tuple[str, Call]]:
    """Return the calls of functions of its file that a module makes, with what they call."""
    found: list[tuple[str, Call]] = []
    stack: list[Call] = []
    running: list[str] = []  # modules inside this one
    paths = {id(m): p for p, m in module.named_modules()}

    def make(name: str, function: Any) -> Any:
        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if running:
                return function(*args, **kwargs)
            made = Call(function, clone(args), clone(kwargs), None, call.length)
            if stack:
                stack[-1].inner.append(made)
            stack.append(made)
            try:
                output = function(*args, **kwargs)
            finally:
                stack.pop()
            made.output = clone(output)
            found.append((name, made))
            return output

        return recorded

    def entered(child: nn.Module, args: Any) -> None:
        for outer in stack:
            outer.modules.append(paths[id(child)])
        running.append(paths[id(child)])

    def left(child: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    with contextlib.ExitStack() as hooks:
        for child in module.modules():
            if child is not module:
                hooks.callback(child.register_forward_pre_hook(entered).remove)
                hooks.callback(child.register_forward_hook(left, always_call=True).remove)
        with replaced(module, make), contextlib.suppress(Exception):
            call.again()
    return found
