"""Build a small random model of every causal architecture that transformers knows.

`small_model` takes the default configuration of a model type, replaces every size by a small one,
keeps one layer of each kind, and fills the weights so that mixers do something: maps of attention
are far from uniform, biases are not zero, and short convolutions carry weight. Nothing is loaded.

Sizes are replaced by the names of their fields (`_SIZES`). `_CHANGES` has the fields of model types
whose sizes depend on each other in a way of their own, and `_UNBUILT` the types that cannot be
built, with the reason. Vision towers that the package timm builds are left out (`_TOWERS`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

__all__ = [
    "LENGTH",
    "CannotBuild",
    "causal_types",
    "lengths",
    "model_class",
    "small_config",
    "small_model",
    "tokens",
]

VOCABULARY = 128
LENGTH = 23  # a prime number that is no size of a small model, so that such an axis is time

_BY_SIZE: dict[int, str] = {
    128: "vocab_size vocab_size_per_layer_input decoder_vocab_size audio_vocab_size",
    64: "d_inner attention_hidden_size max_position_embeddings n_positions n_ctx max_seq_len "
    "max_sequence_length model_max_length rel_extent max_target_positions context_length "
    "pronunciation_vocab_size shape_vocab_size",
    48: "intermediate_size ffn_dim d_ff n_inner dff dim_ff decoder_ffn_dim encoder_ffn_dim "
    "ffn_hidden_size feed_forward_size intermediate_size_mlp dense_intermediate_size "
    "prefix_dense_intermediate_size block_ff_dim mlp_dim",
    32: "hidden_size d_model n_embd emb_dim dim embedding_dim embedding_size input_embedding_size "
    "output_embedding_size word_embed_proj_dim block_dim lru_width out_hidden_size conv_dim "
    "projector_input_dim projector_output_dim backbone_hidden_size position_bias_max_distance "
    "vector_quantization_hidden_dimension",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size "
    "chunk_size mamba_chunk_size router_hidden_size attention_head_dim adapter_rank "
    "position_bias_num_buckets dim_model_base",
    12: "q_lora_rank kv_lora_rank hc_lowrank",
    8: "head_dim dim_head attention_head_size d_head d_kv global_head_dim swa_head_dim kv_channels "
    "v_head_dim swa_v_head_dim qk_nope_head_dim index_head_dim indexer_head_dim "
    "linear_head_dim hidden_size_per_layer_input mamba_d_head mamba_head_dim mamba_headdim "
    "attention_chunk_size index_topk mamba_n_heads n_mamba_heads mamba_num_heads "
    "pronunciation_embed_dim shape_embed_dim block_multiple_of d_rel",
    6: "sliding_window attention_window local_attention attention_window_size window_size "
    "sliding_window_size linear_key_head_dim keep_window_size",
    5: "state_size mamba_d_state ssm_state_size linear_value_head_dim",
    4: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
    "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads "
    "swa_num_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts "
    "mamba_dt_rank time_step_rank qk_rope_head_dim linear_num_value_heads linear_num_heads "
    "laurel_rank gated_norm_rank num_centroids rotary_dim prompt_length",
    2: "num_key_value_heads num_kv_heads kv_n_heads num_global_key_value_heads num_query_groups "
    "swa_num_key_value_heads num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k "
    "linear_num_key_heads index_n_heads indexer_n_heads decoder_layers encoder_layers n_layer "
    "n_layers num_layers num_decoder_layers num_encoder_layers num_blocks depth "
    "num_layers_per_stack num_global_layers type_vocab_size "
    "num_codebooks n_groups centroid_intermediate_top_k",
    1: "n_group topk_group num_expert_group num_expert_groups n_shared_experts num_shared_experts "
    "moe_num_shared_experts indexer_kv_heads first_k_dense_replace mamba_n_groups mamba_ngroups",
}
_SIZES: dict[str, int] = {name: size for size, names in _BY_SIZE.items() for name in names.split()}
_IDENTIFIERS: dict[str, int] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "decoder_start_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "cls_token_id": 1,
}
_UNSET = {"num_key_value_heads", "head_dim"}  # sizes that are given even where they are None

_LATENT: dict[str, Any] = {"head_dim": 4, "num_key_value_heads": 4}  # keys and values of one rank
_SHARED: dict[str, Any] = {  # the upper layers read keys and values of the lower ones
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_HYBRID: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layers_block_type": ["mamba", "hybrid", "hybrid"],
    "num_key_value_heads": 4,
    "attention_hidden_size": 64,
}
_ONE_LANGUAGE: dict[str, Any] = {"default_language": "en_XX", "languages": ["en_XX"]}
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
_BYTES: dict[str, Any] = {  # a part of a model of bytes
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
_NGRAMS: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "indexed_attention", "indexed_attention"],
    "eos_token_id": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ple_layer_ids": [1],
    "ple_embed_dim": 32,
    "ngram_vocab_size_base": 100,
    "split_ngram_parts": 1,
    "make_ngram_vocab_size_divisible_by": 8,
    "heads_per_ngram": 2,
}
_NOTE: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "head_dim": 12,
    "num_key_value_heads": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 12,
    "swa_v_head_dim": 8,
    "swa_q_lora_rank": 12,
    "swa_kv_lora_rank": 12,
    "swa_qk_nope_head_dim": 8,
    "swa_qk_rope_head_dim": 4,
}

_CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "blt": {
        "max_position_embeddings": 128,
        "patch_size": 4,
        "patching_threshold": 4.2,
        "encoder_hash_byte_group_size": [2, 3],
        "encoder_hash_byte_group_vocab": 100,
        "patcher_config": {**_BYTES, "vocab_size": VOCABULARY},
        "encoder_config": {**_BYTES, "vocab_size": VOCABULARY, "hidden_size_global": 64},
        "decoder_config": {**_BYTES, "vocab_size": VOCABULARY, "hidden_size_global": 64},
        "global_config": {**_BYTES, "hidden_size": 64, "head_dim": 16},
    },
    "cohere_compass_text": {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 16,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "layer_types": [
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "sliding_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "index_topk": 2,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "sliding_attention"],
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    },
    "dots3_note": _NOTE,
    "dots3_note_text": _NOTE,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        **_SHARED,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {**_SHARED, "global_head_dim": 12},
    "gemma4_unified_text": {"global_head_dim": 12},
    "glm_moe_dsa": {"indexer_types": ["full", "shared"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "hrm_text": {"num_hidden_layers": 8, "H_cycles": 2, "L_cycles": 1, "num_layers_per_stack": 2},
    "hy_v4": {"num_hidden_layers": 2, "indexer_types": ["full", "shared"]},
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "sliding_attention"],
        "num_attention_heads_per_layer": [4, 8],
    },
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {
        "num_hidden_layers": 2,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
    },
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mellum": {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
    "minimax_m3_vl_text": {
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_block_size": 2,
        "index_topk_blocks": 3,
    },
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "attention", "moe", "mamba"],
        "n_groups": 1,
    },
    "qwen4_exp": _NGRAMS,
    "qwen4_exp_text": _NGRAMS,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "num_hidden_layers": 2,
        "local_attn_chunk_length": 6,
        "lsh_attn_chunk_length": 6,
        "num_buckets": 2,
        "num_hashes": 1,
        "hash_seed": 1,
    },
    "rwkv": {"attention_hidden_size": 32},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": _ONE_LANGUAGE,
    "xlstm": {"ffn_round_up_to_multiple_of": 8},
    "zamba": {**_HYBRID, "n_mamba_heads": 2},
    "zamba2": {**_HYBRID, "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}
_ASSISTANT = "it reads the keys and values of a target model, in both directions of time."
_UNBUILT: dict[str, str] = {
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
}
_TOWERS = {"gemma3n_vision"}  # types of parts that timm builds, and that text does not reach


# Lengths that sequences of 23 tokens have inside a model: with a prompt in front, with the streams
# that predict, with padding to whole chunks, or as patches.
_INNER_LENGTHS = {"blt": 9, "cpmant": 27, "prophetnet": 69, "reformer": 24}


class CannotBuild(Exception):
    """A model type cannot be built from text alone; the message says why."""


def causal_types() -> tuple[str, ...]:
    """Return the model types that have a causal language model, in transformers' order."""
    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def model_class(model_type: str) -> type[PreTrainedModel]:
    """Return the class of a model type's causal language model."""
    found: type[PreTrainedModel] = getattr(
        transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    )
    return found


