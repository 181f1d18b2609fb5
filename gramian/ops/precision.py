"""Numerics that decide in the precision they were written for, whatever autocast says."""

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
    """Without autocast, which would take matrix products of float32 in half precision.

    A context, and a decorator for functions whose results are decisions: orders, bounds, ranks.
    """
    with contextlib.ExitStack() as stack:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
