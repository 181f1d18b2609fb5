"""Read the parts that StripedHyena 1 and 2 share: embedding, norms, gated MLPs and attention.

Without fused kernels, the RMS norms of the published model divide by `rms(x) + ε`. With fused
kernels, they divide by `√(mean(x²) + ε)`. Rotations use the frequencies that the checkpoint stores.
In some files these are rounded to bfloat16, and the published model uses the rounded frequencies.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gramian.checkpoints._format import (
    Format,
    Shapes,
    has_head,
    refuse_unless,
    setting,
    size,
    tied,
)
from gramian.checkpoints.tokenizers import EvoTokenizer

__all__ = ["EMBEDDING", "HEAD", "StripedFormat", "grouped_by_head"]

EMBEDDING = "embedding_layer.weight"
HEAD = "unembed.weight"
_EVO_VOCABULARY = 512
_FREQUENCIES = "inner_mha_cls.rotary_emb.inv_freq"


class StripedFormat(Format):
    """A checkpoint whose blocks have a Hyena operator or attention, a gated MLP and RMS norms."""

    embedding = EMBEDDING

    def __init__(self, shapes: Shapes, config: Mapping[str, Any]) -> None:
        super().__init__(shapes, config)
        self.config = config
        # Configurations of Hugging Face folders have other defaults.
        self.hugging = config.get("model_type") == "stripedhyena"
        self.width = size(config, "hidden_size")
        self.layers = size(config, "num_layers")
        self.vocabulary = size(config, "vocab_size")
        self.heads = size(config, "num_attention_heads")
        self.state_size = size(config, "state_size")
        self.short = size(config, "short_filter_length")
        self.groups = size(config, "proj_groups", 4 if self.hugging else 1)
        self.flash_norm = setting(config, "use_flash_rmsnorm", bool, self.hugging)
        self.eps = setting(config, "eps", float)
        self.length = size(config, "max_seqlen", size(config, "max_sequence_len", 8192))
        default = 500_000 if self.hugging else 10_000
        self.base = setting(config, "rotary_emb_base", (int, float), default)
        self.attention = setting(config, "attn_layer_idxs", list, [])
        activation = setting(config, "mlp_activation", str, self.default_activation)
        if activation not in ("silu", "gelu"):
            raise ValueError(f"mlp_activation must be 'silu' or 'gelu'; got {activation!r}.")
        self.activation = activation
        if self.width % self.heads or self.heads % self.groups:
            raise ValueError(
                "num_attention_heads must divide hidden_size, and proj_groups the heads; got "
                f"{self.heads}, {self.width} and {self.groups}."
            )
        if self.groups > 1:
            refuse_unless(config, "smeared_gqa", False)
        refuse_unless(config, "final_norm", True)
        self.inner = self._inner_size()

    default_activation = "silu"
    """The activation of the MLP if the configuration names none."""

    def _inner_size(self) -> int:
        """Return the inner size of the MLP: the configured size, or else 8/3 of the width.

        The latter is rounded down to an integer, and then up to a multiple of the setting
        `inner_size_multiple_of`.
        """
        multiple = size(self.config, "inner_size_multiple_of", 64)
        least = int(2 * self.width * 4 / 3)
        return size(self.config, "inner_mlp_size", -(-least // multiple) * multiple)

    @classmethod
    def strip(cls, names: Iterable[str]) -> dict[str, str] | None:
        stripped = {name: name.removeprefix("backbone.") for name in names}
        return stripped if EMBEDDING in stripped.values() else None

    def expected(self) -> Shapes:
        width = self.width
        shapes: Shapes = {EMBEDDING: (self.vocabulary, width), "norm.scale": (width,)}
        if has_head(self.config, self.shapes, HEAD):
            shapes[HEAD] = (self.vocabulary, width)
        for i in range(self.layers):
            block = f"blocks.{i}."
            shapes |= {
                f"{block}pre_norm.scale": (width,),
                f"{block}post_norm.scale": (width,),
                f"{block}mlp.l1.weight": (self.inner, width),
                f"{block}mlp.l2.weight": (self.inner, width),
                f"{block}mlp.l3.weight": (width, self.inner),
            }
            if i in self.attention:
                shapes |= self._attention_shapes(block)
            else:
                shapes |= self.hyena_shapes(i, block)
        return shapes

    @abc.abstractmethod
    def hyena_shapes(self, layer: int, block: str) -> Shapes:
        """Return the shapes of a Hyena operator's tensors by name. Names begin with `block`."""

    def _attention_shapes(self, block: str) -> Shapes:
        width, attention = self.width, f"{block}inner_mha_cls."
        rows = width + 2 * width // self.groups
        shapes: Shapes = {
            f"{attention}Wqkv.weight": (rows, width),
            f"{attention}out_proj.weight": (width, width),
        }
        if self.query_bias:
            shapes[f"{attention}Wqkv.bias"] = (rows,)
        if self.output_bias:
            shapes[f"{attention}out_proj.bias"] = (width,)
        if f"{block}{_FREQUENCIES}" in self.shapes:
            shapes[f"{block}{_FREQUENCIES}"] = (width // self.heads // 2,)
        return shapes

    @property
    def query_bias(self) -> bool:
        """Whether the input projection of attention has a bias."""
        return setting(self.config, "qkv_proj_bias", bool, not self.hugging)

    @property
    def output_bias(self) -> bool:
        """Whether the output projection of attention has a bias."""
        return setting(self.config, "mha_out_proj_bias", bool, not self.hugging)

    @property
    def is_evo(self) -> bool:
        """Whether the vocabulary has the size of Evo's."""
        return bool(self.vocabulary == _EVO_VOCABULARY)

    def common_config(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of `GramianConfig` that do not depend on the Hyena operators."""
        more: dict[str, Any] = {"pad_token_id": 1, "eos_token_id": 0} if self.is_evo else {}
        if any(i in self.attention for i in range(self.layers)):
            more["attention"] = self._attention_config()
        return more | {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_heads": self.heads,
            "max_position_embeddings": self.length,
            "short_kernel": self.short,
            "norm": "rms" if self.flash_norm else "rms_plus_eps",
            "rms_norm_eps": self.eps,
            "intermediate_size": self.inner,
        }

    def _attention_config(self) -> dict[str, Any]:
        scaled = setting(self.config, "use_interpolated_rotary_pos_emb", bool, False)
        factor = setting(self.config, "rotary_emb_scaling_factor", (int, float), 1.0)
        return {
            "kv_heads": self.heads // self.groups,
            "rotary_base": float(self.base),
            "rotary_scaling": float(factor) if scaled else 1.0,
            "bias": self.query_bias,
            "out_bias": self.output_bias,
        }

    def attention_mixer(self, weights: Mapping[str, Tensor], layer: int) -> dict[str, Any]:
        """Return the configuration of a layer's attention, with frequencies if they are stored."""
        stored = weights.get(f"blocks.{layer}.{_FREQUENCIES}")
        mixer: dict[str, Any] = {"type": "softmax_attention"}
        if stored is not None:
            mixer["rotary_frequencies"] = stored.double().tolist()
        return mixer

    def translate(self, weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        yield {"model.embed_tokens.weight": weights[EMBEDDING]}
        if not self.is_tied(weights):
            yield {"lm_head.weight": weights[HEAD]}
        yield {"model.norm.weight": weights["norm.scale"]}
        for i in range(self.layers):
            yield self._translate_layer(weights, i)

    def is_tied(self, weights: Mapping[str, Tensor]) -> bool:
        """Return whether the output projection of the model is its embedding."""
        return tied(self.config, weights, EMBEDDING, HEAD)

    def _translate_layer(self, weights: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
        block, ours = f"blocks.{layer}.", f"model.layers.{layer}."
        names = {
            "pre_norm.scale": "mixer_norm.weight",
            "post_norm.scale": "mlp_norm.weight",
            "mlp.l1.weight": "mlp.gate_proj.weight",
            "mlp.l2.weight": "mlp.up_proj.weight",
            "mlp.l3.weight": "mlp.down_proj.weight",
        }
        state = {ours + name: weights[block + theirs] for theirs, name in names.items()}
        if layer in self.attention:
            mixer = self._attend(weights, block)
        else:
            mixer = self.translate_hyena(weights, layer, block)
        return state | {f"{ours}mixer.{name}": value for name, value in mixer.items()}

    @abc.abstractmethod
    def translate_hyena(
        self, weights: Mapping[str, Tensor], layer: int, block: str
    ) -> dict[str, Tensor]:
        """Return the state dict of a Gramian mixer."""

    def attention_rows(self) -> Tensor | None:
        """Return the indices in the checkpoint of the rows of all queries, then keys, then values.

        None means that the checkpoint stores the rows in this order.
        """
        return None

    def _attend(self, weights: Mapping[str, Tensor], block: str) -> dict[str, Tensor]:
        theirs = f"{block}inner_mha_cls."
        rows = self.attention_rows()
        state = {}
        for kind in ("weight", "bias"):
            stored = weights.get(f"{theirs}Wqkv.{kind}")
            if stored is not None:
                state[f"in_proj.{kind}"] = stored if rows is None else stored[rows]
            stored = weights.get(f"{theirs}out_proj.{kind}")
            if stored is not None:
                state[f"out_proj.{kind}"] = stored
        return state

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        return EvoTokenizer() if self.is_evo else None


def grouped_by_head(width: int, heads: int) -> Tensor:
    """Return the indices that sort rows by kind, if they are stored head by head.

    There are three kinds, for example queries, keys and values. Each head has its rows of the first
    kind, then of the second, then of the third.

    Returns:
        (3 × width), first the indices of all rows of the first kind, head by head.
    """
    return torch.arange(3 * width).reshape(heads, 3, -1).transpose(0, 1).flatten()
