"""The places where the host waits for a device, as the documentation lists them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from gramian.testing import Wait

PAGE = Path(__file__).parents[2] / "docs/decisions/waits.md"


def documented() -> dict[str, set[str]]:
    """The places of every stage, read from the table of the page."""
    found: dict[str, set[str]] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        row = re.match(r"\| ([a-z -]+) \| `([^`]+)` \| .+ \|$", line)
        if row:
            found.setdefault(row[1], set()).add(row[2])
    return found


def refuse_undocumented(stage: str, waits: Iterable[Wait]) -> None:
    """Fail on a wait that the page does not list: a place, or the folder in which it is."""
    listed = documented()[stage]
    folders = tuple(place for place in listed if place.endswith("/"))
    places = {wait.place for wait in waits}
    unlisted = {one for one in places - listed if not one.startswith(folders)}
    assert not unlisted, f"{PAGE.name} lists no wait of the stage {stage!r} in {sorted(unlisted)}"


@pytest.fixture(scope="session")
def device(simulated: torch.device) -> torch.device:
    return simulated
