"""The blocks of the guides' sections on alphabets and adapters run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

GUIDES = Path(__file__).parents[2] / "docs/guides"
FENCE = re.compile(r"^```python\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def section(page: str, title: str) -> list[str]:
    """The Python blocks of a section."""
    text = (GUIDES / page).read_text(encoding="utf-8").split(f"\n## {title}\n", 1)[1]
    blocks = FENCE.findall(text.split("\n## ", 1)[0])
    assert blocks
    return blocks


def test_the_section_on_alphabets_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from gramian.models import GramianConfig, GramianForCausalLM

    names: dict[str, Any] = {
        "GramianConfig": GramianConfig,
        "GramianForCausalLM": GramianForCausalLM,
    }
    for block in section("generate.md", "Alphabets"):
        exec(compile(block, "generate.md", "exec"), names)
    printed = capsys.readouterr().out.strip()
    assert len(printed) == 48 and {*printed} <= {*"ACGT"}
    assert names["bases"] == [7, 8, 9, 10]
    free = [i for i in range(16) if i not in names["model"].generation_config.suppress_tokens]
    assert free == names["bases"]
