"""What is not installed is named with the extra that brings it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("tomllib")  # Python 3.11

import tomllib

from gramian.cli import _app

Call = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]
EXTRAS: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))[
    "project"
]["optional-dependencies"]
DISTRIBUTIONS = {"PIL": "pillow", "lm_eval": "lm-eval", "sklearn": "scikit-learn", "yaml": "pyyaml"}


def brought_by(extra: str) -> set[str]:
    """Names of the packages of an extra, and of the extras in it."""
    found = set()
    for requirement in EXTRAS[extra]:
        name = re.match(r"[\w-]+", requirement)
        assert name is not None
        found.add(name[0])
        if name[0] == "gramian":
            for other in re.findall(r"\w+", requirement.partition("[")[2]):
                found |= brought_by(other)
    return found


def test_extras_bring_what_messages_say() -> None:
    for package, extra in _app._EXTRAS.items():
        assert DISTRIBUTIONS.get(package, package) in brought_by(extra)
    named = set()
    for file in (ROOT / "gramian").rglob("*.py"):
        for names in re.findall(r'pip install "?gramian\[([\w,]+)\]', file.read_text("utf-8")):
            named |= set(names.split(","))
    assert named <= EXTRAS.keys()


def test_all_brings_what_the_commands_of_the_readme_need() -> None:
    wanted = {"typer", "rich", "transformers", "matplotlib", "datasets", "accelerate", "pyyaml"}
    assert wanted | {"onnx", "onnxruntime", "onnxscript", "gguf"} <= brought_by("all")


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.yaml").write_text("output: run\n")
    (tmp_path / "x.gguf").write_text("")
    find = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name in ("gguf", "accelerate") else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    for command, extra in (
        ("train config.yaml", "train"),
        ("sweep config.yaml", "train"),
        ("evaluate x.gguf --config config.yaml", "train"),
        ("evaluate x.gguf --task mqar", "gguf"),
        ("analyze x.gguf --prompt a", "gguf"),
    ):
        status, _, err = call(command, tmp_path)
        assert status == 1 and f'pip install "gramian[{extra}]"' in err, err


def test_an_import_that_fails_says_what_to_install() -> None:
    inner = ModuleNotFoundError("No module named 'PIL.Image'", name="PIL.Image")
    outer = ModuleNotFoundError("Could not import module 'X'.", name="x")
    outer.__cause__ = inner
    assert _app._advice(outer) == ' Run: pip install "gramian[train]".'
    assert _app._advice(ImportError("needs it: pip install x", name="yaml")) == ""
    assert _app._advice(ImportError("cannot import name 'y'", name="z")) == ""
