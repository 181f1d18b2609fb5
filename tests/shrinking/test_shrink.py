"""`shrink`: sizes, losses, reports and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Mamba2Config,
    Mamba2ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

import gramian
from gramian.models import ByteTokenizer, GramianConfig, GramianForCausalLM, load

TEXT = "All that is read is not kept, and all that is kept is not read. " * 12


def mamba2(states: int = 12, **options: Any) -> Mamba2ForCausalLM:
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=259,
        hidden_size=16,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=8,
        state_size=states,
        n_groups=2,
        chunk_size=16,
        **options,
    )
    model = Mamba2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return model.eval()


def ours(*mixers: str, states: int = 8) -> GramianForCausalLM:
    torch.manual_seed(0)
    config = GramianConfig(
        hidden_size=16,
        num_hidden_layers=len(mixers),
        num_heads=2,
        mixers=list(mixers),
        linear_recurrence={"state_size": states},
        initializer_range=0.2,
    )
    return GramianForCausalLM(config).eval()


def windows(count: int = 5, length: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 259, (count, length), generator=generator)


def test_half_of_the_states_are_kept_and_the_report_says_so() -> None:
    model = mamba2()
    small, report = gramian.shrink(model, windows(), keep=0.5)
    assert type(small) is Mamba2ForCausalLM and small.config.state_size == 6
    assert model.config.state_size == 12
    assert report.states == (48, 24)  # 2 layers of 2 groups
    assert [len(x.kept) for x in report.layers] == [2, 2]
    assert all(len(set(kept)) == 6 for x in report.layers for kept in x.kept)
    for layer in report.layers:
        assert layer.predicted_error == pytest.approx(layer.measured_error, rel=1e-3)
        assert layer.spectrum[-1] == 0.0 and list(layer.spectrum) == sorted(layer.spectrum)[::-1]
        best = report.criterion == "error"
        assert not best or layer.spectrum[5] == pytest.approx(layer.predicted_error, rel=1e-6)
    assert report.tokens == 120 and report.held_out_tokens == 80


def test_losses_are_those_of_the_held_out_windows() -> None:
    model = mamba2()
    small, report = gramian.shrink(model, windows(9), keep=4, seed=3)
    chosen: set[int] = set()
    for seed in (3, 3, 4):  # the held-out windows depend on the seed alone
        _, again = gramian.shrink(model, windows(9), keep=4, seed=seed)
        chosen.add(hash(again.loss_before))
    assert len(chosen) == 2
    each = []
    for net in (model, small):
        with torch.no_grad():
            logits = net(windows(9)).logits[:, :-1]
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), windows(9)[:, 1:].flatten(), reduction="none"
        )
        each.append(loss.unflatten(0, (9, -1)).mean(1).double())
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))[:3]
    before, after = (losses[order] for losses in each)
    assert report.loss_before == pytest.approx(float(before.mean()), rel=1e-5)
    assert report.loss_after == pytest.approx(float(after.mean()), rel=1e-5)
    error = float((after - before).std() / 3**0.5)
    assert report.standard_error == pytest.approx(error, rel=1e-3)


def test_states_are_counted_in_the_bytes_of_a_sequence() -> None:
    model = mamba2()
    _, report = gramian.shrink(model, windows(), keep=0.5)
    cache = model(windows()[:1], use_cache=True).cache_params
    state = cache.layers[0].recurrent_states
    recurrent = state[0] if isinstance(state, dict | list | tuple) else state
    per_layer = recurrent.numel() * recurrent.element_size()
    taps = 2 * 2 * 6 * 4 * model.config.conv_kernel  # channels of B and C that are gone
    difference = report.original_state_bytes - report.shrunk_state_bytes
    assert difference == 2 * (per_layer // 2 + taps)
    before, after = report.sequences(2**30)
    assert before == 2**30 // report.original_state_bytes < after


def test_texts_need_a_tokenizer_and_equal_their_tokens() -> None:
    model = mamba2()
    small, report = gramian.shrink(model, TEXT, keep=0.5, tokenizer=ByteTokenizer(), context=50)
    ids = torch.tensor(list(TEXT.encode()))
    other, again = gramian.shrink(model, ids, keep=0.5, context=50)
    assert report.layers == again.layers
    assert all(
        torch.equal(a, b) for a, b in zip(small.parameters(), other.parameters(), strict=True)
    )
    several, _ = gramian.shrink(model, [ids[:300], ids[300:]], keep=0.5, context=50)
    assert several.config.state_size == 6
    with pytest.raises(ValueError, match="tokenizer"):
        gramian.shrink(model, TEXT, keep=0.5)


def test_max_increase_finds_the_smallest_size_within_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gramian.shrinking import _shrink, _trying
    from gramian.shrinking._passes import Scores
    from gramian.shrinking._texts import Windows

    def scores(model: Any, windows: Windows) -> Scores:  # 1 % more loss for each state less
        losses = torch.full((len(windows),), 1 + 0.01 * (12 - model.config.state_size)).double()
        return Scores(losses, torch.ones_like(losses))

    for module in (_shrink, _trying):
        monkeypatch.setattr(module, "window_scores", scores)
    model = mamba2()
    for budget, size in ((0.035, 9), (0.01 + 1e-9, 11), (0.5, 1)):
        small, report = gramian.shrink(model, windows(3), max_increase=budget)
        assert small.config.state_size == size
        assert report.increase == pytest.approx(0.01 * (12 - size)) and len(report.trials) <= 2
        assert report.trials[0].states == 4 * size and report.max_increase == budget
    with pytest.raises(ValueError, match=r"which is 1\.000% above.*44 states in all; got 0\.900%"):
        gramian.shrink(model, windows(3), max_increase=0.009)


def test_the_next_smaller_size_is_beyond_the_budget() -> None:
    model = mamba2()
    for budget in (0.002, 0.005, 0.02):
        small, report = gramian.shrink(model, windows(8), max_increase=budget)
        size = small.config.state_size
        tried = {trial.states // 4: trial.increase for trial in report.trials}
        assert report.increase == tried[size] <= budget
        assert size == 1 or tried[size - 1] > budget
        _, same = gramian.shrink(model, windows(8), keep=size)
        assert same.criteria == report.criteria and same.loss_after == report.loss_after
        assert same.standard_error == report.standard_error


@pytest.mark.parametrize("count", [1, 2, 3, 16, 63])
def test_counting_begins_beside_the_guess(count: int) -> None:
    from gramian.shrinking._choosing import count_within

    for true in range(count + 1):
        for guess in (None, *range(count + 1)):
            calls: list[int] = []

            def within(at: int, calls: list[int] = calls, true: int = true) -> bool:
                calls.append(at)
                return at < true

            assert count_within(count, within, guess) == true
            assert len(calls) == len(set(calls)) <= 2 * count.bit_length()
            assert guess != true or len(calls) <= 2


def test_layers_of_ours_may_have_different_sizes() -> None:
    model = ours("gated_linear_attention", "linear_attention", "gla_s6")
    small, report = gramian.shrink(model, windows(), keep=0.5, per_layer=True)
    sizes = [layer.states_after for layer in report.layers]
    assert sum(sizes) <= 12
    assert [mixer["state_size"] for mixer in small.config.mixers] == sizes
    largest = max(layer.spectrum[layer.states_after - 1] for layer in report.layers)
    for layer in report.layers:  # no layer could be smaller with that error
        assert layer.states_after == 1 or layer.spectrum[layer.states_after - 2] > largest
    with pytest.raises(ValueError, match="per_layer needs a configuration with a size for each"):
        gramian.shrink(mamba2(), windows(), keep=0.5, per_layer=True)


def test_layers_without_a_recurrence_stay(tmp_path: Path) -> None:
    model = ours("s6", "softmax_attention", "multi_hyena", "gated_delta_net")
    small, report = gramian.shrink(model, windows(), keep=0.25)
    assert [layer.mixer for layer in report.layers] == ["S6", "GatedDeltaNet"]
    small.save_pretrained(tmp_path / "small")
    again = load(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(again(windows()).logits, small(windows()).logits)


def test_sizes_are_multiples_that_kernels_take() -> None:
    for states, keep, multiple, expected in (
        (32, 0.5, None, 16),
        (32, 0.3, None, 16),
        (32, 0.01 + 1 / 32, None, 8),
        (32, 0.3, 1, 10),
        (32, 9, None, 16),
        (12, 5, None, 5),  # kernels do not take 12 either
    ):
        small, report = gramian.shrink(mamba2(states), windows(3), keep=keep, multiple=multiple)
        assert small.config.state_size == expected
        assert report.multiple == ((multiple or 8) if states == 32 else 1,)
        assert ("multiples of 8" in report.summary) == (report.multiple == (8,))


def test_the_criterion_with_the_smallest_loss_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from gramian.shrinking._choosing import Choices

    model = ours("gated_delta_net", "gated_linear_attention")
    _, report = gramian.shrink(model, windows(9), keep=0.5)
    assert set(report.criteria) == {"error", "diagonal", "energy", "weights"}
    assert report.criteria[report.criterion] == min(report.criteria.values())
    assert "normalized" in report.layers[0].note and not report.layers[1].note
    candidates = Choices.candidates
    for name, loss in report.criteria.items():

        def one(self: Any, plan: Any, name: str = name) -> Any:
            return {name: candidates(self, plan)[name]}

        monkeypatch.setattr(Choices, "candidates", one)
        _, other = gramian.shrink(model, windows(9), keep=0.5)
        assert other.criterion == name and other.criteria == {name: pytest.approx(loss)}
        same = [layer.kept for layer in other.layers] == [layer.kept for layer in report.layers]
        assert same or name != report.criterion


def test_a_report_prints_and_is_json() -> None:
    _, report = gramian.shrink(mamba2(), windows(2), keep=0.5)
    text = str(report)
    assert "12 to 6" in text and "48 states to 24" in text and "nan" not in text
    values = json.loads(report.to_json())
    assert values["standard_error"] is None  # one window has no spread
    assert values["layers"][0]["states_after"] == 6
    assert values["sequences_in_a_gibibyte"]["after"] > values["sequences_in_a_gibibyte"]["before"]
    pytest.importorskip("matplotlib")
    from gramian.reports import plot_shrinkage

    assert len(plot_shrinkage(report, "a model").axes) == 3


PROGRAM = """
import sys
import torch
from transformers import AutoModelForCausalLM

