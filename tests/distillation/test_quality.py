"""Under a budget of quality the loss on the text decides; fine-tuning never makes it worse."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from gramian.distillation import Quality, Trial, distill, distill_to_budget, finetune, mean_loss
from gramian.filters import ModalFilter
from gramian.models import GramianConfig, GramianForCausalLM, GramianModel


def make(seed: int = 0) -> GramianForCausalLM:
    torch.manual_seed(seed)
    config = GramianConfig(
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=1,
        mixers="hyena",
        filter={"type": "implicit", "frequency": 1.0},
        max_position_embeddings=40,
        initializer_range=0.7,
    )
    return GramianForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> GramianForCausalLM:
    return make()


@pytest.fixture(scope="module")
def text(model: GramianForCausalLM) -> Tensor:
    """What the model itself writes, so that its filters matter for the loss."""
    torch.manual_seed(1)
    start = torch.randint(11, (120, 1))
    return model.generate(start, max_new_tokens=39, do_sample=True, top_k=0)


def test_loss_is_that_of_the_model(model: GramianForCausalLM, text: Tensor) -> None:
    expected = model(text, labels=text, use_cache=False).loss.item()
    assert mean_loss(model, text) == pytest.approx(expected, rel=1e-5)


def test_budget_is_kept_by_the_largest_tolerance_tried(
    model: GramianForCausalLM, text: Tensor
) -> None:
    told: list[Trial] = []
    small, report = distill_to_budget(model, text, 1e-3, progress=told.append)
    quality = report.quality
    assert quality is not None and quality.tokens == text.numel()
    assert list(quality.trials) == told
    assert quality.loss == pytest.approx(mean_loss(model, text))
    kept = [trial for trial in told if trial.increase <= 1e-3]
    failed = [trial for trial in told if trial.increase > 1e-3]
    assert kept and failed  # the filters matter, and the search had to look for it
    assert report.tol == max(trial.tol for trial in kept if trial.tol is not None)
    assert mean_loss(small, text) <= quality.loss * (1 + 1e-3)
    assert isinstance(small.model.layers[0].mixer.filter, ModalFilter)
    assert json.loads(report.to_json())["quality"]["max_increase"] == 1e-3
    assert "0.100% were allowed" in str(report)


@pytest.mark.parametrize(("count", "words"), [(1, "1 tolerance tried"), (2, "2 tolerances tried")])
def test_the_summary_counts_tolerances(count: int, words: str) -> None:
    _, report = distill(make(), order=1)
    trials = (Trial(tol=0.3, mean_order=1.0, loss=1.0, increase=0.0),) * count
    quality = Quality(tokens=10, max_increase=1e-3, loss=1.0, trials=trials)
    assert f"0.100% were allowed, {words}." in replace(report, quality=quality).summary


def test_a_budget_that_cannot_be_kept(
    model: GramianForCausalLM, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gramian.distillation._quality._FINEST", 0.05)
    with pytest.raises(ValueError, match="the closest is"):
        distill_to_budget(model, text, 1e-9)


def test_finetuning_recovers_what_a_coarse_distillation_lost(text: Tensor) -> None:
    small, _ = distill(make(), order=1)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    calls: list[tuple[int, int]] = []
    first, last = finetune(
        small, text, steps=40, lr=2e-3, progress=lambda done, total: calls.append((done, total))
    )
    assert last < first and calls == [(done, 40) for done in range(41)]
    held_out = text[1::10]
    assert mean_loss(small, held_out) == pytest.approx(last)
    assert any(not torch.equal(t, before[name]) for name, t in small.state_dict().items())
    assert not small.training


def test_finetuning_that_makes_it_worse_is_undone(text: Tensor) -> None:
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, last = finetune(model, text, steps=3, lr=10.0)
    assert first == last == pytest.approx(mean_loss(model, text[1::10]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: distill_to_budget(m, torch.zeros(3, dtype=torch.long)), "windows"),
        (lambda m: distill_to_budget(m, torch.zeros(3, 1, dtype=torch.long)), "windows"),
        (lambda m: distill_to_budget(m, torch.zeros(1, 3, dtype=torch.long), 0.0), "above 0"),
        (lambda m: finetune(m, torch.zeros(1, 3, dtype=torch.long)), "2 windows"),
        (lambda m: finetune(m, torch.zeros(2, 3, dtype=torch.long), 0), "at least 1 step"),
    ],
)
def test_refuses(model: GramianForCausalLM, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(model)


def test_refuses_other_models(model: GramianForCausalLM) -> None:
    with pytest.raises(TypeError, match="GramianModel"):
        distill_to_budget(GramianModel(model.config), torch.zeros(1, 3, dtype=torch.long))
