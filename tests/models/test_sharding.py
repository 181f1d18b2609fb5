"""FSDP2: two processes train and generate as one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gramian.models import GramianConfig

WORLD = 2
FILTERS: dict[str, dict[str, Any]] = {
    "implicit": {"type": "implicit", "hidden": 16, "embedding_features": 5},
    "modal": {"type": "modal", "orders": 3},
    "rtf": {"type": "rtf", "state_size": 4, "initialization": "montel"},
}
CASES: list[tuple[str | list[str], str]] = [
    ("multi_hyena", "implicit"),
    ("hyena", "modal"),
    ("long_convolution", "rtf"),
    (["hyena", "softmax_attention"], "rtf"),
]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")
def test_two_processes_train_and_generate_as_one(make_config: Any, tmp_path: Path) -> None:
    fields = (
        "hidden_size num_hidden_layers num_heads mixers filter attention max_position_embeddings "
        "initializer_range"
    )
    cases = []
    for mixers, kind in CASES:
        config: GramianConfig = make_config(mixers=mixers, filter=FILTERS[kind])
        cases.append({name: getattr(config, name) for name in fields.split()})
    script = Path(__file__).with_name("sharded.py")
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(WORLD), rendezvous, json.dumps(cases)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(outputs)
