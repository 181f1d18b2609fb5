"""Keep the buffers of modules, their other state and the random numbers as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["Buffers", "kept"]

_OWN = vars(nn.Module()).keys()
"""Names of the attributes that every module has."""


class Buffers:
    """The buffers of a module and of the modules inside it, as they are when this is made.

    So are attributes that hold tensors, numbers or nothing without being buffers: a module may keep
    a state or a count in them.

    Args:
        module: The module. Its buffers on the device "meta" are left out, as they hold no numbers.
    """

    def __init__(self, module: nn.Module) -> None:
        self._kept = [
            (owner, name, buffer, buffer.detach().clone())
            for owner in module.modules()
            for name, buffer in owner.named_buffers(recurse=False)
            if not buffer.is_meta
        ]
        self._plain = [
            (owner, {name: _copied(x) for name, x in _state(owner).items()}, _state(owner))
            for owner in module.modules()
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the module these buffers and their numbers again."""
        for owner, name, buffer, numbers in self._kept:
            if getattr(owner, name, None) is not buffer:
                setattr(owner, name, buffer)
            if not torch.equal(buffer, numbers):
                buffer.copy_(numbers)
        for owner, copies, values in self._plain:
            for name in _state(owner).keys() - values.keys():
                del owner.__dict__[name]
            for name, value in values.items():
                owner.__dict__[name] = _with_content(value, copies[name])


def _state(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that may be a state, without parameters and buffers."""
    return {
        name: value for name, value in vars(module).items() if name not in _OWN and _is_state(value)
    }


def _is_state(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_state, value))
    if isinstance(value, dict):
        return all(map(_is_state, value.values()))
    return value is None or isinstance(value, torch.Tensor | int | float)


def _copied(value: Any) -> Any:
    """Return a copy of a state with all that it contains."""
    if isinstance(value, torch.Tensor):
        return value if value.is_meta else value.detach().clone()
    if isinstance(value, list | tuple):
        return [_copied(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return value


def _with_content(value: Any, copy: Any) -> Any:
    """Return the object of a state with the content that it had when it was copied."""
    if isinstance(value, torch.Tensor):
        if not value.is_meta and not torch.equal(value, copy):
            value.data.copy_(copy)
    elif isinstance(value, list | dict):
        if isinstance(value, list) and len(value) == len(copy):
            value[:] = [_with_content(inner, x) for inner, x in zip(value, copy, strict=True)]
        elif isinstance(value, list):
            value[:] = copy
        else:
            value.clear()
            value.update(copy)
    elif isinstance(value, tuple):
        for inner, x in zip(value, copy, strict=True):
            _with_content(inner, x)
    return value


@contextmanager
def kept(module: nn.Module | None = None) -> Iterator[None]:
    """Put a module's buffers and the state of the random numbers back after this context.

    Args:
        module: The module; None to keep the random numbers only. Those of the CPU are kept, and
            those of the module's accelerator.
    """
    buffers = None if module is None else Buffers(module)
    devices = set()
    if torch.cuda.is_initialized():
        tensors = [] if module is None else module.parameters()
        devices = {x.device for x in tensors if x.is_cuda} or {torch.device("cuda")}
    states = {device: torch.cuda.get_rng_state(device) for device in devices}
    random = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(random)
        for device, state in states.items():
            torch.cuda.set_rng_state(state, device)
        if buffers is not None:
            buffers.put_back()
