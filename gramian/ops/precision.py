"""The precision of computations: complex dtypes, and protection from autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

__all__ = ["complex_dtype", "full_precision"]

_DEVICES = [
    device for device in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(device)
]


def complex_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the complex dtype beside a real one: complex128 for float64, else complex64.

    `dtype.to_complex()` returns a complex dtype in half precision for float16, and since PyTorch
    2.14 for bfloat16 too. Few of PyTorch's operators accept these.
    """
    return torch.complex128 if dtype == torch.float64 else torch.complex64


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Disable autocast, which would compute float32 matrix products in half precision.

    Use it as a context manager, or as a decorator of functions that decide on orders, bounds or
    ranks.
    """
    enabled = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
    with _without_autocast(enabled):
        yield


@contextlib.contextmanager
def _without_autocast(devices: Sequence[str]) -> Iterator[None]:
    """Disable autocast on some devices by nested blocks, because Dynamo traces no `ExitStack`."""
    if not devices:
        yield
        return
    with torch.autocast(devices[0], enabled=False), _without_autocast(devices[1:]):
        yield
