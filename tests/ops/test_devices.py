"""What is computed on the CPU for devices that have no double precision."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gramian.ops import devices
from gramian.ops.devices import in_double_precision


class Pair(NamedTuple):
    x: Tensor
    y: Any


class Own(Pair):
    """A subclass of a named tuple, which PyTorch's trees take for a leaf."""


class Listed(list):  # type: ignore[type-arg]
    """A subclass of a list."""


class Named(dict):  # type: ignore[type-arg]
    """A subclass of a dictionary."""


@dataclass
class Report:
    values: Any


CONTAINERS = {
    "tuple": lambda x: (x, 1),
    "list": lambda x: [x, "a"],
    "dict": lambda x: {"x": x},
    "ordered": lambda x: OrderedDict(x=x),
    "named tuple": lambda x: Pair(x, None),
    "subclass of a named tuple": lambda x: Own(x, [x]),
    "subclass of a list": lambda x: Listed([x, Own(x, 2)]),
    "subclass of a dictionary": lambda x: Named(x=(Listed([x]),)),
    "what an operation returns": lambda x: torch.return_types.max([x, x.long()]),
    "dataclass": Report,
}


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The meta device, as one that has no double precision."""
    monkeypatch.setattr(devices, "DEVICES_WITHOUT_FLOAT64", {"meta"})
    return torch.device("meta")


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Report):
        return tensors(value.values)
    items = value.values() if isinstance(value, dict) else value
    return [x for one in items if not isinstance(one, int | str | None) for x in tensors(one)]


@pytest.mark.parametrize("name", CONTAINERS)
def test_results_return_in_any_container(name: str, without: torch.device) -> None:
    make = CONTAINERS[name]

    @in_double_precision
    def compute(given: Tensor) -> Any:
        assert given.device.type == "cpu"
        return make(torch.ones(3, dtype=torch.float64))

    # A tensor on the meta device has no values to copy, so an object that moves stands for it.
    found = compute(Mobile())  # type: ignore[arg-type]
    assert type(found) is type(make(torch.ones(3)))
    assert tensors(found)
    assert all(x.device == without for x in tensors(found))
    assert not any(x.dtype == torch.float64 for x in tensors(found))


class Mobile:
    """A value on a device without double precision."""

    def __init__(self, device: str = "meta") -> None:
        self.device = torch.device(device)

    def to(self, device: torch.device) -> Mobile:
        return Mobile(str(device))


@pytest.mark.parametrize("name", list(CONTAINERS)[:-2])  # the last two are results only
def test_arguments_move_in_any_container(name: str, without: torch.device) -> None:
    given = CONTAINERS[name](Mobile())  # type: ignore[no-untyped-call]

    @in_double_precision
    def compute(value: Any) -> str:
        assert type(value) is type(given)
        return repr(sorted({one.device.type for one in mobiles(value)}))

    assert compute(given) == "['cpu']"
    unchanged = CONTAINERS[name](Mobile("cpu"))  # type: ignore[no-untyped-call]
    assert in_double_precision(lambda value: value)(unchanged) is unchanged


def mobiles(value: Any) -> list[Mobile]:
    if isinstance(value, Mobile):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [x for one in items if not isinstance(one, int | str | None) for x in mobiles(one)]
