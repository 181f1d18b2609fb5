r"""Read StripedHyena and Evo, whose blocks have Hyena mixers with modal filters or attention.

A published filter is `h_t = Re Σ r λ^t` from tap 0 on, plus a skip `D`. Gramian's filters have
`λ^(t-1)` and a separate tap 0, so their residues are `r λ` and their direct terms `D + Re Σ r`.
Poles are not constrained and may lie outside of the unit circle. With `column_split_hyena`, the
rows of the projection and of the short convolution are grouped by head; each head has its outer
gate, its inner gate and its value. An RMS norm divides by `√(mean(x²) + ε)` if the published model
uses fused kernels, and by `rms(x) + ε` if not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gramian.checkpoints._format import (
    Format,
    Progress,
    Shapes,
    has_head,
    refuse_unless,
    register,
    setting,
    size,
    tied,
)
from gramian.checkpoints.tokenizers import EvoTokenizer
from gramian.filters import ModalFilter
from gramian.models import GramianConfig
from gramian.systems import Modal

__all__ = ["StripedHyena"]

EMBEDDING = "embedding_layer.weight"
HEAD = "unembed.weight"
_EVO_VOCABULARY = 512


@register
class StripedHyena(Format):
    """The format of `StripedHyena`, as its own library writes it or in a Hugging Face folder."""

    name = "striped_hyena"
    embedding = EMBEDDING

    def __init__(self, shapes: Shapes, config: Mapping[str, Any]) -> None:
        super().__init__(shapes, config)
        self.config = config
        # The configuration of a Hugging Face folder has other defaults.
        hugging = config.get("model_type") == "stripedhyena"
        self.width = size(config, "hidden_size")
        self.layers = size(config, "num_layers")
        self.vocabulary = size(config, "vocab_size")
        self.heads = size(config, "num_attention_heads")
        self.state_size = size(config, "state_size")
        self.short = size(config, "short_filter_length")
        self.groups = size(config, "proj_groups", 4 if hugging else 1)
        self.split = setting(config, "column_split_hyena", bool, True)
        self.flash_norm = setting(config, "use_flash_rmsnorm", bool, hugging)
        self.eps = setting(config, "eps", float)
        self.length = size(config, "max_seqlen", size(config, "max_sequence_len", 8192))
        self.base = setting(config, "rotary_emb_base", (int, float), 500_000 if hugging else 10_000)
        self.attention = setting(config, "attn_layer_idxs", list, [])
        activation = setting(config, "mlp_activation", str, "silu")
        if activation not in ("silu", "gelu"):
            raise ValueError(f"mlp_activation must be 'silu' or 'gelu'; got {activation!r}.")
        self.activation = activation
        filters = size(config, "hyena_filter_groups", 1)
        if self.width % self.heads or self.heads % self.groups or self.width % filters:
            raise ValueError(
                "num_attention_heads and hyena_filter_groups must divide hidden_size, and "
                f"proj_groups the heads; got {self.heads}, {filters}, {self.width} and "
                f"{self.groups}."
            )
        self.filters = self.width // filters
        if self.groups > 1:
            refuse_unless(config, "smeared_gqa", False)
        refuse_unless(config, "final_norm", True)
        self.inner = self._inner_size()

    def _inner_size(self) -> int:
        """Return the inner size of the MLP: the configured one, or that of the published rule."""
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
            attends = i in self.attention
            shapes |= self._attention_shapes(block) if attends else self._hyena_shapes(block)
        return shapes

    def _hyena_shapes(self, block: str) -> Shapes:
        width, modes = self.width, (self.filters, self.state_size, 1, 2)
        shapes: Shapes = {
            f"{block}projections.weight": (3 * width, width),
            f"{block}projections.bias": (3 * width,),
            f"{block}out_filter_dense.weight": (width, width),
            f"{block}out_filter_dense.bias": (width,),
            f"{block}filter.D": (width,),
            f"{block}filter.poles": modes,
            f"{block}filter.residues": modes,
            f"{block}filter.short_filter_weight": (3 * width, 1, self.short),
        }
        if setting(self.config, "short_filter_bias", bool, True):
            shapes[f"{block}filter.short_filter_bias"] = (3 * width,)
        return shapes

    def _attention_shapes(self, block: str) -> Shapes:
        width, attention = self.width, f"{block}inner_mha_cls."
        rows = width + 2 * width // self.groups
        shapes: Shapes = {
            f"{attention}Wqkv.weight": (rows, width),
            f"{attention}out_proj.weight": (width, width),
        }
        if self._query_bias:
            shapes[f"{attention}Wqkv.bias"] = (rows,)
        if self._output_bias:
            shapes[f"{attention}out_proj.bias"] = (width,)
        if f"{attention}rotary_emb.inv_freq" in self.shapes:
            shapes[f"{attention}rotary_emb.inv_freq"] = (width // self.heads // 2,)
        return shapes

    @property
    def _query_bias(self) -> bool:
        hugging = self.config.get("model_type") == "stripedhyena"
        return setting(self.config, "qkv_proj_bias", bool, not hugging)

    @property
    def _output_bias(self) -> bool:
        hugging = self.config.get("model_type") == "stripedhyena"
        return setting(self.config, "mha_out_proj_bias", bool, not hugging)

    def model_config(self, weights: Mapping[str, Tensor]) -> GramianConfig:
        attends = [i in self.attention for i in range(self.layers)]
        evo = self.vocabulary == _EVO_VOCABULARY
        more: dict[str, Any] = {"pad_token_id": 1, "eos_token_id": 0} if evo else {}
        if any(attends):
            more["attention"] = self._attention_config()
        return GramianConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_heads=self.heads,
            mixers=["softmax_attention" if attention else "hyena" for attention in attends],
            filter=[
                None if attention else self._filter(weights, f"blocks.{i}.filter.").config()
                for i, attention in enumerate(attends)
            ],
            max_position_embeddings=self.length,
            short_kernel=self.short,
            norm="rms" if self.flash_norm else "rms_plus_eps",
            rms_norm_eps=self.eps,
            intermediate_size=self.inner,
            hidden_act=self.activation,
            tie_word_embeddings=tied(self.config, weights, EMBEDDING, HEAD),
            **more,
        )

    def _attention_config(self) -> dict[str, Any]:
        scaled = setting(self.config, "use_interpolated_rotary_pos_emb", bool, False)
        factor = setting(self.config, "rotary_emb_scaling_factor", (int, float), 1.0)
        return {
            "kv_heads": self.heads // self.groups,
            "rotary_base": float(self.base),
            "rotary_scaling": float(factor) if scaled else 1.0,
            "bias": self._query_bias,
            "out_bias": self._output_bias,
        }

    def _filter(self, weights: Mapping[str, Tensor], name: str) -> ModalFilter:
        """Return the modal filter of all channels; channels of a group share poles and residues.

        Args:
            weights: the checkpoint's tensors.
            name: prefix of the filter's names.
        """
        poles, residues = (
            torch.view_as_complex(weights[f"{name}{kind}"].double()).squeeze(-1)
            for kind in ("poles", "residues")
        )  # (filters, modes)
        skip = weights[f"{name}D"].double()
        share = self.width // self.filters
        poles, residues = (x.repeat_interleave(share, dim=0) for x in (poles, residues))
        system = Modal(poles, residues * poles, skip + residues.real.sum(-1))
        bounded = bool((system.spectral_radius() < 1).all())
        return ModalFilter.from_system(system, self.length, bounded=bounded)

    def translate(self, weights: dict[str, Tensor], progress: Progress) -> dict[str, Tensor]:
        embedding = weights.pop(EMBEDDING)
        state = {
            "model.embed_tokens.weight": embedding,
            "lm_head.weight": weights.pop(HEAD, embedding),
            "model.norm.weight": weights.pop("norm.scale"),
        }
        for i in range(self.layers):
            block, ours = f"blocks.{i}.", f"model.layers.{i}."
            names = {
                "pre_norm.scale": "mixer_norm.weight",
                "post_norm.scale": "mlp_norm.weight",
                "mlp.l1.weight": "mlp.gate_proj.weight",
                "mlp.l2.weight": "mlp.up_proj.weight",
                "mlp.l3.weight": "mlp.down_proj.weight",
            }
            state |= {ours + name: weights.pop(block + theirs) for theirs, name in names.items()}
            translate = self._attend if i in self.attention else self._convolve
            state |= translate(weights, block, f"{ours}mixer.")
            progress(i + 1, self.layers)
        return state

    def _convolve(self, weights: dict[str, Tensor], block: str, ours: str) -> dict[str, Tensor]:
        filter = self._filter(weights, f"{block}filter.")
        for kind in ("poles", "residues", "D"):
            del weights[f"{block}filter.{kind}"]
        rows = self._rows()
        short = weights.pop(f"{block}filter.short_filter_weight").squeeze(1).flip(-1)
        bias = weights.pop(f"{block}filter.short_filter_bias", torch.zeros_like(short[:, 0]))
        state = {
            "in_proj.weight": weights.pop(f"{block}projections.weight")[rows],
            "in_proj.bias": weights.pop(f"{block}projections.bias")[rows],
            "short.weight": short[rows],
            "short.bias": bias[rows],
            "out_proj.weight": weights.pop(f"{block}out_filter_dense.weight"),
            "out_proj.bias": weights.pop(f"{block}out_filter_dense.bias"),
        }
        state |= {f"filter.{name}": value for name, value in filter.state_dict().items()}
        return {ours + name: value for name, value in state.items()}

    def _rows(self) -> Tensor:
        """Return the checkpoint's indices of the rows for outer gates, inner gates and values."""
        rows = torch.arange(3 * self.width)
        if self.split:
            rows = rows.reshape(self.heads, 3, -1).transpose(0, 1).flatten()
        return rows

    def _attend(self, weights: dict[str, Tensor], block: str, ours: str) -> dict[str, Tensor]:
        theirs = f"{block}inner_mha_cls."
        frequencies = weights.pop(f"{theirs}rotary_emb.inv_freq", None)
        if frequencies is not None:
            self._check_frequencies(frequencies, f"{theirs}rotary_emb.inv_freq")
        names = {"Wqkv.weight": "in_proj.weight", "out_proj.weight": "out_proj.weight"}
        if self._query_bias:
            names["Wqkv.bias"] = "in_proj.bias"
        if self._output_bias:
            names["out_proj.bias"] = "out_proj.bias"
        return {ours + name: weights.pop(theirs + source) for source, name in names.items()}

    def _check_frequencies(self, frequencies: Tensor, name: str) -> None:
        count = len(frequencies)
        expected = self.base ** (-torch.arange(count, dtype=torch.float64) / count)
        tolerance = 4 * torch.finfo(frequencies.dtype).eps
        if not torch.allclose(frequencies.double(), expected, rtol=tolerance, atol=0):
            raise ValueError(f"{name} are not the frequencies of rotary_emb_base={self.base:g}.")

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        return EvoTokenizer() if self.vocabulary == _EVO_VOCABULARY else None
