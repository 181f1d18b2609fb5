"""The commands and blocks of the guide run as they stand."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

GUIDE = Path(__file__).parents[2] / "docs/guides/shrink.md"
BLOCK = re.compile(r"^```(python)?\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("typer")
    from gramian.cli import main

    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("A note of what was seen and heard.\n" * 200, encoding="utf-8")
    names: dict[str, Any] = {}
    for kind, block in BLOCK.findall(GUIDE.read_text(encoding="utf-8")):
        if kind:
            exec(compile(block, str(GUIDE), "exec"), names)
            continue
        for line in re.findall(r"^\$ (.*)$", block, flags=re.MULTILINE):
            monkeypatch.setattr(sys, "argv", shlex.split(line))
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code == 0, line
    assert "\n16\n" in capsys.readouterr().out
    report = json.loads(Path("small/shrinkage.json").read_text(encoding="utf-8"))
    assert report["states_before"] == 64 and report["states_after"] == 32
    assert Path("small/shrinkage.png").is_file()
    assert names["report"].sequences(2**34)[1] > names["report"].sequences(2**34)[0]
