"""Checkpoints of random weights, with inputs and what the published implementations made of them.

Safari, HyenaDNA and the published RTF's experiments were run as they are, StripedHyena with an
attention written out in place of flash-attn's kernels. `*_order3` have two gates a channel,
`stripedhyena_gqa` has grouped queries, an untied head and a large ε, `stripedhyena_groups` shares
filters, `evo_tiny` has interpolated positions, GELU, a Hugging Face folder's names and a pole
outside of the unit circle.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gramian.checkpoints import files

DATA = Path(__file__).parents[1] / "data"
FORMATS = {
    "safari_hyena_order2": "safari",
    "safari_hyena_order3": "safari",
    "hyenadna_tiny": "hyenadna",
    "hyenadna_order3": "hyenadna",
    "hyena_rtf": "hyena_rtf",
    "hyena_rtf_order3": "hyena_rtf",
    "stripedhyena_tiny": "striped_hyena",
    "stripedhyena_groups": "striped_hyena",
    "stripedhyena_gqa": "striped_hyena",
    "evo_tiny": "striped_hyena",
}


@pytest.fixture(autouse=True, scope="session")
def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class Published:
    """One of the checkpoints in tests/data."""

    name: str

    @property
    def format(self) -> str:
        return FORMATS[self.name]

    @property
    def file(self) -> Path:
        return DATA / f"{self.name}{'.ckpt' if self.name == 'hyenadna_tiny' else '.safetensors'}"

    def tensors(self) -> dict[str, torch.Tensor]:
        return files.read_tensors(self.file)

    def config(self) -> dict[str, Any]:
        config = files.find_config(self.file)
        assert config is not None
        return files.read_config(config)

    def expected(self) -> dict[str, torch.Tensor]:
        return load_file(DATA / f"{self.name}.expected.safetensors")


@pytest.fixture(params=FORMATS)
def every(request: pytest.FixtureRequest) -> Published:
    """Each checkpoint in turn."""
    return Published(request.param)


@pytest.fixture
def published() -> type[Published]:
    """A checkpoint by name."""
    return Published


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes tensors as a safetensors file without a configuration."""

    def write(tensors: dict[str, torch.Tensor], name: str = "checkpoint.safetensors") -> Path:
        save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def hugging_face_dna(tmp_path: Path) -> Path:
    """`hyenadna_tiny` as a Hugging Face folder, whose shared frequencies are saved once."""
    tensors = {}
    for name, value in Published("hyenadna_tiny").tensors().items():
        short = name.removeprefix("model.")
        if not short.endswith(("implicit_filter.3.freq", "implicit_filter.5.freq")):
            tensors[short if short.startswith("lm_head") else f"hyena.{short}"] = value.clone()
    folder = tmp_path / "hyenadna-tiny-hf"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(HUGGING_FACE_DNA))
    return folder


HUGGING_FACE_DNA = {
    "model_type": "hyenadna",
    "d_model": 32,
    "n_layer": 2,
    "d_inner": 128,
    "vocab_size": 12,
    "pad_vocab_size_multiple": 8,
    "max_seq_len": 130,
    "emb_dim": 5,
    "filter_order": 32,
    "hyena_order": 2,
    "num_inner_mlps": 2,
    "short_filter_order": 3,
    "train_freq": True,
    "activation_freq": 10,
    "embed_dropout": 0.1,
    "layer_norm_epsilon": 1e-5,
}


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """A command in an empty folder: status, output and errors."""

    def main(*arguments: object) -> tuple[int, str, str]:
        cli = pytest.importorskip("gramian.cli")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["gramian", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert isinstance(exit.value.code, int)
        return (exit.value.code, *capfd.readouterr())

    return main
