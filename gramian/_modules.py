"""Keep modules in single precision, and put models in a mode for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from typing_extensions import Self

__all__ = ["SinglePrecisionModule", "in_mode"]


class SinglePrecisionModule(nn.Module):
    """A module whose tensors stay in float32 when the model around it is cast to half precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and torch.finfo(moved.dtype).bits < 32:
                return tensor.to(device=moved.device, dtype=torch.float32)
            return moved

        return super()._apply(keep_precision, recurse)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put a model and all its submodules in training or evaluation mode within a block.

    At the end, every submodule is again in the mode that it had before. A frozen batch norm in a
    model that is being trained thus stays frozen.
    """
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