def small_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Return a small configuration of a model type.

    Args:
        model_type: A name of `causal_types`.
        **changes: Fields that replace those of the small configuration.

    Raises:
        CannotBuild: if models of this type cannot be built from text alone.
    """
    if model_type in _UNBUILT:
        raise CannotBuild(_UNBUILT[model_type])
    with _quiet():
        cls = model_class(model_type).config_class or CONFIG_MAPPING[model_type]
        config = _shrunk(cls, {**_CHANGES.get(model_type, {}), **changes})
        if getattr(config, "is_decoder", True) is False and not config.is_encoder_decoder:
            config.is_decoder = True
    return config


def small_model(
    model_type: str, seed: int = 0, config: PreTrainedConfig | None = None
) -> PreTrainedModel:
    """Return a small model in single precision with random weights, in evaluation mode.

    Args:
        model_type: A name of `causal_types`.
        seed: Seed of the weights.
        config: The configuration; by default that of `small_config`.

    Raises:
        CannotBuild: if models of this type cannot be built from text alone.
    """
    config = small_config(model_type) if config is None else config
    torch.manual_seed(seed)
    with _quiet(), _without_towers():
        model = model_class(model_type)(config).to(torch.get_default_dtype()).eval()
    _fill(model, torch.Generator().manual_seed(seed + 1))
    return model


def lengths(model_type: str) -> tuple[int, ...]:
    """Return the lengths that the sequence of `tokens` has in a small model, outside first."""
    inner = _INNER_LENGTHS.get(model_type)
    return (LENGTH,) if inner is None else (LENGTH, inner)


def tokens(length: int = LENGTH, seed: int = 1) -> Tensor:
    """Return random token ids, (length), none of which has a special meaning."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 100, (length,), generator=generator)


