"""Compiled decoding and packed weights: the same numbers, and a clean way back."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import CompileConfig

from gramian.mixers._compiled import CompiledStep
from gramian.models import GramianForCausalLM
from gramian.ops.packed import can_pack

MakeModel = Callable[..., GramianForCausalLM]
MakeTokens = Callable[[int, int], torch.Tensor]

RAGGED = {"type": "modal", "orders": [2, 2, 9, 1, 2, 2, 2, 2, 3, 2, 2, 2]}


def broken(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no compiler here")


@torch.no_grad()
def steps(model: GramianForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt of four tokens and of a step for every other one."""
    outputs = model(tokens[:, :4], use_cache=True)
    logits = [outputs.logits]
    for t in range(4, tokens.shape[1]):
        logits.append(model(tokens[:, t : t + 1], past_key_values=outputs.past_key_values).logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("filter_config", [RAGGED, {"type": "rtf", "state_size": 3}])
@pytest.mark.parametrize("mixers", ["hyena", "long_convolution"])
def test_compiled_equals_eager(
    make_model: MakeModel,
    make_tokens: MakeTokens,
    mixers: str,
    filter_config: dict[str, Any],
    backend: str,
) -> None:
    if filter_config["type"] == "rtf":
        filter_config = {**filter_config, "initialization": "montel"}
    model = make_model(mixers=mixers, filter=filter_config).float()
    tokens = make_tokens(2, 9)
    expected = steps(model, tokens)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "steps run uncompiled")
        model.compile_decoding(backend=backend)
        assert_close(steps(model, tokens), expected, rtol=1e-4, atol=1e-4)
        assert_close(steps(model, tokens[:1]), expected[:1], rtol=1e-4, atol=1e-4)
    compiled = [block.mixer.compiled_step for block in model.model.layers]
    assert all(step is not None and step._compiled is not None for step in compiled)
    model.compile_decoding(False)
    assert_close(steps(model, tokens), expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_heads(make_model: MakeModel, make_tokens: MakeTokens, backend: str) -> None:
    filter_config = {"type": "modal", "orders": [1, 8, 2]}
    model = make_model(mixers="multi_hyena", filter=filter_config).float()
    tokens = make_tokens(2, 9)
    expected = steps(model, tokens)
    model.compile_decoding(backend=backend)
    assert_close(steps(model, tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "mixers", [["softmax_attention", "hyena"], ["multi_hyena", "long_convolution"]]
)
def test_what_cannot_be_compiled_runs_as_it_is(
    make_model: MakeModel, make_tokens: MakeTokens, mixers: list[str], backend: str
) -> None:
    """Attention and online convolution, in single precision with packed weights."""
    model, tokens = make_model(mixers=mixers).float(), make_tokens(2, 9)
    expected = steps(model, tokens)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "steps run uncompiled")
        model.compile_decoding(backend=backend)
        assert_close(steps(model, tokens), expected, rtol=1e-4, atol=1e-4)


def test_a_compiler_that_fails_is_reported_once_and_does_no_harm(
    make_model: MakeModel, make_tokens: MakeTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = make_model(mixers="hyena", filter=RAGGED).float(), make_tokens(2, 9)
    expected = steps(model, tokens)
    monkeypatch.setattr(CompiledStep, "_warned", False)
    model.compile_decoding(backend=broken)
    with pytest.warns(RuntimeWarning, match="steps run uncompiled, as compiling failed") as caught:
        got = steps(model, tokens)
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_generate_takes_a_compile_config(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    model, tokens = make_model(mixers="hyena", filter=RAGGED).float(), make_tokens(2, 9)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(tokens, **settings)
    config = CompileConfig(backend="eager", mode=None)
    assert torch.equal(model.generate(tokens, compile_config=config, **settings), expected)
    compiled = model.model.layers[0].mixer.compiled_step
    assert compiled is not None and compiled._compiled is not None
    beams = model.generate(tokens, num_beams=3, **settings)
    model.compile_decoding(False)
    assert torch.equal(model.generate(tokens, num_beams=3, **settings), beams)


def add_to_data(parameter: torch.nn.Parameter) -> None:
    parameter.data += 0.1 * torch.randn_like(parameter)


def step_fused(parameter: torch.nn.Parameter) -> None:
    parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW([parameter], lr=0.1, fused=True).step()


def set_one_value(parameter: torch.nn.Parameter) -> None:
    parameter.detach().numpy()[3, -1] = 4


@pytest.mark.each
@pytest.mark.skipif(not can_pack(), reason="needs oneDNN")
@pytest.mark.parametrize("edit", [add_to_data, step_fused, set_one_value])
@pytest.mark.parametrize(
    "mixers", ["hyena", "multi_hyena", "softmax_attention", "gated_delta_net", "s6"]
)
def test_copies_follow_the_weights(
    make_model: MakeModel, make_tokens: MakeTokens, mixers: str, edit: Callable[[Any], None]
) -> None:
    """Whatever optimisers, adapters and scripts write into the weights, and wherever it is seen."""
    options = {"filter": {"type": "modal", "orders": 2}, "tie_word_embeddings": mixers == "s6"}
    model, tokens = make_model(mixers=mixers, **options).float(), make_tokens(2, 9)
    model.compile_decoding(backend="eager")
    before = steps(model, tokens)
    packing = model.packing
    assert packing is not None and len(packing) > 6  # all projections, MLPs and the head
    for name, parameter in model.named_parameters():
        if name.endswith(("proj.weight", "lm_head.weight", "embed_tokens.weight")):
            edit(parameter)
    found, whole = steps(model, tokens), model(tokens).logits
    model.compile_decoding(False)
    expected = steps(model, tokens)
    assert (expected - before).abs().max() > 1e-2
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(whole, model(tokens).logits)  # without a cache nothing is packed


@pytest.mark.skipif(not can_pack(), reason="needs oneDNN")
@torch.no_grad()
def test_training_drops_the_copies_and_no_copy_of_the_model_has_them(
    make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    model, tokens = make_model(mixers="hyena", filter=RAGGED).float(), make_tokens(1, 6)
    model.compile_decoding(backend="eager")
    expected = steps(model, tokens)
    packing = model.packing
    assert packing is not None and packing is model.model.packing
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.packing is other.model.packing is not packing
        assert len(other.packing) == 0
        assert torch.equal(steps(other, tokens), expected)
    assert len(packing) > 0
    model.eval()
    assert len(packing) > 0
    model.train()
    assert len(packing) == 0
    model.eval()
    steps(model, tokens)
    model.half()
    with torch.autocast("cpu", enabled=False):
        half = steps(model, tokens)
    assert half.dtype == torch.float16
    assert_close(half.float(), expected, rtol=0.1, atol=0.1)
