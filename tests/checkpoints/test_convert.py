"""`gramian convert` as its users meet it: a folder that other commands take, or one line."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")

from transformers import AutoModelForCausalLM, AutoTokenizer


def test_every_checkpoint(call: Any, every: Any, tmp_path: Path) -> None:
    status, out, err = call("convert", every.file, "deep/out", "--json")
    assert status == 0, err
    report = json.loads(out)
    folder = tmp_path / "deep" / "out"
    assert report["format"] == every.format
    assert json.loads((folder / "conversion.json").read_text()) == report
    assert report["checkpoint"] == str(every.file.absolute())
    for name, digest in report["sha256"].items():
        file = every.file if every.file.is_file() else every.file / name
        assert name == file.name and digest == sha256(file.read_bytes()).hexdigest()
    assert report["sha256"]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert report["parameters"] == model.num_parameters()
    expected = every.expected()
    with torch.no_grad():
        made = model(expected["input_ids"]).logits
    torch.testing.assert_close(made, expected["logits"], rtol=0, atol=1e-4)
    assert (report["tokenizer"] is None) == (not (folder / "tokenizer.json").exists())
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_from_a_checkpoint_to_dna(call: Any, published: Any, tmp_path: Path) -> None:
    status, out, _ = call("convert", published("hyenadna_tiny").file, "dna")
    assert status == 0 and "hyenadna: 2 layers of width 32" in out and "DNATokenizer" in out
    assert AutoTokenizer.from_pretrained(tmp_path / "dna")("GATTACA").input_ids[0] == 9
    assert call("distill", "dna", "small", "--order", 8)[0] == 0
    options = ("--prompt", "GATTACA", "--max-new-tokens", 200, "--json")
    status, out, err = call("generate", "small", *options)
    assert status == 0, err
    written = json.loads(out)
    assert written["prompt_tokens"] == 7 and set(written["text"]) <= set("ACGTN")


def test_settings_by_hand(call: Any, published: Any, tmp_path: Path) -> None:
    checkpoint = published("hyenadna_tiny")
    (tmp_path / "elsewhere.json").write_text(json.dumps(checkpoint.config()))
    options = ("--config", "elsewhere.json", "--format", "safari", "--json")
    status, out, _ = call("convert", checkpoint.file, "out", *options)
    assert status == 0 and json.loads(out)["format"] == "safari"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("absent", "out"), "there is no checkpoint absent."),
        (("{file}", "."), "exists already"),
        (("{file}", "out", "--format", "gpt2"), "format must be one of"),
        (("{file}", "out", "--format", "striped_hyena"), "its keys are those of"),
        (("{file}", "out", "--config", "absent.json"), "no configuration absent.json"),
        (("{file}", "out", "--config", "evo2_9b"), "a file or one of evo2_1b_base, evo2_7b,"),
        (("{expected}", "out"), "is no checkpoint of"),
    ],
)
def test_one_line_for_what_a_user_can_get_wrong(
    call: Any, published: Any, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    file = published("hyenadna_tiny").file
    places = {"file": file, "expected": file.with_suffix(".expected.safetensors")}
    status, out, err = call("convert", *(argument.format(**places) for argument in arguments))
    assert (status, out) == (1, "")
    assert err.startswith("gramian: ") and len(err.splitlines()) == 1 and sentence in err
    assert list(tmp_path.iterdir()) == []
