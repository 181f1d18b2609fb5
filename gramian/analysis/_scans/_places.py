"""Find the places from which the layers of a model take scans, and put other functions there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from gramian.analysis._scans._reading import SCANS

__all__ = ["Place", "places"]


@dataclass(frozen=True)
class Place:
    """A place that holds a scan.

    Attributes:
        owner: the Python module whose namespace holds the scan, or the layer that has it as an
            attribute or a method.
        name: name of the scan, in `SCANS`.
    """

    owner: ModuleType | nn.Module
    name: str

    @property
    def key(self) -> tuple[int, str]:
        """Return a key that is the same for equal places."""
        return id(self.owner), self.name

    @property
    def function(self) -> Callable[..., Any]:
        """Return the scan that is there now."""
        function: Callable[..., Any] = getattr(self.owner, self.name)
        return function

    @contextmanager
    def holding(self, function: Callable[..., Any]) -> Iterator[None]:
        """Put another function into the place in this context, and the scan back after it.

        A method is hidden by an attribute of its layer, and a function of a class by no other.

        Args:
            function: The function. It takes the arguments of the scan, of a method without `self`.
        """
        own = vars(self.owner)
        before = {self.name: own[self.name]} if self.name in own else {}
        setattr(self.owner, self.name, function)
        try:
            yield
        finally:
            delattr(self.owner, self.name)
            for name, value in before.items():
                setattr(self.owner, name, value)


def places(module: nn.Module) -> Iterator[Place]:
    """Yield every place from which a module may take a registered scan.

    These places are the Python modules that define the class of the module and its bases, the
    attributes of the module, and its methods. PyTorch's own are left out.

    Args:
        module: One module of a model. Its children are not searched. Modules of one class share
            the places in Python modules: `Place.key` tells them apart.
    """
    for cls in type(module).__mro__:
        if cls.__module__.split(".")[0] == "torch" or cls.__module__ not in sys.modules:
            break
        yield from _held(sys.modules[cls.__module__])
    yield from _held(module)


def _held(owner: ModuleType | nn.Module) -> Iterator[Place]:
    """Yield the places of one owner, whose child modules are no functions."""
    for name in SCANS:
        function = getattr(owner, name, None)
        if callable(function) and not isinstance(function, nn.Module):
            yield Place(owner, name)
