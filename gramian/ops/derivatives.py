"""Checks whether a computation is being differentiated, in reverse mode or in forward mode."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

__all__ = ["forward_mode_is_on", "is_differentiated", "records_derivatives"]


def forward_mode_is_on() -> bool:
    """Return whether forward-mode differentiation is on."""
    return forward_ad._current_level >= 0  # noqa: SLF001 (PyTorch has no public name for it)


def records_derivatives() -> bool:
    """Return whether derivatives may be needed: a graph is recorded, or forward mode is on."""
    return torch.is_grad_enabled() or forward_mode_is_on()


def is_differentiated(tensor: Tensor) -> bool:
    """Return whether a result that depends on the tensor has a gradient or a tangent."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        return True
    return forward_mode_is_on() and forward_ad.unpack_dual(tensor).tangent is not None
