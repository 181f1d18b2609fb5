"""Parts of a pass that are computed again backward, so that their memory need not be kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

__all__ = ["recomputed"]

_Result = TypeVar("_Result")


def recomputed(function: Callable[..., _Result], *arguments: object) -> _Result:
    """`function(*arguments)`, computed again in the backward pass.

    Under the transforms of `torch.func`, which know no such thing, what is computed is kept.
    """
    if torch._C._are_functorch_transforms_active():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False)
