"""Tensors on devices where the host should not wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["from_host"]


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
