"""Keep the buffers of modules and the random numbers as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["Buffers", "kept"]


class Buffers:
    """The buffers of a module and of the modules inside it, as they are when this is made.

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

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the module these buffers and their numbers again."""
        for owner, name, buffer, numbers in self._kept:
            if getattr(owner, name, None) is not buffer:
                setattr(owner, name, buffer)
            if not torch.equal(buffer, numbers):
                buffer.copy_(numbers)


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
