"""The command line on systems whose paths and encodings differ from those of Linux."""

from __future__ import annotations

import io
import sys

import pytest

pytest.importorskip("typer")

from gramian.cli import _app, _jobs

TEXT = "2 → ½ é\n"


@pytest.mark.parametrize(
    ("windows", "chosen", "encoding", "expected"),
    [
        (False, False, "utf-8", TEXT.encode()),
        (False, False, "cp1252", TEXT.replace("→", "?").encode("cp1252")),
        (False, False, "ascii", b"2 ? ? ?\n"),
        (True, False, "cp1252", TEXT.encode()),
        (True, True, "cp1252", TEXT.replace("→", "?").encode("cp1252")),
    ],
)
def test_no_character_ends_a_command(
    monkeypatch: pytest.MonkeyPatch, windows: bool, chosen: bool, encoding: str, expected: bytes
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, newline="\n"))
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    if chosen:
        monkeypatch.setenv("PYTHONIOENCODING", encoding)
    _app._write_every_character(windows)
    print(TEXT, end="", flush=True)
    assert written.getvalue() == expected


def test_a_backslash_belongs_to_a_path_of_windows() -> None:
    text = r"""score C:\models\rtf {input} --output="C:\my results\{output}.tsv" # 'x y'"""
    assert _jobs._split(text, windows=True) == [
        "score",
        r"C:\models\rtf",
        "{input}",
        r"--output=C:\my results\{output}.tsv",
        "#",
        "x y",
    ]
    assert _jobs._split(r"a\ b 'c d'", windows=False) == ["a b", "c d"]
    with pytest.raises(ValueError, match="No closing quotation"):
        _jobs._split("a 'b")
