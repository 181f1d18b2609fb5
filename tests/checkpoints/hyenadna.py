"""HyenaDNA written down from its equations, in plain PyTorch, over tensors with published names.

The long convolution is a sum over all earlier positions; nothing of this package is used.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

CONFIG: dict[str, Any] = {
    "activation_freq": 10,
    "d_inner": 40,
    "d_model": 16,
    "dtype": "float32",
    "emb_dim": 5,
    "embed_dropout": 0.1,
    "filter_order": 12,
    "hyena_dropout": 0.0,
    "hyena_filter_dropout": 0.0,
    "hyena_order": 2,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "max_seq_len": 50,
    "model_type": "hyenadna",
    "n_layer": 2,
    "num_inner_mlps": 2,
    "pad_token_id": 4,
    "pad_vocab_size_multiple": 8,
    "short_filter_order": 3,
    "tie_word_embeddings": False,
    "train_freq": True,
    "use_bias": True,
    "vocab_size": 12,
}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """Random weights of the body, with the names of a Hugging Face folder."""
    draw = torch.Generator().manual_seed(seed)
    width, inner, hidden, length = (CONFIG[k] for k in _SIZES)

    def random(*shape: int, scale: float = 0.2) -> Tensor:
        return scale * torch.randn(shape, generator=draw)

    time = torch.linspace(0, 1, length)
    angles = 2 * math.pi * torch.arange(length) / length
    bands = torch.linspace(1e-4, 1, 2)
    phases = angles[:, None] * bands
    features = torch.cat([time[:, None], phases.cos(), -phases.sin()], 1)
    found = {"hyena.backbone.embeddings.word_embeddings.weight": random(16, width, scale=1)}
    for layer in range(CONFIG["n_layer"]):
        block = f"hyena.backbone.layers.{layer}."
        mixer, filter = f"{block}mixer.", f"{block}mixer.filter_fn."
        found |= {
            f"{block}norm1.weight": 1 + random(width),
            f"{block}norm1.bias": random(width),
            f"{block}norm2.weight": 1 + random(width),
            f"{block}norm2.bias": random(width),
            f"{block}mlp.fc1.weight": random(inner, width),
            f"{block}mlp.fc1.bias": random(inner),
            f"{block}mlp.fc2.weight": random(width, inner),
            f"{block}mlp.fc2.bias": random(width),
            f"{mixer}in_proj.weight": random(3 * width, width),
            f"{mixer}in_proj.bias": random(3 * width),
            f"{mixer}out_proj.weight": random(width, width),
            f"{mixer}out_proj.bias": random(width),
            f"{mixer}short_filter.weight": random(3 * width, 1, 3),
            f"{mixer}short_filter.bias": random(3 * width),
            f"{filter}bias": random(width),
            f"{filter}pos_emb.z": features[None].clone(),
            f"{filter}pos_emb.t": time[None, :, None].clone(),
            f"{filter}modulation.deltas": torch.linspace(-3, -15, width)[None, None].clone(),
            f"{filter}implicit_filter.1.freq": 3 + random(1, hidden),
            f"{filter}implicit_filter.0.weight": random(hidden, 5),
            f"{filter}implicit_filter.0.bias": random(hidden),
            f"{filter}implicit_filter.6.weight": random(width, hidden),
        }
        for number in (2, 4):
            found[f"{filter}implicit_filter.{number}.weight"] = random(hidden, hidden)
            found[f"{filter}implicit_filter.{number}.bias"] = random(hidden)
    found["hyena.backbone.ln_f.weight"] = 1 + random(width)
    found["hyena.backbone.ln_f.bias"] = random(width)
    return found


_SIZES = ("d_model", "d_inner", "filter_order", "max_seq_len")


def hidden_states(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The last hidden states (batch, length, width) after the last norm, in double precision."""
    w = {name.removeprefix("hyena.backbone."): value.double() for name, value in weights.items()}
    stream = w["embeddings.word_embeddings.weight"][ids]
    for layer in range(CONFIG["n_layer"]):
        block = f"layers.{layer}."
        stream = stream + _mix(w, block, _norm(w, f"{block}norm1", stream))
        x = _norm(w, f"{block}norm2", stream) @ w[f"{block}mlp.fc1.weight"].T
        x = gelu(x + w[f"{block}mlp.fc1.bias"], approximate="tanh")
        stream = stream + x @ w[f"{block}mlp.fc2.weight"].T + w[f"{block}mlp.fc2.bias"]
    return _norm(w, "ln_f", stream)


def _norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)


def _mix(w: dict[str, Tensor], block: str, x: Tensor) -> Tensor:
    mixer, filter = f"{block}mixer.", f"{block}mixer.filter_fn."
    length = x.shape[1]
    projected = x @ w[f"{mixer}in_proj.weight"].T + w[f"{mixer}in_proj.bias"]
    short = torch.zeros_like(projected) + w[f"{mixer}short_filter.bias"]
    for lag in range(3):  # the last tap acts on the present
        tap = w[f"{mixer}short_filter.weight"][:, 0, 2 - lag]
        short[:, lag:] += tap * projected[:, : length - lag]
    outer, gate, value = short.chunk(3, dim=-1)

    h = w[f"{filter}pos_emb.z"][0, :length]
    for number in (0, 2, 4):
        h = h @ w[f"{filter}implicit_filter.{number}.weight"].T
        h = h + w[f"{filter}implicit_filter.{number}.bias"]
        h = torch.sin(w[f"{filter}implicit_filter.1.freq"][0] * h)
    h = h @ w[f"{filter}implicit_filter.6.weight"].T  # (length, width)
    time = w[f"{filter}pos_emb.t"][0, :length]
    h = h * (torch.exp(-time * w[f"{filter}modulation.deltas"][0].abs()) + 0.05)

    u = gate * value
    y = w[f"{filter}bias"] * u
    for t in range(length):
        for s in range(t + 1):
            y[:, t] = y[:, t] + h[t - s] * u[:, s]
    return (outer * y) @ w[f"{mixer}out_proj.weight"].T + w[f"{mixer}out_proj.bias"]
