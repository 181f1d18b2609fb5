"""Language models of linear recurrences: train, save, load, generate, and pass the check."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import gramian
from gramian.mixers import MIXERS
from gramian.models import GramianConfig, GramianForCausalLM

MakeModel = Callable[..., GramianForCausalLM]
MakeTokens = Callable[[int, int], torch.Tensor]
LINEAR_RECURRENCES = [name for name, kind in MIXERS.items() if kind.family == "recurrence"]

every = pytest.mark.parametrize("name", LINEAR_RECURRENCES)


def options(name: str) -> dict[str, Any]:
    return {"mixers": name, "linear_recurrence": {"state_size": 5}}


@every
def test_it_learns(make_model: MakeModel, make_tokens: MakeTokens, name: str) -> None:
    model, tokens = make_model(**options(name)).train(), make_tokens(2, 20)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every
@torch.no_grad()
def test_it_is_saved_and_loaded(
    make_model: MakeModel, make_tokens: MakeTokens, tmp_path: Path, name: str
) -> None:
    model, tokens = make_model(**options(name)), make_tokens(2, 20)
    model.save_pretrained(tmp_path)
    again = GramianForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert again.config.linear_recurrence == {"state_size": 5}
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    half = GramianForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for parameter_name, parameter in half.named_parameters():
        kept = ".dynamics." in parameter_name
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), parameter_name


@torch.no_grad()
def test_what_is_missing_is_drawn_and_what_is_there_is_kept(
    make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model(mixers=["s6", "gated_delta_net"]).float()
    for name, parameter in model.named_parameters():
        if ".dynamics." in name:
            parameter.fill_(0.125)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mixer.dynamics.A_log"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    read = GramianForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in weights.items():
        assert torch.equal(read[name], tensor), name
    rates = read["model.layers.0.mixer.dynamics.A_log"].exp()
    assert_close(rates, torch.arange(1.0, 17.0).expand(24, -1))


@every
@torch.no_grad()
def test_it_generates_what_the_parallel_pass_says(
    make_model: MakeModel, make_tokens: MakeTokens, name: str
) -> None:
    model, tokens = make_model(**options(name)), make_tokens(3, 9)
    written = model.generate(tokens, max_new_tokens=12, do_sample=False)
    sequence = tokens
    for _ in range(12):
        best = model(sequence, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        sequence = torch.cat([sequence, best], 1)
    assert torch.equal(written, sequence)
    mask = torch.ones(3, 13, dtype=torch.long)
    mask[:, :4] = 0
    padded = torch.cat([make_tokens(3, 4), tokens], 1)
    again = model.generate(padded, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(again[:, 4:], written)
    outputs = model(tokens)
    assert outputs.past_key_values.nbytes == model.state_bytes(3) == model.state_bytes(3, 1000)


@every
def test_it_passes_the_check(make_config: Callable[..., GramianConfig], name: str) -> None:
    torch.manual_seed(0)
    config = make_config(initializer_range=0.3, num_hidden_layers=1, **options(name))
    report = gramian.check(GramianForCausalLM(config), length=41)
    assert report.passed, str(report)


@every
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_steps_compile(
    make_model: MakeModel, make_tokens: MakeTokens, name: str, backend: str
) -> None:
    model, tokens = make_model(num_hidden_layers=1, **options(name)), make_tokens(2, 6)
    expected = model(tokens, use_cache=False).logits
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "steps run uncompiled")
        model.compile_decoding(backend=backend)
        cache, made = None, []
        for token in tokens.split(1, 1):
            outputs = model(token, past_key_values=cache)
            cache = outputs.past_key_values
            made.append(outputs.logits)
    assert_close(torch.cat(made, 1), expected)
    steps = [block.mixer.compiled_step for block in model.model.layers]
    assert all(step is not None and step._compiled is not None for step in steps)


def test_a_hybrid_takes_the_options_that_each_layer_has(make_model: MakeModel) -> None:
    model = make_model(
        mixers=["s6", "gated_linear_attention"],
        linear_recurrence={"expand": 1, "state_size": 4, "temperature": 2.0, "gate_rank": 3},
    )
    scan, attention = (block.mixer for block in model.model.layers)
    assert (scan.heads, scan.state_size) == (12, 4)
    assert (attention.gate_features, attention.dynamics.temperature) == (3, 2.0)
    assert scan.short.taps == attention.short.taps == model.config.short_kernel


def test_initial_dynamics_are_those_of_the_mixer(make_model: MakeModel) -> None:
    scan, delta = (
        block.mixer for block in make_model(mixers=["s6", "gated_delta_net"]).model.layers
    )
    rates = torch.arange(1.0, 17.0, dtype=torch.float64)
    assert_close(scan.dynamics.A_log.exp(), rates.expand(24, -1), rtol=1e-6, atol=1e-6)
    for mixer in (scan, delta):
        steps = torch.nn.functional.softplus(mixer.dynamics.dt_bias)
        assert ((steps > 0.9e-3) & (steps < 1.1e-1)).all() and steps.std() > 0


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (
            {"mixers": "s6", "linear_recurrence": {"temperature": 2.0}},
            "linear_recurrence 'temperature'",
        ),
        ({"mixers": "gla_s6", "linear_recurrence": "n"}, "linear_recurrence must be a dict"),
        ({"linear_recurrence": {"short_kernel": 2}}, "linear_recurrence 'short_kernel'"),
        ({"mixers": "linear_attention", "num_heads": 7}, "num_heads must divide hidden_size"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        GramianConfig(**given)
    GramianConfig(mixers="s6", num_heads=7)
