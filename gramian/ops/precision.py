"""Protection from autocast for computations that need the full precision of their inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["full_precision"]

_DEVICES = [
    device for device in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(device)
]


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Disable autocast, which would compute float32 matrix products in half precision.

    Use it as a context manager, or as a decorator of functions that decide on orders, bounds or
    ranks.
    """
    with contextlib.ExitStack() as stack:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
