"""The README shows code that runs, and begins with the commands that a newcomer types."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_code_does_what_its_comments_say() -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(code.replace("64", "16"), "README.md", "exec"), names)  # a quarter of the width
    torch.testing.assert_close(names["last"], names["y"][:, 999], rtol=1e-4, atol=1e-5)
    assert 1 < names["used"].mean() < 64
    assert names["small"].relative_error.max() <= 1e-3
    assert names["small"].order.max() <= 16


def test_the_first_two_commands_are_the_demo_and_the_tests() -> None:
    commands = re.findall(r"^```\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)[0]
    assert [line.split("#")[0].strip() for line in commands.splitlines()[:2]] == [
        "make demo",
        "make test",
    ]
