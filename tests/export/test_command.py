"""`gramian export` as its users meet it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("typer")
pytest.importorskip("transformers")

from gramian import cli
from gramian.export import ExportedModel
from gramian.models import ByteTokenizer, GramianConfig, GramianForCausalLM

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Call:
    """The command in this process: status, output and errors."""

    def main(arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(sys, "argv", ["gramian", *arguments.split()])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert isinstance(exit.value.code, int)
        return (exit.value.code, *capfd.readouterr())

    return main


def save(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
    torch.manual_seed(0)
    settings = {
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_heads": 3,
        "mixers": "hyena",
        "filter": {"type": "explicit", "taps": 5},
        "max_position_embeddings": 63,
        "initializer_range": 0.4,
    }
    model = GramianForCausalLM(GramianConfig(**(settings | changes))).eval()
    model.to(dtype).save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)


@pytest.mark.slow
def test_a_model_of_half_precision_becomes_onnx(call: Call, tmp_path: Path) -> None:
    save(tmp_path / "model", torch.bfloat16)
    status, out, err = call("export model out --verify 25 --threads 1 --json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert (report["format"], report["compared"], report["ties"]) == ("onnx", 25, 0)
    assert report["step_difference"] <= 1e-4 * report["scale"]
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"step.onnx", "prefill.onnx", "export.json", "tokenizer_config.json"} <= names
    assert ExportedModel(tmp_path / "out").generate([[65, 66]], 3).shape == (1, 5)


def test_a_table_says_what_was_compared(call: Call, tmp_path: Path) -> None:
    save(tmp_path / "model", torch.bfloat16)
    status, out, err = call("export model out --format torch --verify 25")
    assert (status, err) == (0, "")
    assert "2 × 25, all equal" in out and "Written to out" in out
    assert (tmp_path / "out" / "step.pt2").is_file()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("export model out", "layer 0 (Hyena) cannot be exported"),
        ("export model out", "gramian distill MODEL OUT"),
        ("export model out --format tflite", "format must be one of onnx, torch"),
        ("export missing out", "there is no model folder missing"),
        ("export model model", "model exists already"),
    ],
)
def test_mistakes_get_one_line(call: Call, tmp_path: Path, arguments: str, sentence: str) -> None:
    save(tmp_path / "model", filter={"type": "implicit"}, max_position_embeddings=300)
    status, out, err = call(arguments)
    assert (status, out) == (1, "")
    assert err.startswith("gramian: ") and err.count("\n") == 1 and sentence in err
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
