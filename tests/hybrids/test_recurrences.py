"""Fitted recurrences are what their equation says, and plans store and apply them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import yaml

from gramian import hybrids
from gramian.analysis import AttentionCall, replace_attention, window_attention
from gramian.hybrids import KINDS, HybridPlan, HybridTrial, LayerRecurrence, Recurrence
from gramian.hybrids._recurrence import local_part, stored_tokens
from tests.analysis.test_windows import GROUPED, model_of, state_of
from tests.hybrids.test_hybrids import EXPECTED, OPTIONS, OTHER, SIZE, TEXT, TOKENIZER, make

FIT: dict[str, Any] = {"kind": "recurrence", "fit_sequences": 6, "fit_steps": 6}


def plan_of(model: Any, **changes: Any) -> HybridPlan:
    options = {"replace": 1} | OPTIONS | FIT | changes
    return hybrids.plan_hybrid(model, TEXT, TOKENIZER, **options)


def random_layer(heads: int, groups: int, states: int, width: int) -> LayerRecurrence:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    decay = 1 / 64 + 63 / 64 * torch.rand(groups, states, dtype=torch.float64)
    decay[:, 0], decay[:, -1] = 1, 1 / 64
    return LayerRecurrence(
        draw(heads, states, width),
        draw(heads, states),
        draw(groups, states, width),
        draw(groups, states),
        decay,
    )


def stepped(layer: LayerRecurrence, call: AttentionCall, window: int, sinks: int) -> Tensor:
    """The outputs (H, L, M) of one sequence, by a memory that is updated at every token."""
    (q,), (k,), (v,) = call.query, call.key, call.value
    heads, length, _ = q.shape
    group = heads // len(k)
    y = torch.zeros(heads, length, v.shape[-1], dtype=q.dtype)
    for head in range(heads):
        own = head // group
        keys = k[own]
        columns = torch.cat([v[own], torch.ones(length, 1, dtype=q.dtype)], 1)
        memory = torch.zeros(layer.decay.shape[1], columns.shape[1], dtype=q.dtype)
        for t in range(length):
            memory = layer.decay[own][:, None] * memory
            if t - window >= sinks:
                feature = (layer.key_map[own] @ keys[t - window] + layer.key_bias[own]).softmax(0)
                memory = memory + feature[:, None] * columns[t - window]
            read = (layer.query_map[head] @ q[head, t] + layer.query_bias[head]).exp() @ memory
            for s in range(t + 1):
                if t - s < window or s < sinks:
                    read = read + (call.scale * q[head, t] @ keys[s]).exp() * columns[s]
            y[head, t] = read[:-1] / read[-1]
    return y


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 50])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (5, 2), (3, 0), (60, 4)])
def test_blocks_of_steps_are_single_steps(length: int, window: int, sinks: int) -> None:
    torch.manual_seed(length)
    q = torch.randn(1, 4, length, 5, dtype=torch.float64)
    k, v = torch.randn(1, 2, length, 5).double(), torch.randn(1, 2, length, 7).double()
    call = AttentionCall("", q, k, v, None, 0.3, lambda mask: (q, None))
    layer = random_layer(4, 2, 3, 5)
    local = local_part(call, window, sinks)
    y = layer.read(q, k, v, local, stored_tokens(call, sinks), window)
    torch.testing.assert_close(y[0], stepped(layer, call, window, sinks), rtol=1e-12, atol=1e-13)
    single = LayerRecurrence(**{name: x.float() for name, x in vars(layer).items()})
    near = local[0].float(), local[1].float()
    again = single.read(q.float(), k.float(), v.float(), near, stored_tokens(call, sinks), window)
    torch.testing.assert_close(again.double(), y, rtol=1e-4, atol=1e-5)


def logits_of(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, attention_mask=mask, use_cache=False).logits
    return logits


@pytest.mark.parametrize("kind", EXPECTED)
def test_replaced_heads_are_the_recurrence_and_others_are_as_before(kind: str) -> None:
    model = make(kind)
    before = state_of(model)
    plan = plan_of(model, replace=1)
    assert state_of(model) == before
    (path,) = plan.replaced
    layer = plan.replacement.layer(path)  # type: ignore[attr-defined]
    ids = torch.tensor(TOKENIZER(OTHER).input_ids)[None, :40]
    values = plan.to_dict() | {"replace": {path: [1, 2]}, "keep": []}
    partly = HybridPlan.from_dict(values, plan.parameters)
    kept: list[tuple[AttentionCall, Tensor]] = []

    def keep(call: AttentionCall) -> Any:
        result = call.run(call.mask)
        kept.append((call, result[0]))
        return result

    whole = logits_of(model, ids)
    with replace_attention(model, {path: keep}):
        torch.testing.assert_close(logits_of(model, ids), whole)
    found: list[Tensor] = []
    module = model.get_submodule(path)
    for one in (plan, partly):
        hook = module.register_forward_hook(lambda *given: found.append(given[-1]))
        with one.applied(model):
            assert not torch.allclose(logits_of(model, ids), whole, atol=1e-5)
        hook.remove()
    assert state_of(model) == before
    ((call, output),) = kept
    expected = stepped(layer, call, 4, 1).transpose(0, 1)[None].to(output.dtype)
    mixed = output.clone()
    mixed[:, :, 1:3] = expected[:, :, 1:3]
    for joined, result in zip((expected, mixed), found, strict=True):
        with torch.no_grad():
            if kind == "gramian":
                y = module.merge(joined.transpose(1, 2))
            elif kind == "gpt2":
                y = module.c_proj(joined.flatten(2))
            elif kind == "llama":
                y = module.o_proj(joined.flatten(2))
            else:
                continue  # its output has a gate
        first = result[0] if isinstance(result, tuple) else result
        torch.testing.assert_close(first, y, rtol=1e-3, atol=1e-4)


def test_a_recurrence_beside_a_window_over_all_tokens_is_the_attention() -> None:
    model = make("llama")
    plan = plan_of(model, replace=3, window=20, length=24, fit_steps=1)
    ids = torch.tensor(TOKENIZER(OTHER).input_ids)[None, :20]
    with plan.applied(model):
        torch.testing.assert_close(logits_of(model, ids), logits_of(model, ids))
        inside = logits_of(model, ids)
    torch.testing.assert_close(inside, logits_of(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["window", "recurrence"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count_as_time(kind: str, side: str) -> None:
    model = make("llama")
    plan = plan_of(model, replace=3, kind=kind)
    rows = [torch.tensor(TOKENIZER(OTHER).input_ids)[a : a + n] for a, n in ((0, 30), (9, 18))]
    batch, mask = torch.zeros(2, 30, dtype=torch.long), torch.zeros(2, 30, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(30 - len(row), None) if side == "left" else slice(len(row))
        batch[number, place], mask[number, place] = row, 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with plan.applied(model), torch.no_grad():
        padded = model(batch, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for number, row in enumerate(rows):
            expected = logits_of(model, row[None])[0]
            real = padded[number][mask[number] == 1]
            torch.testing.assert_close(real, expected, rtol=1e-4, atol=1e-4)
    if kind == "recurrence":
        mask[0, 10] = 0
        with plan.applied(model), pytest.raises(ValueError, match="padding between its real"):
            logits_of(model, batch, mask)


def test_fits_reduce_the_error_and_follow_the_seed() -> None:
    model = model_of("llama", **(SIZE | GROUPED | {"num_hidden_layers": 2}))
    options: dict[str, Any] = {"length": 48, "sequences": 1}
    start = plan_of(model, **options, fit_steps=0)
    fitted = plan_of(model, **options, fit_steps=30)
    again = plan_of(model, **options, fit_steps=30)
    other = plan_of(model, **options, fit_steps=2, seed=1)
    for a, b, c, d in zip(start.layers, fitted.layers, again.layers, other.layers, strict=True):
        assert b.score("recurrence", 0, "layer", 0) < 0.96 * a.score("recurrence", 0, "layer", 0)
        assert b.recurrence_errors == c.recurrence_errors != d.recurrence_errors
    assert fitted.criterion == "recurrence"
    values = [value for *_, value in fitted.scores()]
    assert values == sorted(values)
    before, after = fitted.choose(2).cache_bytes(1000)
    states = 2 * 2 * 3 * (8 + 1) * 4
    assert after == before // 1000 * 5 + states


def test_errors_are_those_of_outputs_on_the_sequences_that_were_kept() -> None:
    model = make("llama")
    plan = plan_of(model, fit_sequences=4)
    ids = torch.tensor(TOKENIZER(TEXT).input_ids)
    windows = ids[: len(ids) // 24 * 24].reshape(-1, 24)
    row = windows[[i * len(windows) // 4 for i in range(4)]][-1:]
    path = plan.layers[0].name
    outputs: list[Tensor] = []

    def keep(call: AttentionCall) -> Any:
        result = call.run(call.mask)
        local = local_part(call, 4, 1)
        layer = plan.replacement.layer(path)  # type: ignore[attr-defined]
        stored = stored_tokens(call, 1)
        y = layer.read(call.query, call.key, call.value, local, stored, 4)
        outputs.extend([result[0][0].transpose(0, 1), y[0]])
        return result

    with replace_attention(model, {path: keep}):
        logits_of(model, row)
    whole, y = outputs
    norm = torch.linalg.matrix_norm
    error = norm(y - whole) / norm(whole)
    found = torch.tensor(plan.layers[0].recurrence_errors)
    torch.testing.assert_close(found, error, rtol=1e-3, atol=1e-5)


def test_losses_and_trials_are_those_of_the_recurrences(tmp_path: Path) -> None:
    model = make("llama")
    plan = plan_of(model, criterion="loss", sequences=2)
    assert "The losses are means over 46 tokens" in str(plan)
    path = plan.save(tmp_path / "plan.yaml")
    read = HybridPlan.load(path)
    assert read == plan and read.parameters.keys() == plan.parameters.keys()
    for name, tensor in plan.parameters.items():
        torch.testing.assert_close(read.parameters[name], tensor, rtol=0, atol=0)
    trial = hybrids.try_hybrid(model, read, OTHER, TOKENIZER, seeds=1, sequences=3)
    assert "have a recurrence of 3 states beside the last 4 tokens and the first 1" in str(trial)
    assert (trial.kind, trial.state) == ("recurrence", 3)
    assert HybridTrial.from_dict(trial.to_dict()) == trial
    old = {k: v for k, v in trial.to_dict().items() if k not in ("kind", "state")}
    assert HybridTrial.from_dict(old).kind == "window"
    ids = torch.tensor(TOKENIZER(OTHER).input_ids)
    windows = ids[: len(ids) // 24 * 24].reshape(-1, 24)
    rows = windows[[i * len(windows) // 3 for i in range(3)]]

    def loss() -> float:
        logits = logits_of(model, rows)[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))

    with read.applied(model):
        assert trial.choices[0].loss == pytest.approx(loss(), rel=1e-5)
    with window_attention(model, plan.replaced, 4, 1):
        assert trial.choices[0].loss != pytest.approx(loss(), rel=1e-5)


def test_plans_without_their_parameters_are_refused(tmp_path: Path) -> None:
    model = make("llama")
    plan = plan_of(model)
    path = plan.save(tmp_path / "plan.yaml")
    beside = tmp_path / "plan.safetensors"
    values = plan.to_dict()
    (name,) = plan.replaced

    def message(call: Any) -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared)
            call()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def apply(one: HybridPlan) -> None:
        with one.applied(model):
            pass

    with pytest.raises(ValueError, match=f"no fitted recurrence of {name}; load a plan by"):
        apply(HybridPlan.from_dict(values))
    wrong = plan.parameters | {f"{name}/decay": torch.ones(2, 5)}  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"decay of .* must have the shape \(2, 3\); got \(2, 5\)"):
        apply(dataclasses.replace(plan, parameters=wrong))
    with pytest.raises(ValueError, match=r"not \.safetensors; got"):
        plan.save(beside.with_name("other.safetensors"))
    path.write_text(yaml.safe_dump(values | {"window": 5}))
    assert "fitted beside a window of 4 tokens and the first 1; got 5 and 1" in message(
        lambda: HybridPlan.load(path)
    )
    path.write_text(yaml.safe_dump(values | {"kind": "recurrent"}))
    assert "unknown kind of replacement 'recurrent'. Did you mean" in message(
        lambda: HybridPlan.load(path)
    )
    path.write_text(yaml.safe_dump(values))
    beside.write_bytes(b"x")
    assert f"its parameters in {beside} cannot be read" in message(lambda: HybridPlan.load(path))
    beside.unlink()
    assert f"its parameters are missing, which belong into {beside}" in message(
        lambda: HybridPlan.load(path)
    )
    other = make("gpt2")
    rest = dataclasses.replace(plan.choose(1), layers=plan.layers)
    renamed = {
        k.replace(name, "transformer.h.0.attn"): v
        for k, v in plan.parameters.items()
        if k.startswith(name)
    }
    recurrence = Recurrence(rest.window, rest.sinks, rest.state, renamed)
    with (
        pytest.raises(ValueError, match="has 4 heads of 8 features in 4 groups; the recurrences"),
        recurrence.applied(other, {"transformer.h.0.attn": None}),
    ):
        logits_of(other, torch.arange(3, 12)[None])


def test_what_cannot_have_a_recurrence_is_left_or_refused() -> None:
    sliding = model_of("gemma2", **(SIZE | GROUPED), sliding_window=6, query_pre_attn_scalar=8)
    plan = plan_of(
        model_of(
            "gemma2",
            **(SIZE | GROUPED),
            sliding_window=6,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=None,
        )
    )
    assert [layer.name for layer in plan.layers] == ["model.layers.1.self_attn"]
    left = dict(plan.left)
    assert "its mask hides more than the future" in left["model.layers.0.self_attn"]
    sliding.config.attn_logit_softcapping = 1.0
    for layer in sliding.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.1
    with pytest.raises(ValueError, match="no layer can have a recurrence: model"):
        plan_of(sliding)
    model = make("llama")
    for changes, message in (
        ({"fit_sequences": 1}, "fit_sequences must be an integer of at least 2; got 1"),
        ({"fit_steps": -1}, "fit_steps must be an integer of at least 0; got -1"),
        ({"kind": "recurrent"}, "unknown kind of replacement 'recurrent'"),
        ({"kind": "window", "criterion": "recurrence"}, 'needs kind="recurrence"'),
        ({"replace": 0}, "replace must be at least 1 layer or group of heads; got 0"),
        ({"state": 0, "orders": (0,)}, "state must be an integer of at least 1; got 0"),
        ({"state": True}, "state must be an integer of at least 1; got True"),
        ({"orders": (1.5, 3)}, "orders must be an integer of at least 0; got 1.5"),
        ({"state": 900, "orders": (900,)}, "900 states need at least as many tokens beyond the"),
        ({"length": 300, "window": 40}, "the text gives only one"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            plan_of(model, **changes)
        assert "\n" not in str(caught.value)
    assert {"window", "recurrence"} <= set(KINDS)
    assert math.isfinite(plan.layers[0].recurrence_errors[0])  # type: ignore[index]
