"""Readings predict what the scans in models of transformers return, for the models' own values and
for random ones.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gramian.analysis._scans import SCANS, places, read

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 6, "mamba_n_groups": 2}
EXPERTS = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
DELTA = {
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "layer_types": ["linear_attention", "full_attention"],
}
KIMI = {
    "num_key_value_heads": 4,
    "num_experts": 2,
    "num_experts_per_token": 1,
    "num_shared_experts": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "linear_head_dim": 6,
    "linear_num_heads": 3,
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
}
ZAMBA = {
    "num_key_value_heads": 4,
    "mamba_d_state": 5,
    "num_hidden_layers": 3,
    "layers_block_type": ["mamba", "hybrid", "hybrid"],
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba_selective_scan", {"state_size": 5}),
    "falcon_mamba": ("mamba_selective_scan", {"state_size": 5}),
    "jamba": (
        "mamba_selective_scan",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 5,
            "mamba_dt_rank": 4,
            "num_experts": 2,
        },
    ),
    "zamba": ("mamba_selective_scan", ZAMBA | {"mamba_dt_rank": 4, "n_mamba_heads": 2}),
    "mamba2": (
        "mamba2_chunk_scan",
        {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 6, "chunk_size": 16},
    ),
    "bamba": ("mamba2_chunk_scan", MAMBA2 | {"attn_layer_indices": [1], "mamba_chunk_size": 16}),
    "falcon_h1": (
        "mamba2_chunk_scan",
        MAMBA2 | {"head_dim": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 16},
    ),
    "granitemoehybrid": (
        "mamba2_chunk_scan",
        MAMBA2
        | {
            "mamba_chunk_size": 16,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "shared_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "nemotron_h": (
        "mamba2_chunk_scan",
        {
            "head_dim": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 6,
            "n_groups": 2,
            "chunk_size": 16,
            "layers_block_type": ["mamba", "attention"],
        },
    ),
    "zamba2": (
        "mamba2_chunk_scan",
        ZAMBA
        | {
            "mamba_ngroups": 2,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "num_mem_blocks": 1,
            "chunk_size": 16,
        },
    ),
    "qwen3_next": ("torch_chunk_gated_delta_rule", DELTA | EXPERTS),
    "qwen3_5_text": ("torch_chunk_gated_delta_rule", DELTA),
    "qwen3_5_moe_text": ("torch_chunk_gated_delta_rule", DELTA | EXPERTS),
    "olmo_hybrid": ("torch_chunk_gated_delta_rule", DELTA),
    "kimi_linear": ("chunk_kimi_delta_attention", KIMI),
    "bailing_hybrid": ("chunk_kimi_delta_attention", KIMI | {"short_conv_kernel_size": 4}),
    "recurrent_gemma": (
        "_rnn_scan",
        {
            "lru_width": 32,
            "head_dim": 8,
            "num_key_value_heads": 1,
            "block_types": ["recurrent", "attention"],
        },
    ),
    "rwkv": ("rwkv_linear_attention", {"attention_hidden_size": 32, "context_length": 64}),
    "xlstm": ("_inference_fn", {"num_heads": 4, "qk_dim_factor": 0.5, "chunk_size": 8}),
}
VALUES = {"hidden_states", "value", "v", "u", "x"}  # names of the values in signatures
IDS = torch.randint(3, 64, (1, 37), generator=torch.Generator().manual_seed(1))


def calls_of(kind: str, changes: dict[str, Any]) -> list[tuple[str, Any, list[Any], Any, Any]]:
    """The calls of scans in a small model: name, scan, arguments and result."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(COMMON | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    calls: list[tuple[str, Any, list[Any], Any, Any]] = []

    def spy(name: str, scan: Any, *args: Any, **kwargs: Any) -> Any:
        result = scan(*args, **kwargs)
        calls.append((name, scan, list(args), kwargs, result))
        return result

    found = {place.key: place for module in model.modules() for place in places(module)}
    with ExitStack() as stack, torch.no_grad():
        for place in found.values():
            stack.enter_context(place.holding(partial(spy, place.name, place.function)))
        logits = model(IDS, use_cache=False).logits
    assert torch.equal(model(IDS, use_cache=False).logits, logits)
    return calls


def values_of(name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Where a scan's values are in its arguments, which is a list or a mapping, and the key."""
    names = list(inspect.signature(SCANS[name]).parameters)
    (key,) = VALUES & set(names)
    return (kwargs, key) if key in kwargs else (args, names.index(key))


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_scans_of_models(kind: str) -> None:
    expected, changes = MODELS[kind]
    calls = calls_of(kind, changes)
    assert {name for name, *_ in calls} == {expected}
    for name, scan, args, kwargs, result in calls:
        reading = read(name, args, kwargs, scan)
        assert reading.values.shape[2] == IDS.shape[1]
        assert reading.disagreement(result) < 1e-5
        held, key = values_of(name, args, kwargs)
        held[key] = torch.randn_like(held[key])
        other = read(name, args, kwargs, scan)
        assert other.disagreement(scan(*args, **kwargs)) < 1e-5
        every = slice(0, reading.count)
        assert torch.equal(reading.system(every).matrix(), other.system(every).matrix())
