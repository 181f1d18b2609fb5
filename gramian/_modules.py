"""Keep modules in single precision, refuse TorchScript, and put models in a mode for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from typing_extensions import Self

__all__ = ["NoTorchScript", "SinglePrecisionModule", "in_mode"]


class NoTorchScript:
    """A base class of modules that TorchScript cannot compile, and that say so.

    A trace would be wrong at other lengths than that of its example, because the sizes of the
    Fourier transforms follow from the length.
    """

    def __prepare_scriptable__(self) -> NoReturn:  # `torch.jit.script` calls it
        raise NotImplementedError(self._refusal())

    def _slow_forward(self, *args: Any, **kwargs: Any) -> NoReturn:  # what is called in a trace
        raise NotImplementedError(self._refusal())

    def _refusal(self) -> str:
        return (
            f"{type(self).__name__} cannot be a TorchScript program: use torch.compile, "
            "torch.export or gramian.export."
        )


class SinglePrecisionModule(NoTorchScript, nn.Module):
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
