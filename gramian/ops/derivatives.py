"""Checks whether a computation is being differentiated, in reverse mode or in forward mode."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

__all__ = ["is_differentiated", "records_derivatives"]


def records_derivatives() -> bool:
    """Return whether a graph is recorded or forward mode is on, so derivatives may be needed."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def is_differentiated(tensor: Tensor) -> bool:
    """Return whether a result that depends on the tensor has a gradient or a tangent."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
