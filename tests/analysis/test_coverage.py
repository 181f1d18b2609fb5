"""What `analyze` reads of every architecture is right, and nothing that mixes tokens is missing.

The tests of `benchmarks/coverage.py` share no code with the analysis: places where tokens are mixed
are found by perturbation, and operators are obtained from impulses through the model's own code.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import gramian
from benchmarks import coverage
from benchmarks._architectures import causal_types, lengths, small_config, small_model, tokens
from benchmarks._impulses import operators_at
from benchmarks._perturbation import find_sites

KINDS = {
    "llama": "attention with grouped queries",
    "gpt_oss": "sliding windows and sinks",
    "bloom": "attention in a module's own code",
    "gpt_neo": "attention in a method",
    "diffllama": "differences of two maps",
    "deepseek_v32": "attention to chosen tokens",
    "lfm2": "gated short convolutions",
}
SLOWER_KINDS = {
    "mamba": "a selective scan after a convolution",
    "qwen3_next": "a delta rule after a convolution",
    "kimi_linear": "a delta rule after three convolutions",
    "minimax": "linear attention in chunks",
    "rwkv": "token shifts",
    "recurrent_gemma": "a gated linear recurrence",
    "gemma4_text": "keys and values shared between layers",
    "zaya": "convolutions over all channels of a head, and late values",
    "qwen4_exp_text": "embeddings of several tokens",
}


def examined(model_type: str) -> dict[str, Any]:
    """Return the row of a type, which a process of its own makes, since it changes PyTorch."""
    (row,) = coverage.examine_all([model_type], jobs=1, limit=300)
    return row


@pytest.mark.parametrize(
    "model_type",
    [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOWER_KINDS)],
)
def test_architectures_of_all_kinds_are_wholly_and_rightly_read(model_type: str) -> None:
    row = examined(model_type)
    assert (row["verdict"], row["reason"]) == ("read", "")
    assert row["output_error"] < coverage.OUTPUTS
    assert all("error" in layer for layer in row["layers"])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", causal_types())
def test_what_is_read_of_every_architecture_is_right_and_nothing_is_missing(
    model_type: str,
) -> None:
    row = examined(model_type)
    assert row["verdict"] in ("read", "in part", "named", "not causal", "not built"), row["reason"]


def test_a_layer_that_is_missing_from_the_report_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    analyze = gramian.analyze

    def without_the_first(*args: Any, **kwargs: Any) -> Any:
        report = analyze(*args, **kwargs)
        return dataclasses.replace(report, layers=report.layers[1:])

    monkeypatch.setattr(gramian, "analyze", without_the_first)
    row = examined("llama")
    assert row["verdict"] == "silent"
    assert row["reason"].startswith("model.layers.0.self_attn ")


def test_state_sizes_and_outputs_that_differ_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    analyze = gramian.analyze

    def with_other_sizes(*args: Any, **kwargs: Any) -> Any:
        report = analyze(*args, **kwargs)
        layers = [dataclasses.replace(layer, ess=layer.ess * 1.01) for layer in report.layers]
        return dataclasses.replace(report, layers=tuple(layers))

    def with_other_weights(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
        return analyze(model, *args, **kwargs)

    monkeypatch.setattr(gramian, "analyze", with_other_sizes)
    assert "state-sizes differ" in examined("llama")["reason"]
    monkeypatch.setattr(gramian, "analyze", with_other_weights)
    assert "outputs differ" in examined("llama")["reason"]


class Average(nn.Module):
    """A mixer whose code averages the values of the past, and a linear layer on each side."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        values = self.before(x)  # (batch, L, 4)
        counts = torch.arange(1, values.shape[1] + 1, dtype=values.dtype)
        return self.after(values.cumsum(1) / counts[:, None])


def test_places_and_operators_are_those_of_a_mixer_that_is_known() -> None:
    length = 23
    model = nn.Sequential(nn.Linear(4, 4), Average(), nn.Linear(4, 4)).double()
    x = torch.randn(1, length, 4, dtype=torch.float64)
    sites = find_sites(model, lambda: model(x), (length,))
    assert [str(site) for site in sites] == ["1"]
    response = next(operators_at(sites[0]))
    rows = torch.arange(1, length + 1, dtype=torch.float64)
    average = torch.ones(length, length, dtype=torch.float64).tril() / rows[:, None]
    assert response.maps.shape == (4, length, length)
    assert float((response.maps - average).abs().max()) < 1e-12
    assert float(response.errors(average[None]).max()) < 1e-12
    assert float(response.errors(1.01 * average[None]).min()) > 5e-3


def test_small_models_of_every_kind_run_and_are_the_same_for_the_same_seed() -> None:
    for model_type in KINDS:
        first, second = (small_model(model_type) for _ in range(2))
        with torch.no_grad():
            logits = [m(tokens()[None], use_cache=False).logits for m in (first, second)]
        assert torch.equal(*logits) and bool(logits[0].isfinite().all())
        assert sum(p.numel() for p in first.parameters()) < 1e6
        assert lengths(model_type)[0] == len(tokens())


def test_small_configurations_keep_every_kind_of_layer() -> None:
    assert set(small_config("qwen3_next").layer_types) == {"linear_attention", "full_attention"}
    assert set(small_config("gemma3_text").layer_types) == {"sliding_attention", "full_attention"}
    assert set(small_config("llama4_text").layer_types) == {"chunked_attention", "full_attention"}


def test_a_type_that_cannot_be_built_says_why() -> None:
    row = examined("gemma4_assistant")
    assert row["verdict"] == "not built"
    assert "target model" in row["reason"]
