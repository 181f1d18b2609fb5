"""Define a family of recurrences, and the registry that finds the family of a model's layer."""

from __future__ import annotations

import abc
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gramian.shrinking._recurrence import Recurrence

__all__ = ["Call", "Family", "Layer", "Shape", "find_layers", "pick", "register"]


@dataclass(frozen=True)
class Shape:
    """The size of a layer's state.

    Attributes:
        groups: number of groups of heads that share keys and queries.
        states: n, the number of coordinates.
        numbers: count of numbers that a sequence stores for one coordinate in all groups.
    """

    groups: int
    states: int
    numbers: int


@dataclass(frozen=True)
class Call:
    """One call of a scan.

    Attributes:
        recurrence: the arguments.
        outputs: function that returns the outputs y, without skips and gates. Their last dimension
            is N if a norm of every head follows, and otherwise any.
    """

    recurrence: Recurrence
    outputs: Callable[[], Tensor]


class Family(abc.ABC):
    """How the layers of some classes are read and cut.

    Attributes:
        layers: names of the classes of the layers, each with the field of the configuration that
            holds the number of states.
        multiple: number of which fused kernels take only multiples as number of states; 1 if they
            take all numbers.
        note: what changes besides the dropped coordinates, in one sentence; empty if nothing does.
        per_layer: whether the configuration may have a size for each layer.
        fused: names of a layer's linear maps whose weights fused kernels read by themselves, so
            that they do not see an adapter.
        maps: whether layers can hold linear maps of keys and queries, so that their states can be
            projected.
    """

    layers: dict[str, str]
    multiple: int = 1
    note: str = ""
    per_layer: bool = False
    fused: tuple[str, ...] = ()
    maps: bool = False

    def refusal(self, layer: nn.Module) -> str | None:
        """Return why the state of a layer cannot be made smaller, or None if it can."""
        return None

    def commutes(self, layer: Any) -> bool:
        """Return whether a gate per head and step multiplies the whole state of a layer.

        Such a state may have any basis. The layer has one call of the scan.
        """
        return False

    def project(self, layer: Any, keys: Tensor, queries: Tensor) -> dict[str, Tensor]:
        """Return the tensors that change if the state is projected, by their names in the layer.

        Args:
            layer: a layer whose family has `maps`.
            keys: T_l of every group, (groups, r, n), which multiplies keys.
            queries: T_rᵀ of every group, likewise.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def shape(self, layer: Any) -> Shape:
        """Return the size of a layer's state."""

    @abc.abstractmethod
    def watch(
        self, layer: Any, inputs: Tensor, visit: Callable[[Call], None]
    ) -> AbstractContextManager[object]:
        """Call `visit` with every call of the scan in one call of the layer.

        Args:
            layer: the layer, which is called within the context.
            inputs: its input, (batch, L, width).
            visit: the function. Calls come in the order of the groups.
        """

    @abc.abstractmethod
    def cut(self, layer: Any, kept: Tensor, energies: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that change, by their names in the layer's `state_dict`.

        Args:
            layer: the layer.
            kept: indices of the coordinates to keep, (groups, k), in ascending order.
            energies: mean squares of the keys and of the queries on the text, (groups, n) each.
        """

    def set_sizes(
        self,
        config: Any,
        sizes: dict[int, int],
        layers: dict[int, nn.Module],
        projected: bool = False,
    ) -> None:
        """Write the numbers of states into a configuration.

        Args:
            config: the configuration, which is changed.
            sizes: the number of states of each layer, by the order of the layers.
            layers: the layers that had other sizes.
            projected: whether linear maps take keys and queries to these sizes.
        """
        for index, layer in layers.items():
            setattr(config.get_text_config(), self.field(layer), sizes[index])

    def field(self, layer: nn.Module) -> str:
        """Return the name of the field of the configuration that holds the number of states."""
        return self.layers[type(layer).__name__]

    def scale(self, layer: Any, kept: int) -> float:
        """Return the factor that makes outputs of a cut layer those of the layer.

        A norm behind the scan removes it from the layer's output.
        """
        return 1.0


@dataclass(frozen=True)
class Layer:
    """A layer of a model with a recurrence.

    Attributes:
        index: the number of the layer in the model.
        path: the path of the module.
        module: the module.
        family: its family.
    """

    index: int
    path: str
    module: nn.Module
    family: Family

    @property
    def shape(self) -> Shape:
        """The size of the layer's state."""
        return self.family.shape(self.module)


_FAMILIES: dict[str, Family] = {}
_F = TypeVar("_F", bound=type[Family])


def register(family: _F) -> _F:
    """Register a family for all classes of layers that it names."""
    made = family()
    for name in made.layers:
        _FAMILIES[name] = made
    return family


def find_layers(model: nn.Module) -> Iterator[Layer]:
    """Yield the layers of a model that belong to a family, in the order of its modules."""
    _load()
    for path, module in model.named_modules():
        family = _FAMILIES.get(type(module).__name__)
        if family is not None:
            number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
            yield Layer(int(number[1]) if number else 0, path, module, family)


def pick(weight: Tensor, starts: list[int], size: int, kept: Tensor, dim: int = 0) -> Tensor:
    """Return a tensor with only the kept coordinates of some parts of an axis.

    Args:
        weight: the tensor.
        starts: beginnings of the parts of the axis, in ascending order: one for each group and
            kind, group by group within each kind. The axis between the parts is kept.
        size: n, the length of every part.
        kept: (groups, k).
        dim: the axis.
    """
    index, last = [], 0
    for number, start in enumerate(starts):
        index += [torch.arange(last, start), start + kept[number % len(kept)].cpu()]
        last = start + size
    index.append(torch.arange(last, weight.shape[dim]))
    return weight.index_select(dim, torch.cat(index).to(weight.device))


def _load() -> None:
    from gramian.shrinking import _families

    for file in pkgutil.iter_modules(_families.__path__):
        importlib.import_module(f"{_families.__name__}.{file.name}")
