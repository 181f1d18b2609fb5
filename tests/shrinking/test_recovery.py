"""`shrink(…, recover=…)`: training towards the original's predictions, merged and undone."""

from __future__ import annotations

import copy
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

import gramian
from gramian.models import GramianConfig, GramianForCausalLM
from gramian.shrinking import Recovery, ShrinkReport
from gramian.shrinking._family import find_layers
from gramian.shrinking._recovery import recover
from gramian.shrinking._texts import Windows

VOCABULARY = 23


def sharpen(kind: Any, config: Any) -> Any:
    """Return a random model whose predictions depend on its states."""
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * 1.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


def mamba2(**options: Any) -> Mamba2ForCausalLM:
    config = Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=8,
        state_size=12,
        n_groups=1,
        chunk_size=16,
        **options,
    )
    model = sharpen(Mamba2ForCausalLM, config)
    for layer in model.backbone.layers:  # outputs come from the states alone, which remember much
        layer.mixer.D.data.zero_()
        layer.mixer.conv1d.weight.data.mul_(2.0)
        layer.mixer.dt_bias.data.add_(2.0)
    return model


def delta_net(**options: Any) -> Qwen3_5ForCausalLM:
    config = Qwen3_5TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=6,
        pad_token_id=0,
        **options,
    )
    return sharpen(Qwen3_5ForCausalLM, config)


def ours(**options: Any) -> GramianForCausalLM:
    config = GramianConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_heads=2,
        mixers=["gated_linear_attention", "softmax_attention"],
        linear_recurrence={"state_size": 8},
        **options,
    )
    return sharpen(GramianForCausalLM, config)


MODELS = {"mamba2": mamba2, "delta_net": delta_net, "ours": ours}


def windows(count: int = 64, length: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (count, length), generator=generator)


@cache
def shrunk(kind: str) -> tuple[Any, Any, ShrinkReport]:
    """Return a model, the same with two states, and the report. No test changes them."""
    model = MODELS[kind]()
    return model, *gramian.shrink(model, windows(), keep=2)


