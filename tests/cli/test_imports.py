"""Parts of one's own from the command line: modules are named, kept and found again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

from gramian import _imports
from gramian.filters import _filter
from gramian.mixers import MIXERS
from gramian.tasks import _task
from gramian.training import ConfigError, load_config, parse_config, train

Call = Callable[..., tuple[int, str, str]]

PARTS = '''
from dataclasses import dataclass

import numpy as np

from gramian import filters, mixers, tasks
from gramian.filters import ImplicitFilter
from gramian.mixers import MultiHyena


@filters.register("mine")
class Mine(ImplicitFilter):
    """An implicit filter by another name."""


@mixers.register("my_hyena")
class MyHyena(MultiHyena):
    """MultiHyena by another name."""


@tasks.register("promoters")
@dataclass(frozen=True, kw_only=True)
class Promoters(tasks.GeneratedTask):
    """Rows of the bytes of A, C, G and T, each followed by itself."""

    length: int = 12

    def description(self):
        return tasks.Description("tokens", self.length, vocab_size=259, text=True)

    def row(self, random, split):
        ids = random.choice(np.frombuffer(b"ACGT", dtype=np.uint8), size=self.length)
        return {"input_ids": ids.astype(np.int32), "labels": ids.astype(np.int32)}
'''

CONFIG = """
output: run
task: {name: promoters, train_examples: 4, eval_examples: 2}
model:
  hidden_size: 8
  num_hidden_layers: 1
  num_heads: 2
  mixers: my_hyena
  filter: {type: mine, frequency: 1.0}
optimization: {steps: 1, batch_size: 2}
hardware: {device: cpu}
"""


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Forget what modules registered, as a new process would not know it; again at the end."""
    registries: tuple[dict[str, Any], ...] = (_task._REGISTRY, _filter._REGISTRY, MIXERS)
    known = [dict(registry) for registry in registries]

    def back() -> None:
        monkeypatch.setattr(_imports, "_LOADED", {})
        for registry, before in zip(registries, known, strict=True):
            registry.clear()
            registry.update(before)
        for name in [name for name in sys.modules if name.startswith("my_")]:
            del sys.modules[name]

    back()
    yield back
    back()


@pytest.fixture
def place(tmp_path: Path, forget: Callable[[], None]) -> Path:
    (tmp_path / "my_parts.py").write_text(PARTS)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def test_a_run_keeps_a_copy_that_every_command_finds(
    place: Path, call: Call, forget: Callable[[], None]
) -> None:
    status, _, err = call("train config.yaml", place)
    assert status == 1 and "unknown task 'promoters'" in err
    assert err.endswith("Parts of your own need --import MODULE.\n")
    status, out, err = call("train config.yaml --import my_parts.py", place)
    assert status == 0, err
    assert "with a copy of my_parts.py" in " ".join(out.split())
    assert (place / "run/imports/my_parts.py").read_text() == PARTS
    assert yaml.safe_load((place / "run/config.yaml").read_text())["imports"] == ["my_parts.py"]
    (started,) = json.loads((place / "run/environment.json").read_text())
    assert started["imports"] == {"my_parts.py": hashlib.sha256(PARTS.encode()).hexdigest()}

    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    for command in ("evaluate", "analyze"):
        forget()
        line = f"{command} ../run/best --config ../run/config.yaml --json"
        status, out, err = call(line, elsewhere)
        assert status == 0, err
        assert "promoters" in out

    forget()
    status, _, err = call("generate run/best --prompt ACGT", place)
    assert status == 1 and "'my_hyena'" in err and "--import MODULE" in err
    for command in (
        "generate run/best --prompt ACGT --max-new-tokens 2",
        "check run/best --batch 2 --length 6 --order 0 --dtype float32",
        "distill run/best small --order 2",
        "analyze run/best --task promoters --every 5",
        "evaluate run/best --task promoters",
    ):
        forget()
        status, out, err = call(f"{command} --import my_parts.py", place)
        assert status == 0, (command, out, err)


def test_a_run_goes_on_without_its_module_but_not_with_another(
    place: Path, forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    report = train(load_config("config.yaml", imports=["my_parts.py"]))
    config = parse_config(yaml.safe_load(Path("run/config.yaml").read_text()))
    forget()
    (place / "my_parts.py").rename(place / "aside")
    assert train(config) == report
    forget()
    (place / "my_parts.py").write_text(PARTS + "\n# changed\n")
    with pytest.raises(ConfigError, match=r"my_parts.py is not what it was"):
        train(config)


def test_a_sweep_imports_in_the_processes_of_its_runs(place: Path, call: Call) -> None:
    text = f"{CONFIG}imports: [my_parts.py]\nsweep:\n  seed: [1]\n"
    (place / "sweep.yaml").write_text(text)
    status, out, err = call("sweep sweep.yaml output=grid --jobs 2 --json", place)
    assert status == 0, err
    assert len(json.loads(out)["points"]) == 1
    assert (place / "grid/seed=1/imports/my_parts.py").read_text() == PARTS


def test_a_module_is_named_by_dots_too(
    place: Path, forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "my_lab").mkdir()
    shutil.move(place / "my_parts.py", place / "my_lab/parts.py")
    monkeypatch.chdir(place)
    _imports.import_parts(["my_lab.parts", "my_lab/parts.py"])
    assert "promoters" in _task._REGISTRY and os.getcwd() not in sys.path
    assert _imports.copy_parts(["my_lab.parts"], "kept").keys() == {"my_lab.parts"}
    assert (place / "kept/my_lab.parts.py").read_text() == PARTS
    forget()
    shutil.rmtree(place / "my_lab")
    _imports.import_parts(["my_lab.parts"], "kept")
    assert "promoters" in _task._REGISTRY


def test_a_file_hides_no_other_module(
    place: Path, forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    shutil.move(place / "my_parts.py", place / "json.py")
    _imports.import_parts(["json.py"])
    assert "promoters" in _task._REGISTRY and sys.modules["json"] is json


@pytest.mark.parametrize(
    ("text", "name", "sentence"),
    [
        (None, "my_absent.py", "there is no file my_absent.py to import."),
        (None, "my_absent.module", "there is no module my_absent.module to import"),
        ("import my_absent", "my_wrong.py", "my_wrong.py cannot be imported: ModuleNotFoundError"),
        ("import my_absent", "my_wrong", "my_wrong cannot be imported: ModuleNotFoundError"),
        ("x = 1 +", "my_wrong.py", "my_wrong.py cannot be imported: SyntaxError"),
        ("1 / 0", "my_wrong.py", "my_wrong.py cannot be imported: ZeroDivisionError"),
    ],
)
def test_what_cannot_be_imported_is_one_sentence(
    place: Path, call: Call, text: str | None, name: str, sentence: str
) -> None:
    if text is not None:
        (place / "my_wrong.py").write_text(text)
    for command in ("generate absent --prompt x", "train config.yaml"):
        status, out, err = call(f"{command} --import {name}", place)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert sentence in err
    with pytest.raises(ConfigError, match="imports: "):
        load_config("config.yaml", [f"imports=[{name}]"])


def test_modules_need_files_of_different_names() -> None:
    values = yaml.safe_load(CONFIG) | {"imports": ["a/x.py", "b/x.py"]}
    with pytest.raises(ConfigError, match="names of their own"):
        parse_config(values)
