"""Recompute parts of a forward pass in the backward pass, which saves memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

__all__ = ["recomputed"]

_Result = TypeVar("_Result")


def recomputed(function: Callable[..., _Result], *arguments: object) -> _Result:
    """Return `function(*arguments)`, whose intermediate results the backward pass recomputes.

    The transforms of `torch.func` do not support recomputation. Within them, the intermediate
    results are kept.
    """
    if torch._C._are_functorch_transforms_active():  # noqa: SLF001 (it has no public name)
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False)
