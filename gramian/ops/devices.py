"""What devices differ in: double precision, and numbers that the host sends without waiting."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor

__all__ = [
    "DEVICES_WITHOUT_FLOAT64",
    "from_host",
    "has_float64",
    "in_double_precision",
    "returned",
    "work_device",
]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

DEVICES_WITHOUT_FLOAT64 = {"mps"}
"""The types of devices that have no double precision."""


def has_float64(device: torch.device) -> bool:
    """Return whether a device has tensors in double precision."""
    return device.type not in DEVICES_WITHOUT_FLOAT64


def work_device(device: torch.device) -> torch.device:
    """Return the device on which to compute: the CPU for a device that has no float64."""
    return device if has_float64(device) else torch.device("cpu")


def returned(figure: Tensor, device: torch.device) -> Tensor:
    """Move a figure in float64 to a device, in float32 if the device has no float64."""
    double = figure.dtype == torch.float64 and not has_float64(device)
    return (figure.float() if double else figure).to(device)


def in_double_precision(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function compute on the CPU if an argument is on a device that has no float64.

    All arguments then move to the CPU: tensors, systems, and others that have a device and a method
    `to`. Tensors in the result return to the device of the first of them, and those in float64
    become float32 if this device has no float64. Gradients flow through both ways.
    """

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        placed: list[Any] = []
        _map((args, kwargs), _is_placed, placed.append)
        devices = [value.device for value in placed]
        if all(map(has_float64, devices)):
            return function(*args, **kwargs)
        args, kwargs = _map((args, kwargs), _is_placed, _to_cpu)
        result: Result = _back(function(*args, **kwargs), devices[0])
        return result

    return run


def _is_placed(value: Any) -> bool:
    return isinstance(getattr(value, "device", None), torch.device) and hasattr(value, "to")


def _map(tree: Any, wanted: Callable[[Any], bool], function: Callable[[Any], Any]) -> Any:
    """Replace the wanted values in a tree of containers.

    PyTorch takes subclasses of lists, tuples and dictionaries for leaves. Here they are containers,
    and stay as they are if nothing in them changes.
    """

    def of_leaf(leaf: Any) -> Any:
        if wanted(leaf):
            return function(leaf)
        if isinstance(leaf, dict):
            values = {key: _map(value, wanted, function) for key, value in leaf.items()}
            same = all(values[key] is leaf[key] for key in leaf)
            return leaf if same else type(leaf)(values)
        if isinstance(leaf, list | tuple):
            items = [_map(value, wanted, function) for value in leaf]
            same = all(new is old for new, old in zip(items, leaf, strict=True))
            return leaf if same else getattr(leaf, "_make", type(leaf))(items)
        return leaf

    return pytree.tree_map(of_leaf, tree)


def _to_cpu(value: Any) -> Any:
    return value.to(torch.device("cpu"))


def _back(result: Any, device: torch.device) -> Any:
    """Return a result with its tensors on a device without float64."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        names = [field.name for field in dataclasses.fields(result)]
        return dataclasses.replace(
            result, **{name: _back(getattr(result, name), device) for name in names}
        )
    return _map(result, lambda x: isinstance(x, Tensor), lambda x: returned(x, device))


def from_host(
    values: Sequence[int] | Sequence[float],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Copy numbers to a device, without waiting for what it still computes.

    `torch.tensor(values, device=device)` waits. This copy does not: the numbers are staged before
    the call returns, so that they need not be kept.

    Args:
        values: the numbers.
        device: the device of the result.
        dtype: the dtype of the result; by default int64 for integers, and the default dtype for
            floating-point numbers.

    Returns:
        (len(values)).
    """
    return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)