ids = torch.load("ids.pt")
for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(name)
    with torch.no_grad():
        logits = model(ids).logits
        written = model.generate(ids[:, :9], max_new_tokens=6, do_sample=False)
    model.save_pretrained(name + "-again")
    torch.save((logits, written), name + ".pt")
assert not [name for name in sys.modules if name.split(".")[0] == "gramian"]
"""


def qwen3_next() -> Qwen3NextForCausalLM:
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=6,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
    )
    return Qwen3NextForCausalLM(config).eval()


@pytest.mark.slow
def test_transformers_alone_loads_runs_and_saves_the_result(tmp_path: Path) -> None:
    ids = windows(2, 23)
    torch.save(ids, tmp_path / "ids.pt")
    expected = {}
    for build in (mamba2, qwen3_next):
        small, _ = gramian.shrink(build(), windows(), keep=0.5)
        with torch.no_grad():
            logits = small(ids).logits
            written = small.generate(ids[:, :9], max_new_tokens=6, do_sample=False)
        small.save_pretrained(tmp_path / build.__name__)
        expected[build.__name__] = logits, written
    subprocess.run([sys.executable, "-c", PROGRAM, *expected], check=True, cwd=tmp_path)
    for name, (logits, written) in expected.items():
        found, again = torch.load(tmp_path / f"{name}.pt")
        torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(again, written)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of keep and max_increase; got None and None."),
        ({"keep": 0.5, "max_increase": 0.1}, "give one of keep and max_increase"),
        ({"keep": 0.0}, "keep must be a share between 0 and 1"),
        ({"keep": 1.0}, "keep must be a share between 0 and 1"),
        ({"keep": -3}, "keep must be a share between 0 and 1"),
        ({"keep": True}, "keep must be a share between 0 and 1"),
        ({"keep": float("nan")}, "keep must be a share between 0 and 1"),
        ({"keep": 0.01}, "keep must leave at least one of the 12 states of backbone"),
        ({"keep": 12}, "keep must leave fewer states than the 12"),
        ({"keep": 0.99}, "keep must leave fewer states than the 12"),
        (
            {"keep": 9, "multiple": 6},
            "keep must leave fewer states than the 12 of the layers, in multiples of 6; got 9.",
        ),
        ({"max_increase": 0.0}, "max_increase must be a positive number"),
        ({"max_increase": float("nan")}, "max_increase must be a positive number"),
        ({"keep": 0.5, "multiple": 0}, "multiple must be an integer of at least 1"),
        ({"keep": 0.5, "context": 1}, "context must be an integer of at least 2"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        gramian.shrink(mamba2(), windows(), **options)
    assert str(caught.value).startswith(message)


def test_bad_texts_are_refused_in_one_sentence() -> None:
    model = mamba2()
    with pytest.raises(ValueError, match=r"at least two windows of 40 tokens.*got 1, and 79"):
        gramian.shrink(model, torch.arange(79), keep=0.5, context=40)
    with pytest.raises(ValueError, match="at least two windows are needed"):
        gramian.shrink(model, windows(1), keep=0.5)
    with pytest.raises(ValueError, match=r"must lie in 0 … 258.*got 0 … 259"):
        gramian.shrink(model, torch.tensor([[0, 1], [2, 259]]), keep=0.5)
    with pytest.raises(ValueError, match="windows must be token ids"):
        gramian.shrink(model, torch.randn(2, 3), keep=0.5)
    with pytest.raises(TypeError, match="texts or token ids are needed; got object"):
        gramian.shrink(model, [object()], keep=0.5)


def test_models_without_a_state_to_cut_are_refused() -> None:
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=259))
    with pytest.raises(ValueError, match=r"needs a model with linear.*got a GPT2LMHead"):
        gramian.shrink(gpt, windows(), keep=0.5)
    with pytest.raises(ValueError, match="needs a model with linear recurrences"):
        gramian.shrink(ours("multi_hyena"), windows(), keep=0.5)
    with pytest.raises(TypeError, match="causal language model"):
        gramian.shrink(nn.Linear(2, 2), windows(), keep=0.5)


def test_weights_that_the_configuration_does_not_describe_are_refused() -> None:
    model = mamba2()
    model.backbone.layers[0].mixer.register_parameter("extra", nn.Parameter(torch.zeros(2)))
    with pytest.raises(ValueError, match=r"without adapters.*got backbone.layers.0.mixer.extra"):
        gramian.shrink(model, windows(), keep=0.5)
    with torch.device("meta"):
        empty = Mamba2ForCausalLM(mamba2().config)
    with pytest.raises(ValueError, match=r"one device; got meta"):
        gramian.shrink(empty, windows(), keep=0.5)


@pytest.mark.parametrize("build", [mamba2, qwen3_next, lambda: ours("gla_s6", "s6")])
def test_half_precision_stays_half_precision(build: Any) -> None:
    model = build().to(torch.bfloat16)
    model.lm_head.weight.requires_grad_(False)
    small, report = gramian.shrink(model, windows(), keep=0.5)
    theirs = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in [*small.named_parameters(), *small.named_buffers()]:
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.requires_grad == theirs[name].requires_grad, name
    tied = model.get_input_embeddings().weight is model.lm_head.weight
    assert (small.get_input_embeddings().weight is small.lm_head.weight) == tied
    assert abs(report.loss_after - report.loss_before) < 0.5


def test_an_exception_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mamba2 import modeling_mamba2

    from gramian.shrinking import _shrink

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    model, scan = mamba2().train(), modeling_mamba2.mamba2_chunk_scan
    monkeypatch.setattr(_shrink, "measure_importance", fail)
    with pytest.raises(KeyboardInterrupt):
        gramian.shrink(model, windows(), keep=0.5)
    monkeypatch.undo()
    assert model.training
    monkeypatch.setattr(model.backbone.layers[1].mixer.out_proj, "forward", fail)
    with pytest.raises(KeyboardInterrupt):
        gramian.shrink(model, windows(), keep=0.5)
    assert modeling_mamba2.mamba2_chunk_scan is scan
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
