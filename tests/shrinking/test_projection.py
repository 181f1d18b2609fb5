"""Projected states: operators, whole models, reports, and what is refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM

import gramian
from gramian.models import GramianConfig, GramianForCausalLM
from gramian.shrinking._family import find_layers

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear_attention", {}),
    "elu": ("linear_attention", {"feature_map": "elu"}),
    "mapped": ("linear_attention", {"feature_size": 9, "feature_map": "silu"}),
    "retention": ("weighted_linear_attention", {"head_gates": True, "temperature": 2.0}),
    "gated": ("gated_linear_attention", {"head_gates": True, "temperature": 1.0}),
}


def build(mixers: Any, **options: Any) -> GramianForCausalLM:
    torch.manual_seed(0)
    model = GramianForCausalLM(
        GramianConfig(
            vocab_size=97,
            hidden_size=24,
            num_hidden_layers=2,
            num_heads=3,
            mixers=mixers,
            linear_recurrence={"state_size": 6, **options},
        )
    )
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("_map"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 1.2 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def make(kind: str) -> GramianForCausalLM:
    mixers, options = KINDS[kind]
    return build(mixers, **options)


def windows(count: int = 6, length: int = 41) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, 97, (count, length), generator=generator)


@cache
def in_double(kind: str, size: int) -> tuple[GramianForCausalLM, GramianForCausalLM]:
    """Return a model and its projection to a size, both in double precision."""
    model = make(kind)
    small, _ = gramian.shrink(model, windows(), keep=size, projection=True)
    return model.double(), small.double()


@pytest.mark.each
@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 3, 63])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_operators_are_those_of_projected_factors(kind: str, size: int, length: int) -> None:
    model, small = in_double(kind, size)
    x = torch.randn(2, length, 24, dtype=torch.float64)
    for before, after in zip(find_layers(model), find_layers(small), strict=True):
        one, two = (layer.module for layer in (before, after))
        assert after.shape.states == two.state_size == size
        keys, queries = two.key_map.mT, two.query_map.mT  # T_l and T_rᵀ, if there was no map
        if kind == "mapped":  # the maps contain those of the layer before
            keys = keys @ torch.linalg.pinv(one.key_map.mT)
            queries = queries @ torch.linalg.pinv(one.query_map.mT)
        identity = torch.eye(size, dtype=torch.float64).expand(3, -1, -1)
        torch.testing.assert_close(keys @ queries.mT, identity, rtol=0, atol=1e-4)
        system = one.operator(x)
        A, B, C = system.A, system.B, system.C  # (2, 3, L, n): C has the gate of its step
        S = torch.zeros(2, 3, size, length, dtype=torch.float64)  # (…, states, inputs)
        rows = []
        for t in range(length):  # the state before the step, read with the gate, and the input
            gate = A[:, :, t, :1, None]
            q = torch.einsum("hrn,bhn->bhr", queries, C[:, :, t]) / gate[..., 0]
            S = gate * S
            S[..., t] = torch.einsum("hrn,bhn->bhr", keys, B[:, :, t])
            rows.append((q.unsqueeze(-1) * S).sum(-2))
        torch.testing.assert_close(
            two.operator(x).matrix(length), torch.stack(rows, 2), rtol=1e-6, atol=1e-6
        )


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_predicted_error_is_the_measured_one(kind: str) -> None:
    model = make(kind)
    for size in (5, 1):
        _, report = gramian.shrink(model, windows(), keep=size, projection=True)
        for layer in report.layers:
            assert layer.measured_error == pytest.approx(layer.predicted_error, rel=1e-3, abs=1e-6)
            found = layer.projection
            assert found is not None
            if report.criterion == "error":
                assert found.error == pytest.approx(layer.predicted_error, rel=1e-6)
            assert found.bound >= 0 and len(found.singular_values) == 3
        _, plain = gramian.shrink(model, windows(), keep=size)
        for one, two in zip(report.layers, plain.layers, strict=True):
            assert two.projection is not None and one.projection is not None
            assert two.projection.error == pytest.approx(one.projection.error, rel=1e-6)
            assert two.spectrum[size - 1] == pytest.approx(one.projection.coordinates_error)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_projected_models_are_saved_loaded_and_generate(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    before = model(windows()).logits
    small, report = gramian.shrink(model, windows(), keep=0.5, projection=True)
    assert torch.equal(model(windows()).logits, before)
    assert report.projection and "projected" in report.summary
    width = model.config.linear_recurrence.get("feature_size", 6)
    assert [(m["state_size"], m["feature_size"]) for m in small.config.mixers] == [(3, width)] * 2
    memory = 2 * 3 * 3 * 8 * 4  # layers × heads × states × values × bytes
    assert report.original_state_bytes - report.shrunk_state_bytes == memory
    small.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(again(windows()).logits, small(windows()).logits)
    ids = windows(1, 9)
    written = small.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    for _ in range(5):
        best = small(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], dim=1)
    assert torch.equal(written, ids)
    assert all(parameter.requires_grad for parameter in small.parameters())
    further, _ = gramian.shrink(again, windows(), keep=2)  # coordinates of the projected states
    assert [(m["state_size"], m["feature_size"]) for m in further.config.mixers] == [(2, width)] * 2
    assert not torch.allclose(further(windows()).logits, small(windows()).logits)


def test_sizes_are_searched_for_projections_too() -> None:
    model = build(["linear_attention", "weighted_linear_attention"], head_gates=True)
    small, report = gramian.shrink(
        model, windows(), keep=0.5, projection=True, per_layer=True, progress=lambda *_: None
    )
    sizes = [layer.states_after for layer in report.layers]
    assert sum(sizes) <= 6 and [m["state_size"] for m in small.config.mixers] == sizes
    told: list[tuple[int, int]] = []
    found, report = gramian.shrink(
        model, windows(), max_increase=10.0, projection=True, progress=lambda *x: told.append(x)
    )
    assert [m["state_size"] for m in found.config.mixers] == [1, 1]
    assert told[-1] == (8, 8) and told == sorted(told)  # 4 windows, twice
    assert json.loads(report.to_json())["layers"][0]["projection"]["bound"] > 0


@pytest.mark.parametrize(
    ("mixers", "message"),
    [
        ("gated_linear_attention", r"GatedLinearAttention \(.*\) with a gate for each state"),
        ("weighted_linear_attention", r"WeightedLinearAttention \(.*\) with a gate for each state"),
        ("gla_s6", r"GLAS6 \(.*\) with a gate for each state"),
        ("s6", r"layers that can hold maps .* got S6 \(model.layers.0.mixer\)"),
        ("gated_delta_net", r"layers that can hold maps .* got GatedDeltaNet"),
        (["linear_attention", "gla_s6"], r"got GLAS6 \(model.layers.1.mixer\)"),
    ],
)
def test_vector_gates_are_refused_in_one_sentence(mixers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        gramian.shrink(build(mixers), windows(), keep=0.5, projection=True)
    assert str(caught.value).count(". ") == 0


def mamba2() -> Mamba2ForCausalLM:
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=97,
        hidden_size=16,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=8,
        state_size=6,
        n_groups=2,
        chunk_size=16,
    )
    return Mamba2ForCausalLM(config).eval()


def test_models_of_transformers_show_what_a_projection_would_gain() -> None:
    model = mamba2()
    small, report = gramian.shrink(model, windows(), keep=3)
    assert small.config.state_size == 3 and not report.projection
    for layer in report.layers:
        found = layer.projection
        assert found is not None
        assert found.coordinates_error == pytest.approx(layer.spectrum[2])
        assert 0 < found.error < found.coordinates_error
        assert [len(row) for row in found.singular_values] == [6, 6]
        assert f"{found.error:.1e}" in str(report)
    with pytest.raises(ValueError, match=r"got Mamba2Mixer .*layers\.0"):
        gramian.shrink(model, windows(), keep=3, projection=True)
    _, other = gramian.shrink(build("gla_s6"), windows(), keep=3)
    assert [layer.projection for layer in other.layers] == [None, None]


def test_half_precision_stays_half_precision() -> None:
    model = make("gated").to(torch.bfloat16)
    small, report = gramian.shrink(model, windows(), keep=3, projection=True)
    for name, parameter in small.named_parameters():
        single = "dynamics" in name
        assert parameter.dtype == (torch.float32 if single else torch.bfloat16), name
    assert abs(report.loss_after - report.loss_before) < 0.5
