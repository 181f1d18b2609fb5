"""Provide the configurations of the published Evo 2 models, which are not beside the weights.

The names of the models and the sizes are those in the configuration files of the package evo2.
"""

from __future__ import annotations

from typing import Any

__all__ = ["PUBLISHED", "published_config"]

_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "state_size": 16,
    "short_filter_length": 3,
    "short_filter_bias": False,
    "hcs_filter_length": 7,
    "hcm_filter_length": 128,
    "eps": 1e-6,
    "proj_groups": 1,
    "inner_size_multiple_of": 16,
    "interleave": True,
    "column_split": True,
    "column_split_hyena": False,
    "hyena_flip_x1x2": False,
    "evo2_style_activations": True,
    "mlp_activation": "gelu",
    "tie_embeddings": True,
    "final_norm": True,
    "mha_out_proj_bias": True,
    "hyena_out_proj_bias": True,
    "qkv_proj_bias": False,
    "use_flash_rmsnorm": False,
    "use_fp8_input_projections": True,
}


def _size(
    width: int,
    inner: int,
    groups: int,
    layers: int,
    attention: list[int],
    length: int,
    factor: int = 1,
    base: int = 10_000,
) -> dict[str, Any]:
    """Return the configuration of a model with the given sizes.

    In the blocks without attention, short, medium and long operators follow each other in this
    order. Heads are 128 wide.
    """
    others = [layer for layer in range(layers) if layer not in attention]
    rotation: dict[str, Any] = {"rotary_emb_base": base}
    if factor > 1:
        rotation |= {"use_interpolated_rotary_pos_emb": True, "rotary_emb_scaling_factor": factor}
    return {
        **_COMMON,
        **rotation,
        "hidden_size": width,
        "num_layers": layers,
        "num_attention_heads": width // 128,
        "inner_mlp_size": inner,
        "hcs_filter_groups": groups,
        "hcm_filter_groups": groups,
        "attn_layer_idxs": attention,
        "hcs_layer_idxs": others[0::3],
        "hcm_layer_idxs": others[1::3],
        "hcl_layer_idxs": others[2::3],
        "max_seqlen": length,
    }


_ATTENTION = [3, 10, 17, 24, 31, 35, 42, 49]

PUBLISHED: dict[str, dict[str, Any]] = {
    "evo2_1b_base": _size(1920, 5120, 128, 25, _ATTENTION[:4], 8192),
    "evo2_7b": _size(4096, 11264, 256, 32, _ATTENTION[:5], 1_048_576, 128),
    "evo2_7b_base": _size(4096, 11008, 256, 32, _ATTENTION[:5], 32_768),
    "evo2_7b_262k": _size(4096, 11008, 256, 32, _ATTENTION[:5], 262_144, 32),
    "evo2_7b_microviridae": _size(4096, 11008, 256, 32, _ATTENTION[:5], 32_768),
    "evo2_20b": _size(8192, 22528, 512, 24, _ATTENTION[:3], 1_048_576, 128, 1_000_000),
    "evo2_40b": _size(8192, 22528, 512, 50, _ATTENTION, 1_048_576, 128, 1_000_000),
    "evo2_40b_base": _size(8192, 21888, 512, 50, _ATTENTION, 8192, 1, 1_000_000),
}
"""The configurations of Evo 2 models by their names in the package evo2."""


def published_config(name: str) -> dict[str, Any] | None:
    """Return the configuration of a published model, or None if the name is unknown."""
    found = PUBLISHED.get(name)
    return None if found is None else dict(found)
