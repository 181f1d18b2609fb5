"""Models of transformers are read wholly, whatever their mixers, and compute what they compute."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import gramian

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
LATENT = {
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
}
A, R, C = "attention", "recurrence", "convolution"
MODELS: dict[str, tuple[dict[str, Any], list[tuple[str, str, int]]]] = {
    "llama": (GROUPED, [(A, "attention", 4)] * 2),
    "gpt2": ({}, [(A, "attention", 4)] * 2),
    "bloom": ({"n_head": 4}, [(A, "general", 4)] * 2),
    "gptj": ({"n_head": 4, "rotary_dim": 4}, [(A, "general", 4)] * 2),
    "falcon": ({"alibi": True}, [(A, "general", 4)] * 2),
    "mpt": ({"n_heads": 4, "d_model": 32, "n_layers": 2}, [(A, "general", 4)] * 2),
    "diffllama": ({"num_key_value_heads": 2}, [(R, "general", 2)] * 2),
    "granite_swa": (GROUPED | {"sliding_window": 6}, [(A, "attention", 4)] * 2),
    "gemma3_text": (GROUPED | {"sliding_window": 6}, [(A, "attention", 4)] * 2),
    "gemma4_text": (
        GROUPED
        | {
            "global_head_dim": 8,
            "num_global_key_value_heads": 2,
            "num_kv_shared_layers": 1,
            "layer_types": ["full_attention", "full_attention"],
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 64,
        },
        [(A, "attention", 4)] * 2,
    ),
    "deepseek_v32": (
        LATENT | {"index_topk": 8, "index_head_dim": 8, "index_n_heads": 2},
        [(A, "attention", 4)] * 2,
    ),
    "lfm2": (
        {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
        [(C, "general", 32), (A, "attention", 4)],
    ),
    "minimax": (
        GROUPED
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "block_size": 8,
        },
        [(R, "general", 4), (A, "attention", 4)],
    ),
    "recurrent_gemma": (
        {
            "lru_width": 32,
            "head_dim": 8,
            "num_key_value_heads": 1,
            "block_types": ["recurrent", "attention"],
        },
        [(C, "general", 32), (R, "scan", 32), (A, "attention", 4)],
    ),
    "rwkv": (
        {"attention_hidden_size": 32, "context_length": 64},
        [(C, "general", 1), (R, "scan", 32), (C, "general", 1)] * 2,
    ),
}


def model_of(kind: str) -> Any:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SMALL | MODELS[kind][0]))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.randn(weight.shape) * weight.shape[-1] ** -0.5)
    return model


def layer_outputs(model: Any, run: Any, length: int) -> list[Tensor]:
    """What the layers of a model return for a sequence of a length, in the order of their runs."""
    results: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if first.shape[1] == length:
            results.append(first.clone())

    layers = [m for name, m in model.named_modules() if re.search(r"(layers|h|blocks)\.\d+$", name)]
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return results


@pytest.mark.parametrize("kind", MODELS)
def test_models_are_read_wholly_and_compute_the_same(kind: str) -> None:
    model, length = model_of(kind), 30
    ids = torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(1))
    implementation = model.config._attn_implementation
    own = {name: dict(module.__dict__) for name, module in model.named_modules()}
    place = dict(vars(__import__(type(model).__module__, fromlist=[""])))
    reports: list[Any] = []

    def analyze() -> None:
        reports.append(gramian.analyze(model, ids, every=7))

    during = layer_outputs(model, analyze, length)
    assert model.config._attn_implementation == implementation
    assert vars(__import__(type(model).__module__, fromlist=[""])) == place
    for name, module in model.named_modules():
        assert module.__dict__.keys() == own[name].keys()
    (report,) = reports
    assert not report.unread
    found = [(layer.kind, layer.reader, layer.count) for layer in report.layers]
    # Later versions of transformers give more types attention through its interface.
    readers = {A: "attention"} if model._supports_attention_backend else {}
    assert found == [(one, readers.get(one, reader), n) for one, reader, n in MODELS[kind][1]]
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    plain = layer_outputs(model, lambda: model(ids, use_cache=False), length)
    assert len(during) == len(plain) == 2
    assert all(torch.equal(one, other) for one, other in zip(during, plain, strict=True))


@pytest.mark.parametrize("kind", ["llama", "bloom", "gptj", "lfm2", "diffllama"])
def test_models_in_half_precision_are_read_in_single(kind: str) -> None:
    model = model_of(kind)
    ids = torch.randint(3, 64, (1, 30), generator=torch.Generator().manual_seed(1))
    single = gramian.analyze(model, ids, every=7)
    half = gramian.analyze(model.to(torch.bfloat16), ids, every=7)
    assert not half.unread
    for one, other in zip(half.layers, single.layers, strict=True):
        assert (one.kind, one.reader, one.count) == (other.kind, other.reader, other.count)
    # the first layer sees the same hidden states up to their rounding
    torch.testing.assert_close(half.layers[0].ess, single.layers[0].ess, rtol=0.05, atol=0.05)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("length", [1, 2, 3, 100])
def test_texts_of_any_length(length: int) -> None:
    model = model_of("lfm2")
    report = gramian.analyze(model, torch.arange(3, 3 + length) % 60)
    assert [layer.kind for layer in report.layers] == [C, A] and not report.unread
    assert report.layers[0].ess.shape == (32, length)
