"""The code of every page in docs/contributing/ runs, in order, and its assertions hold."""

from __future__ import annotations

import importlib
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

FOLDER = Path(__file__).parents[2] / "docs/contributing"
PAGES = sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "index")
EXPORTING = ("mixer",)  # which takes the tracer of torch.export long
REGISTRIES = (
    ("gramian.filters._filter", "_REGISTRY"),
    ("gramian.mixers.registry", "MIXERS"),
    ("gramian.models.layers", "BLOCKS"),
    ("gramian.export._mixers", "_PROGRAMS"),
    ("gramian.tasks._task", "_REGISTRY"),
    ("gramian.tasks.kinds", "_REGISTRY"),
    ("gramian.tasks.documents", "_READERS"),
    ("gramian.checkpoints._format", "FORMATS"),
    ("gramian.hybrids._replacement", "KINDS"),
)


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Take out again what a page registers."""
    tables: list[dict[str, Any]] = [
        getattr(importlib.import_module(module), name) for module, name in REGISTRIES
    ]
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def run(page: str) -> types.ModuleType:
    """A module made of the blocks of a page."""
    text = (FOLDER / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    module = types.ModuleType(f"contributed_{page.replace('-', '_')}")
    sys.modules[module.__name__] = module  # where dataclasses look names up
    try:
        for block in blocks:
            exec(compile(block, f"{page}.md", "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return module


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page in EXPORTING else ()) for page in PAGES],
)
def test_the_steps_of_a_page_work(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run(page)


def test_every_page_is_listed() -> None:
    index = (FOLDER / "index.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\]\(([\w-]+)\.md\)", index)) == PAGES
