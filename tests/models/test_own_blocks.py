"""A kind of block of one's own: registered once, and every job of a model knows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from gramian.export import ExportedModel, export_model
from gramian.mixers import MixerCall
from gramian.models import (
    BLOCKS,
    GramianConfig,
    GramianForCausalLM,
    GramianLayer,
    build_mixer,
    load,
    register_block,
)
from gramian.models.norms import apply_norm, make_norm
from gramian.training import ConfigError, TrainingConfig, parse_config
from gramian.training.arguments import _sharding


@pytest.fixture(autouse=True)
def scaled() -> Iterator[type[GramianLayer]]:
    @register_block("scaled")
    class ScaledBlock(GramianLayer):
        """`h ← norm(h + gain * mixer(h))`."""

        norms = ("layer",)
        options = ("first_gain",)

        def __init__(self, config: GramianConfig, layer: int) -> None:
            super().__init__(layer)
            self.gain = nn.Parameter(torch.full((), getattr(config, "first_gain", 1.0)))
            self.mixer = build_mixer(config, layer)
            self.norm = make_norm(config.norm, config.hidden_size, config.rms_norm_eps)

        @classmethod
        def default_final_norm(cls, norm: str) -> str:
            return "none"

        def mix(self, hidden_states: Tensor, call: MixerCall) -> Tensor:
            return apply_norm(self.norm, hidden_states + self.gain * call(hidden_states))

    yield ScaledBlock
    del BLOCKS["scaled"]


def make() -> GramianForCausalLM:
    torch.manual_seed(2)
    config = GramianConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        mixers="long_convolution",
        filter={"type": "explicit", "taps": 5},
        max_position_embeddings=64,
        initializer_range=0.3,
        block="scaled",
        norm="layer",
        first_gain=2.0,
    )
    return GramianForCausalLM(config)


def test_it_trains_saves_loads_generates_and_exports(tmp_path: Path) -> None:
    model = make()
    assert model.config.final_norm == "none"
    assert model._no_split_modules == {"ScaledBlock"}
    tokens = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model(tokens, labels=tokens).loss
    before.backward()
    gain = model.model.layers[0].gain
    assert gain.item() == 2.0 and gain.grad is not None and gain.grad != 0
    optimizer.step()
    model.eval()
    assert model(tokens, labels=tokens).loss < before

    model.save_pretrained(tmp_path / "saved")
    read = load(tmp_path / "saved")
    with torch.no_grad():
        whole = read(tokens, use_cache=False).logits
        assert torch.equal(whole, model(tokens, use_cache=False).logits)
        cache, logits = None, []
        for part in tokens.split([7, 1, 4], 1):
            outputs = read(part, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            logits.append(outputs.logits)
    assert_close(torch.cat(logits, 1), whole)

    report = export_model(read, tmp_path / "exported", "torch", verify=6)
    assert report.step_difference < 1e-4 * report.scale
    run = ExportedModel(tmp_path / "exported")
    written = read.generate(tokens, max_new_tokens=6, do_sample=False)
    assert torch.equal(torch.from_numpy(run.generate(tokens.numpy(), 6)), written)


@pytest.mark.parametrize("saved", [False, True])
def test_sharding_wraps_it(saved: bool, tmp_path: Path) -> None:
    """The configuration of a run names the block, or the folder of a saved model, which has it."""
    model = make()
    if saved:
        model.save_pretrained(tmp_path / "saved")
        model = load(tmp_path / "saved")
    assert _sharding(_run_of(tmp_path), model)["transformer_layer_cls_to_wrap"] == ["ScaledBlock"]


def test_sharding_refuses_blocks_that_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    monkeypatch.delitem(BLOCKS, "scaled")
    with pytest.raises(ConfigError, match=r"hardware\.fsdp needs a model of registered blocks"):
        _sharding(_run_of(tmp_path), model)


def _run_of(folder: Path) -> TrainingConfig:
    """Return the configuration of a run that starts from a saved model."""
    values = {
        "task": {"name": "mqar"},
        "model": {"path": str(folder / "saved")},
        "optimization": {"steps": 1},
        "output": str(folder / "run"),
    }
    return parse_config(values)


def test_the_configuration_reads_what_it_takes(scaled: type[GramianLayer]) -> None:
    with pytest.raises(ValueError, match=r"norm must be one of 'layer' in 'scaled' blocks"):
        GramianConfig(block="scaled", norm="rms")
    with pytest.raises(ValueError, match=r"first_gain is an option of block='scaled'; got it with"):
        GramianConfig(block="mlp", first_gain=2.0)
    with pytest.raises(ValueError, match=r"mlp_bias and residual_in_fp32 are options of block="):
        GramianConfig(block="scaled", norm="layer", mlp_bias=True)
    with pytest.raises(ValueError, match="'glu' is already registered"):
        register_block("glu")(scaled)
