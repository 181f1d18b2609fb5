"""JSON that every reader takes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

import gramian
from gramian._json import to_json

PACKAGE = Path(gramian.__file__).parent
# Names and settings, in which nothing is measured.
OWN_TEXT = {
    "models/snapshots.py",
    "training/sweep_configuration.py",
    "training/sweep_report.py",
}


def strictly(text: str) -> Any:
    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(number: float) -> None:
    values = {"a": number, "b": [1.5, number, {"c": (number, 2)}], "d": "NaN", "e": None, "f": True}
    expected = {"a": None, "b": [1.5, None, {"c": [None, 2]}], "d": "NaN", "e": None, "f": True}
    assert strictly(to_json(values, indent=2)) == expected
    assert strictly(to_json(number)) is None


def test_finite_values_are_written_as_ever() -> None:
    values = {"a": [1, 2.5, -0.0, 1e300, 5e-324], "b": {"c": ""}, "d": [[], {}]}
    assert to_json(values) == json.dumps(values)
    assert to_json(values, indent=2) == json.dumps(values, indent=2)
    with pytest.raises(TypeError):
        to_json({"a": object()})


def test_no_result_is_written_by_another_way() -> None:
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        if name != "_json.py" and name not in OWN_TEXT:
            assert not re.search(r"json\.dumps?\(", path.read_text(encoding="utf-8")), name
