"""Commands on a classifier of tokens, and those that need a language model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("datasets")

from gramian.checkpoints import DNATokenizer
from gramian.models import GramianConfig, GramianForTokenClassification, load_any

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = GramianConfig(
        vocab_size=12,
        hidden_size=12,
        num_hidden_layers=2,
        num_heads=3,
        mixers="hyena",
        max_position_embeddings=24,
        id2label={0: "n", 1: "y"},
    )
    GramianForTokenClassification(config).save_pretrained(tmp_path / "model")
    DNATokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "test.csv").write_text("sequence,label\nACGT,nnyy\nGGTAC,ynynn\n")
    return tmp_path


def test_it_is_checked_distilled_and_evaluated(folder: Path, call: Call) -> None:
    options = "--length 12 --dtype float32 --order 4 --json"
    status, out, err = call(f"check model {options}", folder)
    assert status == 0, err
    rows = json.loads(out)["rows"]
    assert [row["name"] for row in rows] == ["Hyena", "Hyena", "GramianForTokenClassification"]
    assert call("distill model small --order 6", folder)[0] == 0
    assert type(load_any(folder / "small")) is GramianForTokenClassification
    task = "--task table --set test=test.csv --set kind=token_classification --json"
    status, out, err = call(f"evaluate model {task}", folder)
    assert status == 0, err
    assert {one["metric"] for one in json.loads(out)["measures"]} >= {"loss", "accuracy"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "generate model --prompt A",
            "holds a GramianForTokenClassification; a GramianForCausalLM",
        ),
        ("distill model out --text test.csv --finetune 1", "--text needs a language model"),
        ("evaluate model --text test.csv", "texts need a causal language model"),
    ],
)
def test_what_needs_a_language_model_says_so(
    folder: Path, call: Call, command: str, message: str
) -> None:
    status, _, err = call(command, folder)
    assert status == 1 and message in err and err.count("\n") == 1
