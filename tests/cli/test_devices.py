"""Every command that runs a model takes a device, and names one that is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gramian.models import ByteTokenizer, GramianConfig, GramianForCausalLM

COMMANDS = [
    "generate model --prompt abc --max-new-tokens 2",
    "check model --length 8 --dtype float32 --order 0",
    "distill model out --order 2",
    "analyze model --prompt abcdefgh",
    "evaluate model --text text.txt",
    "score model genome.fa --output scores.tsv",
    "embed model genome.fa --layer 1 --pool mean --output out.safetensors",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = GramianConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_heads=2,
        mixers="hyena",
        filter={"type": "s4d", "state_size": 4},
        max_position_embeddings=32,
    )
    GramianForCausalLM(config).save_pretrained("model")
    ByteTokenizer().save_pretrained("model")
    Path("text.txt").write_text("some text that is read. " * 3)
    Path("genome.fa").write_text(">a\nACGTACGTAA\n")
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[0])
def test_a_device_is_taken_or_named(command: str, folder: Path, call: Callable[..., Any]) -> None:
    before = sorted(folder.iterdir())
    status, out, err = call(f"{command} --device nowhere", folder)
    assert (status, out) == (1, "")
    assert "--device nowhere: " in err and err.count("\n") == 1
    assert sorted(folder.iterdir()) == before
    status, out, err = call(f"{command} --device cpu", folder)
    assert status == 0, err