def divergence(original: nn.Module, small: nn.Module, ids: Tensor) -> float:
    """The mean over tokens of Σ p (log p - log q), in double precision."""
    with torch.no_grad():
        p, q = (model(ids).logits.double().log_softmax(-1) for model in (original, small))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.each
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", MODELS)
def test_recovery_brings_predictions_closer_on_text_that_it_does_not_see(
    kind: str, method: str, tmp_path: Path
) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    model, plain, before = shrunk(kind)
    steps = Recovery(40, method, learning_rate=6e-3)
    state = torch.get_rng_state()
    small, report = gramian.shrink(model, windows(), keep=2, recover=steps)
    assert torch.equal(torch.get_rng_state(), state)
    done = report.recovery
    assert done is not None and type(small) is type(model) and before.recovery is None
    assert done.divergence_after < done.divergence_before
    unseen = torch.randint(VOCABULARY, (40, 24), generator=torch.Generator().manual_seed(2))
    assert divergence(model, small, unseen) < divergence(model, plain, unseen)
    assert [n for n, _ in small.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert report.layers == before.layers and report.loss_after == before.loss_after
    small.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        assert torch.equal(again(unseen).logits, small(unseen).logits)


@pytest.mark.parametrize("kind", MODELS)
def test_training_brings_the_last_hidden_states_closer(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain, _ = shrunk(kind)
    seen: dict[bool, float] = {}

    def train(net: Any, ids: Tensor, objective: Any, *_: Any, **__: Any) -> tuple[float, float]:
        for training in (False, True):
            net.train(training)
            seen[training] = float(objective(ids[:8]).detach())
        return 1.0, 0.5

    monkeypatch.setattr("gramian.shrinking._recovery.finetune_briefly", train)
    small, ids = copy.deepcopy(plain), windows()
    recover(model, small, list(find_layers(small)), Windows.of(ids), Recovery(1), 0)
    with torch.no_grad():
        h, g = (net.get_decoder()(ids[:8]).last_hidden_state for net in (model, plain))
    error = float((h - g).square().sum() / h.square().sum())
    assert seen[False] == pytest.approx(divergence(model, plain, ids[:8]), rel=1e-4)
    assert error > 0.01 and seen[True] - seen[False] == pytest.approx(error, rel=1e-3)
    readers = [net.get_output_embeddings() for net in (model, small)]
    assert not any(reader._forward_pre_hooks for reader in readers)


@pytest.mark.parametrize("kind", MODELS)
def test_the_report_holds_the_losses_and_their_standard_errors(kind: str) -> None:
    model = MODELS[kind]()
    small, report = gramian.shrink(model, windows(16), keep=4, recover=3, seed=5)
    held_out = torch.randperm(16, generator=torch.Generator().manual_seed(5))[:4].sort().values
    each = []
    for net in (model, small):
        with torch.no_grad():
            logits = net(windows(16)[held_out]).logits[:, :-1].double()
        target = windows(16)[held_out, 1:]
        each.append(nn.functional.cross_entropy(logits.mT, target, reduction="none").mean(1))
    done = report.recovery
    assert done is not None and (done.steps, done.method, done.learning_rate) == (3, "full", 3e-4)
    assert done.loss == pytest.approx(float(each[1].mean()), rel=1e-5)
    assert done.increase == pytest.approx(float(each[1].mean() / each[0].mean()) - 1, abs=1e-6)
    assert done.standard_error == pytest.approx(float((each[1] - each[0]).std() / 2), rel=1e-3)
    assert "after 3 steps of recovery (full" in report.summary
    assert report.to_dict()["recovery"]["loss"] == done.loss


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_seed_decides_everything(method: str) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    model, plain, _ = shrunk("mamba2")
    found = []
    for seed, noise in ((3, 0), (3, 1), (4, 0)):
        small = copy.deepcopy(plain)
        torch.manual_seed(noise)  # what torch draws otherwise plays no part
        after = torch.rand(())
        torch.manual_seed(noise)
        steps = Recovery(10, method, learning_rate=6e-3)
        recover(model, small, list(find_layers(small)), Windows.of(windows()), steps, seed)
        assert torch.rand(()) == after  # and its own draws stay in the recovery
        found.append(torch.cat([p.detach().flatten() for p in small.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("kind", MODELS)
def test_low_rank_changes_are_merged(kind: str) -> None:
    pytest.importorskip("peft")
    model, plain, _ = shrunk(kind)
    small, _ = gramian.shrink(
        model, windows(), keep=2, recover=Recovery(20, "lora", learning_rate=3e-3, rank=3)
    )
    assert not any("lora" in name for name, _ in small.named_modules())
    assert not hasattr(small, "peft_config")
    before, ranks = dict(plain.named_parameters()), {}
    for name, parameter in small.named_parameters():
        change = (parameter - before[name]).detach().double()
        if change.any():
            values = torch.linalg.svdvals(change)
            ranks[name] = int((values > 1e-5 * values[0]).sum())
    widths = {name: min(before[name].shape) for name in ranks}
    assert ranks and all(rank == min(3, widths[name]) for name, rank in ranks.items())
    assert not any(part in name for name in ranks for part in ("embed", "lm_head", "conv1d"))
    assert kind == "mamba2" or any("out_proj" in name for name in ranks)


def test_a_weight_in_two_places_is_not_changed_by_low_rank() -> None:
    pytest.importorskip("peft")
    model = ours(tie_word_embeddings=True)
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    small, _ = gramian.shrink(ours(tie_word_embeddings=True), windows(), keep=2)
    shared = small.model.layers
    shared[1].mlp.up_proj.weight = shared[0].mlp.up_proj.weight
    before = shared[0].mlp.up_proj.weight.detach().clone()
    recovery = Recovery(20, "lora", learning_rate=3e-3)
    first, last = recover(
        model, small, list(find_layers(small)), Windows.of(windows()), recovery, 0
    )
    assert last < first
    assert torch.equal(shared[0].mlp.up_proj.weight, before)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    held_out = windows()[1::10]
    assert divergence(model, small, held_out) == pytest.approx(last, rel=1e-4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_recovery_that_does_not_help_is_undone(method: str) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    model = mamba2()
    plain, _ = gramian.shrink(model, windows(16), keep=4)
    small, report = gramian.shrink(
        model, windows(16), keep=4, recover=Recovery(3, method, learning_rate=30.0)
    )
    done = report.recovery
    assert done is not None and done.divergence_after == done.divergence_before
    assert "it did not help and was undone" in report.summary
    for one, two in zip(small.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, two)
    assert done.loss == report.loss_after and done.increase == report.increase


@pytest.mark.parametrize("method", ["full", "lora"])
def test_half_precision_is_trained_in_single_and_comes_back(method: str) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    model = mamba2().to(torch.bfloat16)
    model.backbone.embeddings.weight.requires_grad_(False)
    small, report = gramian.shrink(model, windows(), keep=2, recover=Recovery(40, method, 6e-3))
    plain, _ = gramian.shrink(model, windows(), keep=2)
    assert report.recovery.divergence_after < report.recovery.divergence_before
    theirs = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    for name, tensor in [*small.named_parameters(), *small.named_buffers()]:
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.requires_grad == theirs[name].requires_grad, name
    assert torch.equal(small.backbone.embeddings.weight, model.backbone.embeddings.weight)


def test_progress_counts_windows_and_then_steps() -> None:
    told: list[tuple[int, int]] = []
    gramian.shrink(
        mamba2(), windows(8), keep=4, recover=2, progress=lambda *done: told.append(done)
    )
    assert told[-3:] == [(0, 2), (1, 2), (2, 2)] and told[0][1] == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: 0, "steps of a recovery must be at least 1; got 0."),
        (lambda: Recovery(-1), "steps of a recovery must be at least 1; got -1."),
        (lambda: Recovery(1, batch=0), "batch of a recovery must be at least 1; got 0."),
        (lambda: Recovery(1, rank=1.5), "rank of a recovery must be at least 1; got 1.5."),
        (lambda: Recovery(1, "qlora"), "method of a recovery must be full or lora; got 'qlora'."),
        (lambda: Recovery(1, learning_rate=0.0), "learning_rate of a recovery must be a positive"),
        (lambda: Recovery(1, learning_rate=float("nan")), "learning_rate of a recovery must be a"),
    ],
)
def test_bad_recoveries_are_refused_in_one_sentence(make: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        gramian.shrink(mamba2(), windows(8), keep=4, recover=make())
    assert str(caught.value).startswith(message)


def test_recoveries_that_cannot_train_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mamba2()
    with pytest.raises(TypeError, match=r"a number of steps or a Recovery; got str\."):
        gramian.shrink(model, windows(8), keep=4, recover="all")
    with pytest.raises(ValueError, match=r"at least two windows to choose by.*got 1\."):
        gramian.shrink(model, windows(2), keep=4, recover=1)
    with pytest.raises(ValueError, match=r"parameters that require gradients; got none\."):
        gramian.shrink(mamba2().requires_grad_(False), windows(8), keep=4, recover=1)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="adapters need peft"):
        gramian.shrink(model, windows(8), keep=4, recover=Recovery(1, "lora"))


def test_lora_leaves_frozen_weights() -> None:
    pytest.importorskip("peft")
    model = ours()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" not in name)
    recovery = Recovery(40, "lora", learning_rate=6e-3)
    small, report = gramian.shrink(model, windows(), keep=2, recover=recovery)
    assert report.recovery.divergence_after < report.recovery.divergence_before  # not undone
    trained = dict(small.named_parameters())
    frozen = {name: one for name, one in model.named_parameters() if not one.requires_grad}
    assert frozen
    for name, parameter in frozen.items():
        assert torch.equal(trained[name], parameter), name
        assert not trained[name].requires_grad


def test_a_model_without_a_working_cache_is_refused_before_the_work() -> None:
    model = delta_net()
    model.config.layer_types = ["linear_attention"] * 2
    calls: list[int] = []
    with pytest.raises(ValueError, match="needs a model that runs with a cache; this Qwen3_5") as e:
        gramian.shrink(model, windows(), keep=2, progress=lambda done, _: calls.append(done))
    assert not calls and len(str(e.value).splitlines()) == 1


def test_a_recovery_runs_where_no_gradients_are_recorded() -> None:
    model, _, _ = shrunk("mamba2")
    with torch.no_grad():
        _, report = gramian.shrink(model, windows(), keep=2, recover=2)
    assert report.recovery is not None


def test_the_first_criterion_stays_if_no_recovery_helps() -> None:
    model, _, _ = shrunk("mamba2")
    recovery = Recovery(1, candidates=99, learning_rate=1e30)
    _, report = gramian.shrink(model, windows(), keep=2, recover=recovery)
    assert report.criterion == next(iter(report.criteria))
    assert report.recovery.candidates <= len(report.criteria)
