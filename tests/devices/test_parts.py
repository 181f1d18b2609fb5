"""Every system, filter and mixer on a device that is not the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gramian import systems
from gramian.filters import _filter, build
from gramian.mixers import MIXERS
from gramian.mixers import build as build_mixer
from gramian.systems import System
from gramian.testing import check_device
from tests.devices.conftest import documented, refuse_undocumented
from tests.ess.conftest import SYSTEMS, make
from tests.filters.test_filters import CONFIGS
from tests.mixers.test_mixers import FILTERS
from tests.mixers.test_registry import OTHERS, SHARED

# Systems that are made of others, and have no parameters of their own.
MADE_OF_OTHERS = {"PausedOperator", "System", "TimeInvariantSystem"}
TAKE_A_FILTER = [name for name, kind in MIXERS.items() if kind.family == "convolution"]


def check(part: Any, **options: Any) -> None:
    found = check_device(part, accepted=documented()["whole"], **options)
    for stage in ("padded", "packed", "recurrence"):
        refuse_undocumented(stage, found.get(stage, []))


def test_every_system_is_tried() -> None:
    kinds = {name for name in systems.__all__ if isinstance(getattr(systems, name), type)}
    kinds = {name for name in kinds if issubclass(getattr(systems, name), System)}
    assert {type(make(name, 24)).__name__ for name in SYSTEMS} == kinds - MADE_OF_OTHERS


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_runs_on_another_device(name: str) -> None:
    torch.manual_seed(0)
    check(make(name, 24), length=24)


def test_channels_of_several_sizes_run_on_another_device() -> None:
    filter = build({"type": "modal", "orders": [1, 7, 2, 3]}, channels=4, max_length=40)
    assert len(filter().groups) > 1
    check(filter)


def test_every_filter_is_tried() -> None:
    registered = _filter._REGISTRY.items()  # tests register filters of their own, too
    ours = {name for name, kind in registered if kind.__module__.startswith("gramian.")}
    assert {config["type"] for config in CONFIGS.values()} == ours


@pytest.mark.parametrize("name", CONFIGS)
def test_every_filter_runs_on_another_device(name: str) -> None:
    torch.manual_seed(0)
    check(build(CONFIGS[name], channels=4, max_length=40))


@pytest.mark.parametrize("options", ["defaults", "others"])
@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_runs_on_another_device(name: str, options: str) -> None:
    torch.manual_seed(0)
    given = OTHERS.get(name, {}) if options == "others" else {}
    check(build_mixer({"type": name, **given}, **SHARED), length=20)


@pytest.mark.parametrize("filter_name", FILTERS)
@pytest.mark.parametrize("name", TAKE_A_FILTER)
def test_every_filter_runs_in_every_mixer_on_another_device(name: str, filter_name: str) -> None:
    torch.manual_seed(0)
    options = {**SHARED, "filter": FILTERS[filter_name], "max_length": 30}
    check(build_mixer(name, **options), length=20)
