"""The blocks of the guide to genomes run in order, on smaller data and with fewer steps."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("peft")
pytest.importorskip("pyfaidx")
pytest.importorskip("typer")

from gramian.cli import main

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/data"
PAGE = (ROOT / "docs/guides/genomes.md").read_text(encoding="utf-8")
NOTEBOOK = json.loads((ROOT / "examples/genomes.ipynb").read_text(encoding="utf-8"))
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', flags=re.DOTALL | re.MULTILINE)
FEWER = {
    "train": "optimization.steps=2 evaluation.every=2 evaluation.examples=4 evaluation.samples=0",
    "check": "--length 20 --batch 2",
    "distill": "--max-increase 50% --max-tokens 512 --max-order 8",
    "generate": "--max-new-tokens 12",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that the reader downloads, and a shorter E. coli."""
    monkeypatch.chdir(tmp_path)
    for name in ("phix174.fna", "evo2_tiny.pt", "evo2_tiny.json"):
        shutil.copy(DATA / name, tmp_path)
    bases = "".join((DATA / "phix174.fna").read_text().splitlines()[1:])
    (tmp_path / "ecoli.fna").write_text(f">NC_000913.2\n{bases * 4}\n")
    return tmp_path


def call(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a line of the shell, and commands of Gramian in this process."""
    words = shlex.split(line, comments=True)
    if words[0] != "gramian":
        subprocess.run(line, shell=True, check=True, stdout=subprocess.DEVNULL)
        return
    monkeypatch.setattr(sys, "argv", words + FEWER.get(words[1], "").split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0, line


@pytest.mark.slow
def test_the_guide_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed, lines = "", 0
    for language, title, code in FENCE.findall(PAGE):
        if title:
            (folder / title).write_text(code, encoding="utf-8")
        elif language == "python":
            code = code.replace("(10_000, 100_000, 1_000_000)", "(1_000, 10_000, 20_000)")
            exec(compile(code, "genomes.md", "exec"), {})
        elif language == "bash" and "curl" not in code:
            for line in code.splitlines():
                call(line, monkeypatch)
                printed += capsys.readouterr().out
                lines += 1
    assert lines > 10
    assert "striped_hyena_2: 8 layers of width 64, 448,592 parameters" in " ".join(printed.split())
    assert {*re.findall(r'"text": "([^"]*)"', printed)[0]} <= {*"ACGT"}
    assert np.load("genes.npy").shape == (8, 64) and np.load("bases.npy").shape == (5386, 64)
    assert Path("small/distillation.json").is_file()
    for name in ("scores.tsv", "variants.tsv"):
        rows = [line.split("\t") for line in Path(name).read_text().splitlines()]
        values = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
        key = "total" if name == "scores.tsv" else "difference"
        assert len(values) == (2 if key == "total" else 7)
        assert all(np.isfinite(float(value[key])) for value in values)


def test_the_table_of_names_is_whole() -> None:
    from gramian.checkpoints import PUBLISHED

    (row,) = [line for line in PAGE.splitlines() if line.startswith("| `--config")]
    assert {*re.findall(r"`(evo2_\w+)`", row)} == {*PUBLISHED}


def cells(kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == kind]


@pytest.mark.slow
def test_the_notebook_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    code = cells("code")
    assert len(code) > 6
    for number, source in enumerate(code):
        source = source.replace("STEPS = 300", "STEPS = 2").replace("STEPS = 100", "STEPS = 2")
        source = source.replace("tol=0.3", "order=4")
        exec(compile(source, f"genomes.ipynb, cell {number + 1}", "exec"), names)
    assert {*names["text"]} <= {*"ACGT"}
    assert len(names["embeddings"]) == 8
    assert names["small"].state_bytes(1, 512) < names["model"].state_bytes(1, 512)
    assert capsys.readouterr().out


def test_the_notebook_shows_what_its_cells_printed() -> None:
    assert NOTEBOOK["nbformat"] == 4
    counts = [cell["execution_count"] for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert counts == [*range(1, len(counts) + 1)]
    outputs = [one for cell in NOTEBOOK["cells"] for one in cell.get("outputs", [])]
    assert outputs and all(one["output_type"] == "stream" for one in outputs)
