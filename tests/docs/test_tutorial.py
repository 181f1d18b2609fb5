"""Every block of the tutorial runs, in order, with a shorter training."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/tutorial.md"


def blocks() -> list[tuple[str, str]]:
    """Language and text of the blocks that a reader runs, but for the installation."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"^```(bash|python)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [(language, code) for language, code in found if "pip install" not in code]


@pytest.mark.skipif(sys.platform == "win32", reason="its commands are for a POSIX shell")
@pytest.mark.slow
def test_every_block_runs(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    command = tmp_path / "bin/gramian"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gramian "$@"\n')
    command.chmod(0o755)
    environment = dict(
        os.environ,
        PATH=f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        PYTHONPATH=str(ROOT),
    )
    assert len(blocks()) > 5
    printed = ""
    for language, code in blocks():
        code = code.replace("steps=500", "steps=50").replace("every=250", "every=25")
        program = ["bash", "-ec", code] if language == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(
            program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{code}\n{done.stderr}"
        printed = done.stdout
    shown = PAGE.read_text(encoding="utf-8").rsplit("```text\n", 1)[1]
    assert printed.splitlines()[0] == shown.splitlines()[0]  # sizes, which no training changes
