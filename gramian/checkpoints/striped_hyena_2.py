r"""Read StripedHyena 2 and Evo 2: short, medium and long Hyena operators, and attention.

In every Hyena block, the input is projected and passes through a depthwise convolution, whose last
stored tap acts on the present input. The result is divided into outer gate o, inner gate g and
value v, and the output is `o ∘ (h * (g ∘ v))`. The rows of o, g and v are interleaved, stored head
by head, or stored one kind after the other. `hyena_flip_x1x2` exchanges o and g.

- Short and medium operators have explicit taps, which groups of consecutive channels share. With
  128 taps or more, the first tap acts on the present input, and a skip `D` is added. With fewer
  taps, the last tap acts on the present input, and there is no skip.
- Long operators have real modes, `h_t = Σ R exp(p t) + D [t = 0]`. Gramian's modal filters have
  `λ^(t-1)` and a separate tap 0. So `λ = exp(p)`, residues are `R λ` and the direct term is
  `D + Σ R`.

With `evo2_style_activations`, the MLP of every block but the first multiplies its two maps without
an activation. In some models, the projections of Hyena blocks were trained in 8-bit floating point
with scales that the checkpoint stores. These models are useless if their projections are computed
in another precision (`gramian.ops.fp8`).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gramian.checkpoints._format import Shapes, register, setting, size
from gramian.checkpoints._striped import StripedFormat, grouped_by_head
from gramian.filters import ExplicitFilter, Filter, ModalFilter
from gramian.models import GramianConfig

__all__ = ["StripedHyena2"]

_PRESENT_FIRST = 128
"""Filters with this many taps or more have a skip, and their first tap acts on the present."""

_KINDS = ("hcl", "hcm", "hcs")
_WITHOUT_FP8 = (4096, 32)
"""Width and number of layers of the models of 7 billion parameters, which do not need FP8."""


@register
class StripedHyena2(StripedFormat):
    """The format of StripedHyena 2 models, such as Evo 2, in files of the library vortex."""

    name = "striped_hyena_2"
    default_activation = "gelu"
    reads_states = True

    def __init__(self, shapes: Shapes, config: Mapping[str, Any]) -> None:
        super().__init__(shapes, config)
        self.kinds = self._kinds()
        explicit = [kind for kind in _KINDS[1:] if kind in self.kinds]
        self.taps = {kind: size(config, f"{kind}_filter_length") for kind in explicit}
        self.filters = {
            kind: size(config, f"{kind}_filter_groups", self.width) for kind in self.taps
        }
        for kind, groups in self.filters.items():
            if self.width % groups:
                raise ValueError(
                    f"{kind}_filter_groups must divide hidden_size; got {groups} and {self.width}."
                )
        self.interleave = setting(config, "interleave", bool, False)
        self.split = setting(config, "column_split_hyena", bool, True)
        self.flip = setting(config, "hyena_flip_x1x2", bool, False)
        self.column_split = setting(config, "column_split", bool, True)
        self.identity = setting(config, "evo2_style_activations", bool, False)
        self.fp8_scales: dict[int, tuple[float, float]] = {}

    @classmethod
    def meant_by(cls, config: Mapping[str, Any]) -> bool:
        return any(f"{kind}_layer_idxs" in config for kind in _KINDS)

    def _kinds(self) -> list[str]:
        """Return the kind of every block: "attention" or one of `_KINDS`."""
        lists = {"attention": self.attention}
        for kind in _KINDS:
            lists[kind] = setting(self.config, f"{kind}_layer_idxs", list, [])
        kinds = []
        for layer in range(self.layers):
            found = next((kind for kind, layers in lists.items() if layer in layers), None)
            if found is None:
                raise ValueError(
                    f"block {layer} is in none of attn_layer_idxs, hcl_layer_idxs, hcm_layer_idxs "
                    "and hcs_layer_idxs of the checkpoint's configuration."
                )
            kinds.append(found)
        return kinds

    def _inner_size(self) -> int:
        multiple = size(self.config, "inner_size_multiple_of", 64)
        multiple *= size(self.config, "model_parallel_size", 1)
        least = int(2 * self.width * 4 / 3)
        return size(self.config, "inner_mlp_size", -(-least // multiple) * multiple)

    def hyena_shapes(self, layer: int, block: str) -> Shapes:
        width, kind = self.width, self.kinds[layer]
        shapes: Shapes = {
            f"{block}projections.weight": (3 * width, width),
            f"{block}out_filter_dense.weight": (width, width),
            f"{block}filter.short_filter_weight": (3 * width, 1, self.short),
        }
        if self._has_bias("qkv_proj_bias"):
            shapes[f"{block}projections.bias"] = (3 * width,)
        if self._has_bias("hyena_out_proj_bias"):
            shapes[f"{block}out_filter_dense.bias"] = (width,)
        if self._has_bias("short_filter_bias"):
            shapes[f"{block}filter.short_filter_bias"] = (3 * width,)
        if kind == "hcl":
            shapes[f"{block}filter.log_poles"] = (width, self.state_size, 1)
            shapes[f"{block}filter.residues"] = (width, self.state_size)
            shapes[f"{block}filter.D"] = (width,)
            grid = f"{block}mixer.mixer.filter.t"
            if grid in self.shapes:  # the times 0, 1, …, which are not needed
                shapes[grid] = (1, 1, self.shapes[grid][-1])
            return shapes
        taps = self.taps[kind]
        shapes[f"{block}filter.h"] = (self.filters[kind], 1, taps)
        if taps >= _PRESENT_FIRST:
            shapes[f"{block}filter.D"] = (width,)
        return shapes

    def _has_bias(self, name: str) -> bool:
        return bool(setting(self.config, name, bool, name == "hyena_out_proj_bias"))

    @property
    def query_bias(self) -> bool:
        return self._has_bias("qkv_proj_bias")

    @property
    def output_bias(self) -> bool:
        return bool(setting(self.config, "mha_out_proj_bias", bool, True))

    def needs_fp8(self) -> bool:
        """Return whether the published model is useless unless its projections use FP8."""
        wanted = setting(self.config, "use_fp8_input_projections", bool, False)
        return bool(wanted and (self.width, self.layers) != _WITHOUT_FP8)

    def read_states(self, states: Mapping[str, bytes | None], fp8: bool | None) -> None:
        needed = self.needs_fp8() if fp8 is None else fp8
        if not needed:
            return
        for layer, kind in enumerate(self.kinds):
            if kind != "attention":
                name = f"blocks.{layer}.projections._extra_state"
                self.fp8_scales[layer] = _read_scales(states.get(name), name)

    def model_config(self, weights: Mapping[str, Tensor]) -> GramianConfig:
        mixers: list[dict[str, Any]] = []
        filters: list[dict[str, Any] | None] = []
        for layer, kind in enumerate(self.kinds):
            if kind == "attention":
                mixers.append(self.attention_mixer(weights, layer))
                filters.append(None)
                continue
            scales = self.fp8_scales.get(layer)
            mixers.append(
                {
                    "type": "hyena",
                    "bias": self._has_bias("qkv_proj_bias"),
                    "short_bias": self._has_bias("short_filter_bias"),
                    "out_bias": self._has_bias("hyena_out_proj_bias"),
                }
                | ({} if scales is None else {"fp8_scales": list(scales)})
            )
            filters.append(self._filter(weights, layer).config())
        activations = [self.activation] * self.layers
        if self.identity:
            activations[1:] = ["linear"] * (self.layers - 1)
        return GramianConfig(
            **self.common_config(weights),
            mixers=mixers,
            filter=filters,
            hidden_act=activations if self.identity else self.activation,
            tie_word_embeddings=self.is_tied(weights),
        )

    def is_tied(self, weights: Mapping[str, Tensor]) -> bool:
        # If `tie_embeddings` is True, both are the same, even if the checkpoint has two tensors.
        return setting(self.config, "tie_embeddings", bool, False) or super().is_tied(weights)

    def _filter(self, weights: Mapping[str, Tensor], layer: int) -> Filter:
        name, kind = f"blocks.{layer}.filter.", self.kinds[layer]
        if kind == "hcl":
            return self._modal_filter(weights, name)
        taps, groups = self.taps[kind], self.filters[kind]
        skip = taps >= _PRESENT_FIRST
        filter = ExplicitFilter(self.width, self.length, taps, groups, skip=skip)
        stored = weights[f"{name}h"].squeeze(1)
        with torch.no_grad():
            filter.kernel.copy_(stored if skip else stored.flip(-1))
            if filter.d is not None:
                filter.d.copy_(weights[f"{name}D"])
        return filter

    def _modal_filter(self, weights: Mapping[str, Tensor], name: str) -> ModalFilter:
        rates = -weights[f"{name}log_poles"].double().squeeze(-1)  # rates of decay, (width, modes)
        residues = weights[f"{name}residues"].double()
        bounded = bool((rates > 0).all())
        filter = ModalFilter(self.width, self.state_size, self.length, bounded=bounded, real=True)
        with torch.no_grad():
            if bounded:
                filter.log_decay.copy_(rates.log().flatten())
            else:
                filter.decay.copy_(rates.flatten())
            filter.residues.copy_((residues * torch.exp(-rates)).reshape(-1, 1))
            filter.d.copy_(weights[f"{name}D"].double() + residues.sum(-1))
        return filter

    def translate_hyena(
        self, weights: Mapping[str, Tensor], layer: int, block: str
    ) -> dict[str, Tensor]:
        filter = self._filter(weights, layer)
        rows = self._rows()
        short = weights[f"{block}filter.short_filter_weight"].squeeze(1).flip(-1)
        state = {"short.weight": short[rows]}
        names = {
            "projections.weight": ("in_proj.weight", True),
            "projections.bias": ("in_proj.bias", True),
            "filter.short_filter_bias": ("short.bias", True),
            "out_filter_dense.weight": ("out_proj.weight", False),
            "out_filter_dense.bias": ("out_proj.bias", False),
        }
        for theirs, (ours, by_kind) in names.items():
            stored = weights.get(f"{block}{theirs}")
            if stored is not None:
                state[ours] = stored[rows] if by_kind else stored
        return state | {f"filter.{name}": value for name, value in filter.state_dict().items()}

    def _rows(self) -> Tensor:
        """Return the indices in the checkpoint of the rows of outer gate, inner gate and value."""
        rows = torch.arange(3 * self.width)
        if self.interleave:
            rows = rows.reshape(-1, 3).T.flatten()
        if self.split:
            rows = rows[grouped_by_head(self.width, self.heads)]
        if self.flip:
            outer, inner, value = rows.chunk(3)
            rows = torch.cat([inner, outer, value])
        return rows

    def attention_rows(self) -> Tensor | None:
        return grouped_by_head(self.width, self.heads) if self.column_split else None


def _read_scales(state: bytes | None, name: str) -> tuple[float, float]:
    """Return the scales of input and weight from the byte stream of a Transformer Engine layer.

    Args:
        state: the byte stream.
        name: name of the byte stream, for the message of an error.

    Raises:
        ValueError: if the byte stream is missing or holds no scales.
    """
    try:
        held = torch.load(io.BytesIO(state or b""), map_location="cpu", weights_only=True)
        scales = held["scale_fwd"]
        return float(scales[0]), float(scales[1])
    except Exception as error:  # the stream may be missing, damaged, or without scales
        raise ValueError(
            f"this model needs the FP8 scales of its projections, and {name} holds none; without "
            "them (fp8=False) its outputs are near chance."
        ) from error
