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


def test_every_parameter_of_every_command_has_its_help() -> None:
    """Python 3.10 hid what was annotated, so that arguments became options without help."""
    from typer.main import get_command

    commands = get_command(_app.app).commands  # type: ignore[attr-defined]
    assert {"analyze", "distill", "generate", "train"} <= commands.keys()
    for name, command in commands.items():
        for parameter in command.params:
            assert getattr(parameter, "help", None), (name, parameter.name)
    kinds = {one.name: one.param_type_name for one in commands["analyze"].params}
    assert kinds["models"] == "argument" and kinds["text"] == "option"
