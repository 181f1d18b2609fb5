"""Plans measure what they say, replace what a budget says, and are tried as windows."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import yaml

from gramian import effective_state_size, hybrids, realize
from gramian.analysis import window_attention, window_maps
from gramian.hybrids import HybridPlan, HybridTrial
from gramian.models import ByteTokenizer, GramianConfig, GramianForCausalLM
from tests.analysis.test_windows import GROUPED, model_of, state_of

TOKENIZER = ByteTokenizer()
TEXT = "The river rose, and the bridge was gone. The road was closed until the river fell. " * 4
OTHER = "In the morning the water was low again; they counted the stones of the old bridge. " * 3
SIZE: dict[str, Any] = {"vocab_size": len(TOKENIZER), "num_hidden_layers": 3}
OPTIONS: dict[str, Any] = {
    "window": 4,
    "sinks": 1,
    "orders": (1, 3),
    "state": 3,
    "length": 24,
    "sequences": 2,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 3,
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    **GROUPED,
}


def make(kind: str) -> Any:
    if kind == "llama":
        return model_of("llama", **(SIZE | GROUPED))
    if kind == "gpt2":
        return model_of("gpt2", **SIZE)
    if kind == "qwen3_next":
        return model_of("qwen3_next", **(SIZE | DELTA))
    torch.manual_seed(3)
    config = GramianConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_heads=4,
        mixers=["softmax_attention", "gated_linear_attention", "softmax_attention"],
        max_position_embeddings=64,
    )
    return GramianForCausalLM(config).eval()


EXPECTED = {  # numbers of the attention layers, and heads that share keys and values
    "llama": ([0, 1, 2], 2),
    "gpt2": ([0, 1, 2], 1),
    "qwen3_next": ([1, 2], 2),
    "gramian": ([0, 2], 1),
}


def plan_of(kind: str, model: Any = None, **changes: Any) -> HybridPlan:
    options = {"replace": 1} | OPTIONS | changes
    return hybrids.plan_hybrid(model or make(kind), TEXT, TOKENIZER, **options)


@pytest.fixture(scope="module", params=EXPECTED)
def planned(request: pytest.FixtureRequest) -> tuple[str, Any, HybridPlan]:
    model = make(request.param)
    model.train()
    before = state_of(model)
    plan = plan_of(request.param, model)
    assert state_of(model) == before
    return request.param, model.eval(), plan


def test_attention_layers_are_planned_and_others_left(planned: Any) -> None:
    kind, _, plan = planned
    numbers, group = EXPECTED[kind]
    found = [int(next(p for p in x.name.split(".") if p.isdecimal())) for x in plan.layers]
    assert found == numbers
    assert {(x.heads, x.group) for x in plan.layers} == {(4, group)}
    left = [path for path, reason in plan.left if reason.startswith("it is no attention")]
    assert len(left) == 3 - len(numbers)
    width = 4 if kind == "gramian" else 8
    assert {x.token_bytes for x in plan.layers} == {4 // group * 2 * width * 4}
    assert (plan.length, plan.sequences) == (24, 2)


def test_measures_are_those_of_maps_values_and_outputs() -> None:
    model = make("llama")
    plan = plan_of("llama", model)
    ids = torch.tensor(TOKENIZER(TEXT).input_ids)
    windows = ids[: len(ids) // 24 * 24].reshape(-1, 24)
    rows = windows[[0, len(windows) // 2]]
    model.set_attn_implementation("eager")
    joined: dict[int, list[Tensor]] = {k: [] for k in range(3)}
    outputs: dict[int, list[Tensor]] = {k: [] for k in range(3)}
    for k, layer in enumerate(model.model.layers):
        project = layer.self_attn.o_proj
        project.register_forward_pre_hook(lambda _, args, k=k: joined[k].append(args[0]))
        project.register_forward_hook(lambda *given, k=k: outputs[k].append(given[-1]))
    with torch.no_grad():
        maps = [model(row[None], output_attentions=True).attentions for row in rows]
    for k, layer in enumerate(plan.layers):
        T = torch.cat([one[k] for one in maps]).double()  # (2, 4, L, L)
        narrow = window_maps(T, 4, 1)
        sizes = effective_state_size(T, sorted({(2 * j + 1) * 24 // 32 for j in range(16)}))
        torch.testing.assert_close(
            torch.tensor(layer.ess), sizes.mean((0, 2)).float(), rtol=1e-4, atol=1e-4
        )
        norm = torch.linalg.matrix_norm

        def average(x: Tensor) -> Tensor:
            """The root mean square over sequences, (heads)."""
            return x.square().mean(0).sqrt().float()

        close = {"rtol": 1e-3, "atol": 1e-6}
        error = average(norm(T - narrow) / norm(T))
        torch.testing.assert_close(torch.tensor(layer.window_errors), error, **close)
        for column, order in enumerate((1, 3)):
            smaller = realize(T, order=order).matrix()
            error = average(norm(T - smaller) / norm(T))
            measured = torch.tensor(layer.errors)[:, column]
            torch.testing.assert_close(measured, error, **close)
        heads = torch.cat(joined[k]).unflatten(-1, (4, 8)).transpose(1, 2)  # (2, 4, L, N)
        torch.testing.assert_close(
            torch.tensor(layer.norms), average(norm(heads) / 24**0.5), **close
        )
        whole = torch.cat(outputs[k]).square().sum(-1).mean().sqrt()
        assert layer.output_norm == pytest.approx(float(whole), rel=1e-4)
        if k:  # values of the first layer alone are those of the whole model's inputs
            continue
        attention = model.model.layers[0].self_attn
        with torch.no_grad():
            x = model.model.layers[0].input_layernorm(model.model.embed_tokens(rows))
            v = attention.v_proj(x).unflatten(-1, (2, 8)).transpose(1, 2).repeat_interleave(2, 1)
        lost = average(norm((T - narrow) @ v.double())) / average(norm(heads))
        torch.testing.assert_close(torch.tensor(layer.output_errors), lost, **close)


def test_loss_is_that_of_each_unit_alone() -> None:
    model = make("llama")
    plan = plan_of("llama", model, criterion="loss", by="head", replace=2)
    ids = torch.tensor(TOKENIZER(TEXT).input_ids)
    windows = ids[: len(ids) // 24 * 24].reshape(-1, 24)
    rows = windows[[0, len(windows) // 2]]

    def loss() -> float:
        with torch.no_grad():
            logits = model(rows, use_cache=False).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))

    whole = loss()
    for layer in plan.layers:
        assert layer.loss_increases is not None and len(layer.loss_increases) == 2
        for heads, found in zip(([0, 1], [2, 3]), layer.loss_increases, strict=True):
            with window_attention(model, {layer.name: heads}, 4, 1):
                assert found == pytest.approx(loss() - whole, abs=2e-5)
    every = [x for layer in plan.layers for x in layer.loss_increases or ()]
    assert [value for *_, value in plan.scores()] == sorted(every)


@pytest.mark.each
@pytest.mark.parametrize("criterion", ["realization", "state", "window", "output", "magnitude"])
def test_the_smallest_values_are_replaced_first(planned: Any, criterion: str) -> None:
    _, _, plan = planned
    for by, size in (("layer", len(plan.layers)), ("head", 0)):
        size = size or sum(x.heads // x.group for x in plan.layers)
        some = dataclasses.replace(plan, by=by)
        values = [value for *_, value in some.scores(criterion)]
        assert len(values) == size and values == sorted(values)
        for count in range(size + 1):
            chosen = some.choose(count, criterion)
            first = {(path, h) for path, heads, _ in some.scores(criterion)[:count] for h in heads}
            assert {(x.name, h) for x in chosen.layers for h in x.replaced} == first
            assert set(chosen.kept) == {x.name for x in chosen.layers} - {*chosen.replaced}
        assert all(heads is None for heads in some.choose(size).replaced.values())


def test_values_of_units_are_means_over_their_heads() -> None:
    plan = plan_of("llama")
    layer = dataclasses.replace(
        plan.layers[0],
        ess=(1.0, 2.0, 3.0, 6.0),
        errors=((0.0, 0.1), (0.0, 0.7), (0.0, 0.0), (0.0, 0.2)),
        window_errors=(0.3, 0.4, 0.0, 0.0),
        output_errors=(0.5, 0.0, 1.0, 0.1),
        norms=(2.0, 0.0, 3.0, 4.0),
        output_norm=7.0,
    )
    assert layer.score("state", 0, "layer", 1) == 3
    assert layer.score("state", 1, "head", 1) == 4.5
    assert layer.score("realization", 0, "head", 1) == pytest.approx(0.5)
    assert layer.score("window", 0, "head", 1) == pytest.approx(math.sqrt(0.125))
    assert layer.score("output", 0, "head", 1) == pytest.approx(0.5)
    assert layer.score("output", 1, "head", 1) == pytest.approx(math.hypot(3, 0.4) / 5)
    assert layer.score("magnitude", 0, "layer", 1) == 7
    assert layer.score("magnitude", 1, "head", 1) == 5


def test_random_choices_follow_the_seed() -> None:
    plan = plan_of("gpt2", criterion="random", by="head", replace=5, seed=1)
    assert plan.choose(seed=1) == plan
    others = [plan.choose(seed=seed).replaced for seed in range(6)]
    assert len({str(one) for one in others}) > 3
    assert all(sum(len(h or range(4)) for h in one.values()) == 5 for one in others)


def test_shares_count_the_bytes_of_keys_and_values() -> None:
    plan = plan_of("llama")
    wide = dataclasses.replace(plan.layers[0], token_bytes=6 * plan.layers[1].token_bytes)
    plan = dataclasses.replace(plan, layers=(wide, *plan.layers[1:]))
    order = [path for path, *_ in plan.scores("state")]
    for share in (0.1, 0.2, 0.5, 0.9):
        chosen = plan.choose(share, "state")
        wanted = share * sum(x.token_bytes for x in plan.layers)
        sizes = {x.name: x.token_bytes for x in plan.layers}
        count = next(n for n in range(4) if sum(sizes[p] for p in order[:n]) >= wanted)
        assert {*chosen.replaced} == {*order[:count]}
    whole = plan.choose(3)
    before, after = whole.cache_bytes(100)
    assert (before, after) == (8 * plan.layers[1].token_bytes * 100, before // 100 * 5)
    assert plan.choose(0).cache_bytes(100) == (before, before)
    assert whole.cache_bytes(3)[0] == whole.cache_bytes(3)[1]


@pytest.mark.parametrize("name", ["plan.yaml", "plan.json"])
def test_plans_are_written_and_read_back(planned: Any, name: str, tmp_path: Path) -> None:
    _, model, plan = planned
    for one in (plan, dataclasses.replace(plan, by="head").choose(3)):
        assert one.layers[0].errors[0][0] > 0
        path = one.save(tmp_path / name)
        assert HybridPlan.load(path) == one
    assert str(plan).count("\n") >= len(plan.layers)
    with HybridPlan.load(path).applied(model):
        pass


def test_an_edited_plan_is_what_it_says(tmp_path: Path) -> None:
    plan = plan_of("llama")
    path = plan.save(tmp_path / "plan.yaml")
    values = yaml.safe_load(path.read_text())
    first, second, third = (layer.name for layer in plan.layers)
    assert [*values["replace"], *values["keep"]] == [*plan.replaced, *plan.kept]
    values["replace"], values["keep"] = {second: "all", third: [3, 0]}, [first]
    path.write_text(yaml.safe_dump(values))
    assert HybridPlan.load(path).replaced == {second: None, third: (0, 3)}
    for changes, message in (
        ({"replace": {"model.layers.9": "all"}}, "replaces model.layers.9, which is none of its"),
        ({"replace": {first: "all"}}, f"replaces {first} and keeps it"),
        ({"replace": {third: [4]}}, f"{third} has 4 heads; got the number 4"),
        ({"replace": {third: "some"}}, "must have all or numbers of heads; got 'some'"),
        ({"format": "other"}, "a plan of format 'gramian.hybrid_plan/1' is needed; got 'other'"),
        ({"layers": [{"name": "x"}]}, "an entry of the plan has another form"),
    ):
        path.write_text(yaml.safe_dump(values | changes))
        with pytest.raises(ValueError, match=message) as caught:
            HybridPlan.load(path)
        assert str(caught.value).startswith(f"{path} is not the plan of a hybrid: ")
        assert "\n" not in str(caught.value)
    for text in ("{", "- a\n- b", "", "a: [b"):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not the plan of a hybrid") as caught:
            HybridPlan.load(path)
        assert "\n" not in str(caught.value)


def test_an_edited_plan_says_so_and_is_compared_with_as_much(tmp_path: Path) -> None:
    plan = plan_of("llama").choose(1, "state")
    assert (plan.edited, plan.chosen_by) == (False, "state") and plan.as_much() is plan
    values = plan.to_dict()
    first, second, third = (layer.name for layer in plan.layers)

    values["replace"], values["keep"] = {first: "all", third: "all"}, []
    edited = HybridPlan.from_dict(values)
    assert edited.chosen_by == "hand" and "2 of 3 layers, chosen by hand" in str(edited)
    assert len(edited.as_much().choose(criterion="magnitude").replaced) == 2

    group = plan.layers[1].group
    values["replace"] = {first: "all", second: list(range(group))}
    partly = HybridPlan.from_dict(values)
    wanted = sum(len(layer.replaced) for layer in partly.layers)
    other = partly.as_much().choose(criterion="random", seed=1)
    assert sum(len(layer.replaced) for layer in other.layers) == wanted
    assert f"{wanted // group} of " in str(partly) and "groups of heads, chosen by hand" in str(
        partly
    )

    columns = str(plan).splitlines()[2].split()
    values = plan.to_dict() | {"window": plan.window + 1}
    assert len(str(HybridPlan.from_dict(values)).splitlines()[2].split()) == len(columns) - 2
    assert (
        HybridPlan.from_dict({k: v for k, v in plan.to_dict().items() if k != "measured"}) == plan
    )
    with pytest.raises(ValueError, match="the plan lacks the entry 'keep'"):
        HybridPlan.from_dict({k: v for k, v in values.items() if k != "keep"})


def test_trials_measure_windows_on_the_text(planned: Any, tmp_path: Path) -> None:
    _, model, plan = planned
    before = state_of(model)
    criteria = ("state", "random")
    trial = hybrids.try_hybrid(
        model, plan, OTHER, TOKENIZER, against=criteria, seeds=2, sequences=3
    )
    assert state_of(model) == before
    ids = torch.tensor(TOKENIZER(OTHER).input_ids)
    windows = ids[: len(ids) // 24 * 24].reshape(-1, 24)
    rows = windows[[i * len(windows) // 3 for i in range(3)]]

    def losses() -> Tensor:
        with torch.no_grad():
            logits = model(rows, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
        )
        return loss.reshape(3, -1).mean(-1)

    whole = losses()
    assert trial.loss == pytest.approx(float(whole.mean()), rel=1e-5)
    assert [(x.criterion, x.seed) for x in trial.choices] == [
        (plan.criterion, None),
        ("state", None),
        ("random", 0),
        ("random", 1),
    ]
    assert (trial.tokens, trial.length, trial.sequences) == (69, 24, 3)
    plans = [plan, plan.choose(criterion="state")]
    plans += [plan.choose(criterion="random", seed=seed) for seed in range(2)]
    for one, chosen in zip(trial.choices, plans, strict=True):
        assert one.heads == 4
        with window_attention(model, chosen.replaced, 4, 1):
            change = losses() - whole
        assert one.loss == pytest.approx(float(whole.mean() + change.mean()), rel=1e-5)
        assert one.increase == pytest.approx(float(change.mean()), abs=2e-6)
        assert one.error == pytest.approx(float(change.std()) / 3**0.5, rel=1e-2, abs=1e-6)
        assert one.perplexity == pytest.approx(math.exp(one.loss))
    assert HybridTrial.load(trial.save(tmp_path / "trial.json")) == trial
    assert str(trial).count(" of ") >= 4 and "standard errors" in str(trial)


def test_the_model_is_as_before_after_an_exception() -> None:
    model = make("llama")
    plan = plan_of("llama", model)
    before = state_of(model)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for call in (
        lambda: hybrids.try_hybrid(model, plan, OTHER, TOKENIZER, progress=stop),
        lambda: plan_of("llama", model, progress=stop),
        lambda: plan_of("llama", model, criterion="loss", progress=stop),
    ):
        with pytest.raises(KeyboardInterrupt):
            call()
        assert state_of(model) == before
    with pytest.raises(RuntimeError, match="middle"), plan.applied(model):
        raise RuntimeError("in the middle")
    assert state_of(model) == before


def test_bad_inputs_get_one_sentence() -> None:
    model = make("llama")
    plan = plan_of("llama", model)
    recurrent = GramianForCausalLM(
        GramianConfig(
            hidden_size=8, num_hidden_layers=1, num_heads=2, mixers="gated_linear_attention"
        )
    )

    def planning(other: Any = model, text: Any = TEXT, **changes: Any) -> Any:
        options = {"replace": 1} | OPTIONS | changes
        return lambda: hybrids.plan_hybrid(other, text, TOKENIZER, **options)

    def trying(other: Any = model, text: Any = OTHER, **changes: Any) -> Any:
        return lambda: hybrids.try_hybrid(other, plan, text, TOKENIZER, **changes)

    cases: list[tuple[Any, type[Exception], str]] = [
        (planning(torch.nn.Linear(2, 2)), TypeError, "takes a causal language model"),
        (planning(recurrent), ValueError, "has no attention that a window can replace"),
        (planning(replace=4), ValueError, "replace must be at most 3, the layers there are; got 4"),
        (planning(replace=-1), ValueError, "replace must be a number of layers .* got -1"),
        (planning(replace=1.5), ValueError, "replace must be a number of layers .* got 1.5"),
        (planning(replace=True), ValueError, "replace must be a number of layers .* got True"),
        (planning(by="token"), ValueError, "by must be 'layer' or 'head'; got 'token'"),
        (planning(criterion="luck"), ValueError, "criterion must be one of output, .* 'luck'"),
        (planning(state=5), ValueError, "state must be one of the orders 1, 3; got 5"),
        (planning(orders=(-1, 3)), ValueError, "orders must be an integer of at least 0; got -1"),
        (planning(window=0), ValueError, "window must be an integer of at least 1; got 0"),
        (planning(window=24), ValueError, "a window of 24 tokens needs longer sequences"),
        (planning(sinks=-2), ValueError, "sinks must be an integer of at least 0; got -2"),
        (planning(length=1), ValueError, "length must be an integer of at least 2; got 1"),
        (planning(sequences=0), ValueError, "sequences must be an integer of at least 1; got 0"),
        (planning(text=""), ValueError, "too few tokens"),
        (trying(text="x"), ValueError, "too few tokens"),
        (trying(seeds=0), ValueError, "seeds and sequences must be at least 1; got 0 and 16"),
        (trying(against=["loss"]), ValueError, "the losses were not measured; plan with crit"),
        (trying(against=["luck"]), ValueError, "criterion must be one of"),
        (trying(make("gpt2")), ValueError, "GPT2LMHeadModel has no module model.layers."),
        (lambda: HybridTrial.from_dict({}), ValueError, "a trial of format"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_modules_that_attend_several_times_are_left() -> None:
    model = make("gpt2")
    model.transformer.h[2].attn = model.transformer.h[1].attn
    plan = plan_of("gpt2", model)
    assert [layer.name for layer in plan.layers] == ["transformer.h.0.attn"]
    assert ("transformer.h.1.attn", "its module attends more than once.") in plan.left


def test_a_trial_reads_json_only(tmp_path: Path) -> None:
    path = tmp_path / "trial.json"
    for text in ("{", json.dumps({"format": "gramian.hybrid_trial/1"})):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not the trial of a hybrid"):
            HybridTrial.load(path)
