"""Checks of arguments say in one sentence what was given and what is accepted."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from gramian._checks import (
    check_choice,
    check_divides,
    check_integers,
    check_probability,
    check_sizes,
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_sizes(a=1, b=0), "b must be an integer of at least 1; got 0."),
        (lambda: check_sizes(a=True), "a must be an integer of at least 1; got True."),
        (lambda: check_sizes(a=1.0), "a must be an integer of at least 1; got 1.0."),
        (lambda: check_integers(0, a=0, b=-1), "b must be an integer of at least 0; got -1."),
        (lambda: check_integers(4, a="5"), "a must be an integer of at least 4; got '5'."),
        (
            lambda: check_probability("p", 1),
            "p must be a probability, at least 0 and below 1; got 1.",
        ),
        (lambda: check_divides("heads", 3, 8), "heads must divide the width 8; got 3."),
        (lambda: check_divides("heads", 0, 8), "heads must divide the width 8; got 0."),
        (
            lambda: check_choice("norm", "z", ("x", "y"), " in blocks"),
            "norm must be one of 'x', 'y' in blocks; got 'z'.",
        ),
        (lambda: check_choice("norm", ["x"], {"x": 1}), "norm must be one of 'x'; got ['x']."),
    ],
)
def test_a_wrong_argument_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_what_is_accepted_passes() -> None:
    check_sizes(a=1, b=7)
    check_integers(0, a=0, least=3)
    assert check_probability("p", 0) == 0.0
    check_divides("heads", 4, 8)
    check_choice("norm", "x", {"x": 1})