def _shrunk(cls: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    """Return the default configuration of a class with small sizes and with some changes."""
    base = cls()
    fields = base.to_dict()
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if name in _IDENTIFIERS and value is not None:
            small[name] = _IDENTIFIERS[name]
        elif name in _SIZES and (_is_size(value) or (value is None and name in _UNSET)):
            small[name] = _SIZES[name]
        elif "dropout" in name and isinstance(value, float):
            small[name] = 0.0
    if "kv_lora_rank" in fields:
        small |= _LATENT
    if "num_hidden_layers" in fields:
        small |= _few_layers(fields)
    for name in base.sub_configs:
        part = getattr(base, name, None)
        if isinstance(part, PreTrainedConfig) and type(part) is not PreTrainedConfig:
            small[name] = _shrunk(type(part), _CHANGES.get(part.model_type, {}))
    for name, value in changes.items():
        if isinstance(small.get(name), PreTrainedConfig) and isinstance(value, dict):
            small[name] = _shrunk(type(small[name]), value)
        else:
            small[name] = value
    return cls(**small)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _few_layers(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of two to four layers, of all kinds that a configuration has."""
    count = fields["num_hidden_layers"]
    lists = {
        name: value
        for name, value in fields.items()
        if isinstance(value, list | tuple) and len(value) == count and count > 2
    }
    kinds = [len(set(map(str, value))) for value in lists.values()]
    few = min(4, max([2, *kinds]))
    return {"num_hidden_layers": few, **{name: _cut(value, few) for name, value in lists.items()}}


def _cut(values: Any, few: int) -> list[Any]:
    """Return the first values of a list, with missing kinds in place of the last repetitions."""
    chosen = list(values[:few])
    for kind in dict.fromkeys(map(str, values)):
        if kind in map(str, chosen):
            continue
        repeated = [i for i in range(few) if chosen.count(chosen[i]) > 1]
        if repeated:
            chosen[repeated[-1]] = next(value for value in values if str(value) == kind)
    return chosen


@torch.no_grad()
def _fill(model: nn.Module, generator: torch.Generator) -> None:
    """Fill the weights so that outputs of layers have about the size of their inputs.

    The models start with weights of standard deviation 0.02, with which small models do nothing:
    maps of attention are uniform, and a mixer adds nothing to the stream beside it.
    """

    def normal(parameter: Tensor, size: float) -> Tensor:
        return size * torch.randn(parameter.shape, generator=generator)

    done: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done or not parameter.is_floating_point():
                continue
            done.add(id(parameter))
            if name == "A_log" and parameter.ndim != 2:
                # Some models start with gates that forget everything within a few tokens.
                rates = torch.rand(parameter.shape, generator=generator)
                parameter.copy_(torch.log(0.05 + 0.5 * rates))
            elif parameter.ndim < 2:
                if parameter.numel() and not bool(parameter.any()):
                    parameter.copy_(normal(parameter, 0.3))
            elif isinstance(module, nn.Embedding):
                parameter.copy_(normal(parameter, 0.5))
            elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | Conv1D):
                inputs = parameter.shape[0] if isinstance(module, Conv1D) else parameter[0].numel()
                parameter.copy_(normal(parameter, 1.2 * inputs**-0.5))
            elif float(parameter.std()) == 0:
                parameter.add_(normal(parameter, 0.5))
            elif float(parameter.std()) < 0.1:
                parameter.copy_(normal(parameter, 1.2 * parameter.shape[-1] ** -0.5))


@contextlib.contextmanager
def _without_towers() -> Iterator[None]:
    """Build models with an empty module in place of their vision towers that timm would build."""
    build = transformers.AutoModel.from_config

    def from_config(config: PreTrainedConfig, **options: Any) -> nn.Module:
        found: nn.Module
        found = nn.Identity() if config.model_type in _TOWERS else build(config, **options)
        return found

    with mock.patch.object(transformers.AutoModel, "from_config", from_config):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from writing about special tokens that a small vocabulary lacks."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
