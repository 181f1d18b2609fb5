"""Tokenizers of saved models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from gramian.models import ByteTokenizer, GramianConfig, GramianForCausalLM

ROOT = Path(__file__).parents[2]


def test_a_folder_of_ours_is_no_foreign_code(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_heads": 2}
    model = GramianForCausalLM(GramianConfig(**sizes, max_position_embeddings=16))
    model.save_pretrained(tmp_path / "model")
    ByteTokenizer().save_pretrained(tmp_path / "model")
    program = (
        "import sys\n"
        "from gramian.tasks.encoding import load_tokenizer\n"
        "print(len(load_tokenizer(sys.argv[1])))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model")],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "259\n", done.stderr
    assert "custom code" not in done.stderr
