"""The check tells a model that computes one map from one that does not."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gramian
from gramian.checking import MODES
from gramian.mixers import Hyena, Segments, ShortConvolution
from gramian.mixers.segments import Part
from gramian.models import GramianConfig, GramianForCausalLM, GramianForSequenceClassification
from gramian.models.cache import CACHE
from gramian.systems import Pause

FILTERS: dict[str, dict[str, Any]] = {
    "hyena": {"type": "rtf", "state_size": 4, "initialization": "montel"},
    "multi_hyena": {"type": "implicit"},
    "long_convolution": {"type": "s4d", "state_size": 8},
}


def make(mixer: str = "hyena", **options: Any) -> GramianForCausalLM:
    torch.manual_seed(0)
    config = GramianConfig(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=2,
        num_heads=4,
        mixers=mixer,
        max_position_embeddings=24,
        initializer_range=0.3,
        **{"filter": FILTERS[mixer], **options},
    )
    return GramianForCausalLM(config)


@pytest.mark.parametrize("mixer", FILTERS)
def test_sound_models_pass_in_every_mode(mixer: str) -> None:
    calls: list[tuple[int, int]] = []
    report = gramian.check(
        make(mixer),
        length=41,  # past the filters' last tap
        distill_order=4,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert report.passed, str(report)
    assert [(row.layer, row.dtype) for row in report.rows] == [
        (layer, dtype) for dtype in ("float32", "bfloat16") for layer in (0, 1, None)
    ]
    for row in report.rows:
        expected = MODES.keys() - ({"generated"} if row.layer is not None else set())
        assert row.differences.keys() == expected
    assert report.rows[0].differences["parallel"] < 1e-5
    assert report.rows[3].differences["parallel"] > 1e-4  # bfloat16 rounds, and it shows
    assert calls == [(done, 6) for done in range(7)]
    assert "distilled" in str(report) and "order 4" in str(report)


def test_given_tokens_without_what_is_optional() -> None:
    ids = torch.randint(31, (2, 9))
    report = gramian.check(make(), ids, dtypes=[torch.float64], distill_order=None, reference=False)
    assert report.passed and (report.batch, report.length) == (2, 9)
    expected = MODES.keys() - {"parallel", "distilled", "stepped"}
    for row in report.rows:
        layer = {"generated"} if row.layer is not None else set()
        assert row.differences.keys() == expected - layer
    assert max(row.differences["recurrent"] for row in report.rows) < 1e-10


def test_the_model_is_left_alone() -> None:
    model = make().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gramian.check(model, length=5, distill_order=None)
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def _off(method: Any, factor: float) -> Any:
    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        return (result[0] * factor, *result[1:]) if isinstance(result, tuple) else result * factor

    return changed


@pytest.mark.parametrize(
    ("method", "mode"),
    [
        ("convolve_token", "recurrent"),
        ("convolve_chunk", "chunked"),
        ("convolve_chunk", "padded"),
    ],
)
def test_a_mixer_that_computes_something_else_fails(
    monkeypatch: pytest.MonkeyPatch, method: str, mode: str
) -> None:
    monkeypatch.setattr(Hyena, method, _off(getattr(Hyena, method), 1.001))
    report = gramian.check(make(), length=20, dtypes=[torch.float32], distill_order=None)
    assert not report.passed
    assert all(mode in row.failures for row in report.rows)
    assert f"layer 0, {mode}" in str(report)


def test_a_leaking_mask_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Hyena.convolve_whole
    monkeypatch.setattr(
        Hyena, "convolve_whole", lambda self, x, mask, systems: whole(self, x, None, systems)
    )
    report = gramian.check(make(), length=20, dtypes=[torch.float32], distill_order=None)
    assert all("padded" in row.failures for row in report.rows)


@pytest.mark.parametrize(
    ("owner", "name", "modes"),
    [
        (Segments, "pause", ("turn",)),  # a warm state that padding moves on
        (ShortConvolution, "_moved_past", ("turn",)),  # a past that padding pushes out
        (Segments, "_turned", ("right", "gap")),  # tokens that are left where they stand
        (Segments, "_packed", ("packed",)),  # sequences that see each other
    ],
)
def test_padding_that_takes_time_fails(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, modes: tuple[str, ...]
) -> None:
    length = 20
    replacements = {
        "pause": lambda self: Pause([0] * self.shape[0], self.shape[1]),
        "_moved_past": lambda self, extended, mask: extended,
        "_turned": lambda self: _as_it_stands(self),
        "_packed": lambda self: _as_it_stands(self),
    }
    monkeypatch.setattr(owner, name, replacements[name])
    report = gramian.check(make(), length=length, dtypes=[torch.float32], distill_order=None)
    for mode in modes:
        assert all(mode in row.failures for row in report.rows), (mode, str(report))


def _as_it_stands(segments: Segments) -> tuple[tuple[Part, ...], Tensor]:
    batch, length = segments.shape
    places = torch.arange(batch * length).unflatten(0, (batch, length))
    return (Part(places, segments.real),), places


def test_a_cache_that_is_not_used_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = GramianForCausalLM.prepare_inputs_for_generation

    def swallow(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = prepare(self, *args, **kwargs)
        inputs.pop(CACHE, None)
        return inputs

    monkeypatch.setattr(GramianForCausalLM, "prepare_inputs_for_generation", swallow)
    report = gramian.check(make(), length=20, dtypes=[torch.float32], distill_order=None)
    assert [row.failures for row in report.rows] == [(), (), ("generated",)]


def test_weights_that_are_lost_on_the_way_to_disk_fail() -> None:
    model = make()

    class Forgetful(GramianForCausalLM):
        def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                self.model.layers[1].mixer.in_proj.weight.mul_(1.001)
            super().save_pretrained(*args, **kwargs)
            with torch.no_grad():
                self.model.layers[1].mixer.in_proj.weight.div_(1.001)

    model.__class__ = Forgetful
    report = gramian.check(model, length=9, dtypes=[torch.float32], distill_order=None)
    assert [row.failures for row in report.rows] == [(), ("reloaded",), ("reloaded",)]


def test_outputs_that_are_not_finite_fail() -> None:
    model = make()
    with torch.no_grad():
        model.model.layers[0].mixer.out_proj.bias[0] = math.nan
    report = gramian.check(model, length=9, dtypes=[torch.float32], distill_order=None)
    assert not report.passed
    assert json.loads(report.to_json())["rows"][0]["differences"]["recurrent"] is None


def test_a_tolerance_of_ones_own() -> None:
    strict = gramian.check(
        make(), length=20, dtypes=[torch.float32], distill_order=None, tolerance=1e-12
    )
    assert not strict.passed
    assert strict.rows[0].limits["chunked"] == 1e-12
    assert strict.rows[-1].limits["chunked"] == 4e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 1}, "at least 2 sequences"),
        ({"length": 1}, "at least 2 tokens"),
        ({"input_ids": torch.zeros(2, 3)}, "integers"),
        ({"input_ids": torch.full((2, 3), 31)}, "0 … 30"),
        ({"tolerance": 0.0}, "positive"),
        ({"dtypes": [torch.float8_e5m2]}, "float8_e5m2"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gramian.check(make(), **arguments)


def test_refuses_other_models() -> None:
    config = make().config
    config.num_labels = 2
    other = GramianForSequenceClassification(config)
    with pytest.raises(TypeError, match="GramianForSequenceClassification"):
        gramian.check(other)  # type: ignore[arg-type]


def test_rows_are_relative_to_each_sequence() -> None:
    from gramian.checking._check import _difference

    expected = torch.tensor([[1.0, -2.0], [100.0, 0.0]])
    y = expected + torch.tensor([[0.0, 0.02], [0.5, 0.0]])
    assert _difference(y, expected) == pytest.approx(0.01)
