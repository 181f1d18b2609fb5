"""Distilling keeps the model's class, changes its filters only, and tells the truth about them."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import gramian
from gramian import filters
from gramian.distillation import DistillationReport, distill
from gramian.filters import ModalFilter
from gramian.models import GramianConfig, GramianForCausalLM, GramianModel, load

SMOOTH = {"type": "implicit", "frequency": 1.0}
RATIONAL = {"type": "rtf", "state_size": 6, "initialization": "montel"}


def make(cls: Any = GramianForCausalLM, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_heads": 3,
        "filter": SMOOTH,
        "max_position_embeddings": 63,
    }
    return cls(GramianConfig(**(settings | changes))).eval()


def mixers(model: Any) -> list[Any]:
    return [block.mixer for block in model.base_model.layers]


@torch.no_grad()
def kernels(model: Any, taps: int) -> list[torch.Tensor]:
    return [mixer.filter(taps).impulse_response(taps).double() for mixer in mixers(model)]


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


@pytest.mark.each
@pytest.mark.parametrize("mixer", ["multi_hyena", "hyena", "long_convolution"])
@pytest.mark.parametrize(("tol", "length"), [(0.3, 63), (1e-3, 17)])
def test_reported_errors_are_those_of_the_new_filters(mixer: str, tol: float, length: int) -> None:
    model = make(mixers=mixer, hidden_size=12, max_position_embeddings=length)
    distilled, report = distill(model, tol=tol)
    assert report.tol == tol and report.order is None and len(report.layers) == 2
    pairs = zip(report.layers, kernels(model, length), kernels(distilled, length), strict=True)
    for layer, before, after in pairs:
        error = before - after
        relative = error.norm(dim=-1) / before.norm(dim=-1)
        torch.testing.assert_close(torch.tensor(layer.relative_errors).double(), relative)
        torch.testing.assert_close(
            torch.tensor(layer.l1_errors).double(), error.abs().sum(-1), rtol=1e-5, atol=1e-12
        )
        torch.testing.assert_close(before[:, 0], after[:, 0])  # the direct term is exact
        for index, (reached, bound) in enumerate(
            zip(layer.relative_errors, layer.lower_bounds, strict=True)
        ):
            assert bound <= reached * (1 + 1e-6) + 1e-6
            assert (reached > tol * 1.01) <= (index in layer.unconverged)


@pytest.mark.slow
def test_what_a_reduction_reaches_the_stored_filter_reaches() -> None:
    """Parameters are rounded after the reduction, and cost no filter its tolerance."""
    model = make(mixers="long_convolution", max_position_embeddings=65)
    for tol in (1e-2, 1e-4):
        _, report = distill(model, tol=tol)
        for layer, kernel in zip(report.layers, kernels(model, 65), strict=True):
            reached = gramian.reduce(kernel.float(), tol=tol).converged
            assert layer.unconverged == tuple(torch.nonzero(~reached).flatten().tolist())


@pytest.mark.parametrize("mixer", ["multi_hyena", "hyena", "long_convolution"])
def test_tight_tolerance_keeps_the_logits(mixer: str) -> None:
    model = make(mixers=mixer, hidden_size=12, num_hidden_layers=1, max_position_embeddings=15)
    distilled, report = distill(model, tol=1e-5)
    ids = torch.randint(0, 256, (2, 15))
    if report.converged:
        torch.testing.assert_close(logits(distilled, ids), logits(model, ids), rtol=0, atol=1e-4)
    coarse, _ = distill(model, order=1)
    assert (logits(coarse, ids) - logits(model, ids)).abs().max() > 1e-4


def test_the_original_is_left_as_it_was() -> None:
    model = make()
    weights = copy.deepcopy(model.state_dict())
    config = model.config.to_dict()
    distilled, _ = distill(model, order=4)
    assert model.config.to_dict() == config
    assert model.state_dict().keys() == weights.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    for parameter in distilled.parameters():  # no weight is shared
        parameter.data.zero_()
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])


@pytest.mark.parametrize("cls", [GramianForCausalLM, GramianModel])
def test_class_and_everything_but_filters_stay(cls: Any) -> None:
    model = make(cls)
    distilled, _ = distill(model, order=4)
    assert type(distilled) is cls and not distilled.training
    assert all(isinstance(mixer.filter, ModalFilter) for mixer in mixers(distilled))
    new = distilled.state_dict()
    for name, value in model.state_dict().items():
        if ".filter." not in name:
            assert torch.equal(new[name], value)


@pytest.mark.parametrize("order", [1, 2, 5, 62])
def test_orders_stay_within_the_one_asked_for(order: int) -> None:
    distilled, report = distill(make(), order=order)
    assert report.order == order and report.tol is None and report.converged
    assert max(report.orders) <= order
    for layer, mixer in zip(report.layers, mixers(distilled), strict=True):
        assert tuple(mixer.filter().orders.tolist()) == layer.orders


def test_max_order_ends_the_search_and_says_so() -> None:
    _, report = distill(make(), tol=1e-6, max_order=2)
    assert max(report.orders) <= 2
    assert not report.converged
    assert all(layer.unconverged for layer in report.layers)


def test_saved_loaded_and_generated_from_like_any_other(tmp_path: Path) -> None:
    distilled, _ = distill(make(), tol=0.05)
    distilled.save_pretrained(tmp_path / "model")
    again = load(tmp_path / "model")
    ids = torch.randint(0, 256, (2, 90))  # longer than the filters that were distilled
    torch.testing.assert_close(logits(again, ids), logits(distilled, ids), rtol=0, atol=1e-6)
    prompt = ids[:, :7]
    written = again.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=9, do_sample=False
    )
    sequence = prompt
    for _ in range(9):
        sequence = torch.cat([sequence, logits(again, sequence)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, sequence)


def test_distilled_models_train() -> None:
    distilled, _ = distill(make(), order=4)
    ids = torch.randint(0, 256, (2, 20))
    distilled.train()(ids, labels=ids).loss.backward()
    for mixer in mixers(distilled):
        assert mixer.filter.residues.grad.abs().max() > 0


def test_rational_filters_are_found_exactly() -> None:
    _, report = distill(make(filter=RATIONAL), order=6)
    assert report.max_relative_error < 1e-3


def test_only_long_filters_are_distilled() -> None:
    half, first = distill(make(), order=4)
    mixed = make(filter=[half.config.filter[0], SMOOTH])
    distilled, report = distill(mixed, order=3)
    assert [layer.layer for layer in report.layers] == [1]
    assert distilled.config.filter[0]["orders"] == half.config.filter[0]["orders"]
    torch.testing.assert_close(kernels(distilled, 63)[0], kernels(mixed, 63)[0])
    assert [layer.layer for layer in first.layers] == [0, 1]


def test_nothing_to_distil() -> None:
    distilled, _ = distill(make(), order=4)
    with pytest.raises(ValueError, match=r"^nothing to distil"):
        distill(distilled)


@pytest.mark.parametrize("tol", [0, 1, -1e-3, 2.0, float("nan"), float("inf"), "0.1", True])
def test_tolerance_out_of_range(tol: Any) -> None:
    with pytest.raises(ValueError, match=r"^the tolerance must lie between 0 and 1"):
        distill(make(), tol=tol)


@pytest.mark.parametrize("order", [0, -1, 63, 1000, 1.5, True])
def test_order_out_of_range(order: Any) -> None:
    with pytest.raises(ValueError, match=r"^the order must be an integer from 1 to 62"):
        distill(make(), order=order)


def test_something_else_than_a_model() -> None:
    with pytest.raises(TypeError, match="Linear"):
        distill(torch.nn.Linear(2, 2))  # type: ignore[type-var]


def test_kernels_that_are_not_finite_name_layer_and_channel() -> None:
    model = make()
    with torch.no_grad():
        mixers(model)[1].filter.bias[2] = float("nan")
    with pytest.raises(ValueError, match=r"^layer 1 .*channel 2"):
        distill(model, order=2)


def test_state_bytes_are_the_models_own() -> None:
    model = make()
    distilled, report = distill(model, order=4)
    assert report.original_state_bytes == model.state_bytes(1, 63)
    assert report.distilled_state_bytes == distilled.state_bytes(1, 63)
    assert report.distilled_state_bytes < report.original_state_bytes


def test_progress_is_told_layer_by_layer() -> None:
    seen: list[tuple[int, int]] = []
    distill(make(), order=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_report_as_json_and_tables() -> None:
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=160, record=True, file=io.StringIO())
    _, report = gramian.distill(make(), tol=1e-4, max_order=3)
    assert isinstance(report, DistillationReport)
    data = json.loads(report.to_json())
    assert data["layers"][1]["orders"] == list(report.layers[1].orders)
    assert data["mean_order"] == pytest.approx(report.mean_order)
    console.print(report)
    for printed in (str(report), console.export_text()):
        text = " ".join(printed.split())
        assert f"{report.layers[1].mean_order:.1f} / 3" in text
        assert "tolerance 0.0001" in text
        assert "stayed above it" in text


def test_a_tail_of_zero_fades_and_what_is_left_is_told() -> None:
    model = make(mixers="hyena", hidden_size=9, num_hidden_layers=1)
    _, free = distill(model, order=16)
    _, zero = distill(model, order=16, tail="zero")
    assert zero.max_tail_energy < 1e-2 < 1 < free.max_tail_energy
    assert "Past" not in zero.summary
    assert "Past 63 tokens" in free.summary
    assert free.to_dict()["max_tail_energy"] == free.max_tail_energy
    with pytest.raises(ValueError, match='"auto", "zero" or "free"'):
        distill(model, tail="none")


@pytest.mark.parametrize("goal", [{"tol": 0.02}, {"order": 6}])
def test_channels_that_share_taps_are_reduced_together(goal: dict[str, Any]) -> None:
    """The same as one by one, with direct terms of their own; every figure is each channel's."""
    filter = {"type": "explicit", "taps": 100, "groups": 2, "skip": True}
    model = make(mixers="hyena", filter=filter, max_position_embeddings=150, num_hidden_layers=1)
    shared = model.model.layers[0].mixer.filter
    t = torch.arange(100.0)
    with torch.no_grad():
        shared.kernel.copy_(torch.exp(-0.1 * t) * torch.cos(torch.tensor([[0.2], [0.5]]) * t**1.2))
        shared.d.copy_(torch.linspace(-2, 2, shared.channels))
    small, report = distill(model, **goal)
    alone = copy.deepcopy(model)
    own = filters.build({"type": "explicit", "taps": 100}, channels=shared.channels, max_length=150)
    with torch.no_grad():
        own.kernel.copy_(shared().kernel)
    alone.model.layers[0].mixer.filter = own
    _, reference = distill(alone, **goal)
    (layer,), (other,) = report.layers, reference.layers
    assert not layer.kept and report.converged
    taps = shared().impulse_response(150).double()
    made = small.model.layers[0].mixer.filter(150).impulse_response(150).double()
    relative = ((made - taps).norm(dim=1) / taps.norm(dim=1)).tolist()
    assert layer.relative_errors == pytest.approx(relative, rel=1e-3, abs=1e-6)
    for actual, expected in zip(layer.relative_errors, other.relative_errors, strict=True):
        assert actual <= (goal["tol"] if "tol" in goal else 1.05 * expected + 1e-6)
    if "order" in goal:
        assert layer.lower_bounds == pytest.approx(other.lower_bounds, rel=1e-2, abs=1e-6)
        assert layer.tail_energies == pytest.approx(other.tail_energies, rel=0.2, abs=1e-6)
    assert layer.effective_state_sizes == pytest.approx(other.effective_state_sizes, rel=1e-4)


@pytest.mark.parametrize(("taps", "context"), [(33, 64), (100, 300)])
def test_a_tolerance_counts_what_follows_a_filter_that_ends(taps: int, context: int) -> None:
    filter = {"type": "explicit", "taps": taps}
    model = make(
        mixers="hyena", filter=filter, max_position_embeddings=context, num_hidden_layers=1
    )
    t = torch.arange(float(taps))
    with torch.no_grad():  # far from zero at its end
        rates = torch.linspace(0.01, 0.05, 24)[:, None]
        mixers(model)[0].filter.kernel.copy_(torch.exp(-rates * t) * torch.cos(0.1 * t))
    small, report = distill(model, tol=0.05)
    assert report.converged
    before, after = (kernels(one, context)[0] for one in (model, small))
    error = (after - before).norm(dim=1) / before.norm(dim=1)
    assert error.max() <= 0.055
