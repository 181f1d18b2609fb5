"""Without extras the core imports, and every other package names the extra that it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gramian

ROOT = Path(__file__).parents[1]
OPTIONAL = [  # the packages of all extras, and some that come with them
    *("transformers", "safetensors", "tokenizers", "huggingface_hub", "peft"),
    *("accelerate", "datasets", "pandas", "PIL", "yaml", "sklearn", "tensorboard", "scipy"),
    *("matplotlib", "typer", "rich", "gguf", "pyarrow", "pyfaidx", "lm_eval", "ray", "triton"),
    *("onnx", "onnxruntime", "onnxscript"),
]
WITHOUT = """
import importlib
import sys


class Without:
    def __init__(self, finder, hidden):
        self.finder, self.hidden = finder, hidden

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.hidden:
            return self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder, sys.argv[1].split(",")) for finder in sys.meta_path]
for name in sys.argv[2:]:
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
        for one in [attribute] if attribute else getattr(found, "__all__", []):
            getattr(found, one)
    except (ImportError, SystemExit) as error:
        print(module, type(error).__name__, error, sep="|")
    else:
        print(module, "imported", sep="|")
"""


def imported(names: list[str], hidden: list[str]) -> list[tuple[str, ...]]:
    """Import modules in a process in which some packages cannot be found."""
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT, ",".join(hidden), *names],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert ran.returncode == 0, ran.stderr
    return [tuple(line.split("|")) for line in ran.stdout.splitlines()]


def test_the_core_needs_no_extra() -> None:
    names = [f"gramian:{name}" for name in gramian.__all__]
    found = imported(names, OPTIONAL)
    assert found == [("gramian", "imported")] * len(names)


@pytest.mark.parametrize(
    ("package", "extra", "hidden"),
    [
        ("models", "models", "transformers"),
        ("checkpoints", "models", "transformers"),
        ("genomics", "models", "transformers"),
        ("demo", "cli", "rich"),
        ("training", "train", "accelerate"),
        ("training", "train", "yaml"),
    ],
)
def test_a_package_names_the_extra_that_it_needs(package: str, extra: str, hidden: str) -> None:
    ((_, kind, sentence),) = imported([f"gramian.{package}"], [hidden])
    assert kind == "ImportError"
    assert sentence.endswith(f'needs {hidden}: pip install "gramian[{extra}]".')


def test_the_command_line_names_its_extra() -> None:
    for hidden in ("typer", "rich"):
        ran = subprocess.run(
            [sys.executable, "-c", WITHOUT, hidden, "gramian.cli"],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert f'the command line needs {hidden}: pip install "gramian[cli]".' in ran.stderr
        assert ran.stdout == "gramian.cli|SystemExit|1\n"
