"""Every block of the guide to one's own data runs, and what it trains learns."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("typer")

from gramian import _imports
from gramian.cli import main
from gramian.filters import _filter
from gramian.tasks import _task

PAGE = Path(__file__).parents[2] / "docs/guides/your-data.md"
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget afterwards what the page registers."""
    monkeypatch.setattr(_imports, "_LOADED", {})
    monkeypatch.setattr(_task, "_REGISTRY", dict(_task._REGISTRY))
    monkeypatch.setattr(_filter, "_REGISTRY", dict(_filter._REGISTRY))
    yield
    for name in ("counting", "moving_average"):
        sys.modules.pop(name, None)


Run = Callable[..., None]


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return partial(run_section, folder, monkeypatch)


def run_section(
    folder: Path, monkeypatch: pytest.MonkeyPatch, section: str, commands: bool = True
) -> None:
    """Write the section's files into `folder`, the working directory, and run its other blocks."""
    text = PAGE.read_text(encoding="utf-8").split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    blocks = FENCE.findall(text)
    assert blocks
    for language, title, code in blocks:
        if title:
            (folder / title).write_text(code, encoding="utf-8")
        elif language == "python":
            exec(compile(code, str(PAGE), "exec"), {})
        elif commands:
            for line in code.splitlines():
                monkeypatch.setattr(sys, "argv", shlex.split(line))
                with pytest.raises(SystemExit) as ended:
                    main()
                assert ended.value.code == 0, line


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_table_is_learnt(folder: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("A table of sequences and labels")
    assert report(folder / "runs/promoters")["metrics"]["accuracy"] > 0.65  # 0.5 by chance
    assert "accuracy" in capsys.readouterr().out
    assert (folder / "runs/promoters/best/tokenizer_config.json").is_file()


def test_arrays_are_learnt_from_sequence_to_sequence_and_to_number(folder: Path, run: Run) -> None:
    run("Numpy arrays")
    assert report(folder / "runs/smooth")["metrics"]["relative_error"] < 0.2  # 1 as zeros
    assert report(folder / "runs/last")["metrics"]["relative_error"] < 0.5


def test_a_task_and_a_filter_of_ones_own_are_trained(folder: Path, run: Run) -> None:
    run("A task of your own")
    assert (folder / "runs/counting/imports/counting.py").is_file()
    run("Numpy arrays", commands=False)
    run("A filter of your own")
    assert report(folder / "runs/average")["metrics"]["relative_error"] < 0.2
