"""What devices differ in: double precision, and numbers that the host sends without waiting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["DEVICES_WITHOUT_FLOAT64", "from_host", "has_float64"]

DEVICES_WITHOUT_FLOAT64 = {"mps"}
"""The types of devices that have no double precision."""


def has_float64(device: torch.device) -> bool:
    """Return whether a device has tensors in double precision."""
    return device.type not in DEVICES_WITHOUT_FLOAT64


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
