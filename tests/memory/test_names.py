"""Names of this room that stood elsewhere are still found there."""

from __future__ import annotations

import importlib

import pytest

import gramian.memory


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("ess", "ess_penalty"),
        ("ess", "gate_regularizer"),
        ("mixers", "GateInitialization"),
        ("mixers", "InitializedGates"),
        ("mixers", "Observer"),
        ("mixers", "initialize_gates"),
    ],
)
def test_a_name_is_found_where_it_was(package: str, name: str) -> None:
    old = importlib.import_module(f"gramian.{package}")
    assert getattr(old, name) is getattr(gramian.memory, name)
    with pytest.raises(AttributeError, match=f"'gramian.{package}' has no attribute 'nothing'"):
        _ = old.nothing
