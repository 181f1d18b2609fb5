r"""Read StripedHyena and Evo, whose blocks have Hyena operators with modal filters, or attention.

A published filter is `h_t = Re Σ r λ^t` from tap 0 on, plus a skip `D`. Gramian's filters have
`λ^(t-1)` and a separate tap 0. So their residues are `r λ`, and their direct terms `D + Re Σ r`.
Poles are not constrained and may lie outside of the unit circle. With `column_split_hyena`, the
rows of the projection and of the short convolution are stored head by head. The rows of a head are
those of its outer gate, then of its inner gate, then of its value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gramian.checkpoints._format import Shapes, register, setting, size
from gramian.checkpoints._striped import StripedFormat, grouped_by_head
from gramian.filters import ModalFilter
from gramian.models import GramianConfig
from gramian.systems import Modal

__all__ = ["StripedHyena"]


@register
class StripedHyena(StripedFormat):
    """The format of StripedHyena, in files of its own library and in Hugging Face folders."""

    name = "striped_hyena"

    def __init__(self, shapes: Shapes, config: Mapping[str, Any]) -> None:
        super().__init__(shapes, config)
        self.split = setting(config, "column_split_hyena", bool, True)
        filters = size(config, "hyena_filter_groups", 1)
        if self.width % filters:
            raise ValueError(
                f"hyena_filter_groups must divide hidden_size; got {filters} and {self.width}."
            )
        self.filters = self.width // filters

    def hyena_shapes(self, layer: int, block: str) -> Shapes:
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

    def model_config(self, weights: Mapping[str, Tensor]) -> GramianConfig:
        attends = [i in self.attention for i in range(self.layers)]
        return GramianConfig(
            **self.common_config(weights),
            mixers=[
                self.attention_mixer(weights, i) if attention else "hyena"
                for i, attention in enumerate(attends)
            ],
            filter=[
                None if attention else self._filter(weights, f"blocks.{i}.filter.").config()
                for i, attention in enumerate(attends)
            ],
            hidden_act=self.activation,
            tie_word_embeddings=self.is_tied(weights),
        )

    def _filter(self, weights: Mapping[str, Tensor], name: str) -> ModalFilter:
        """Return the modal filter of all channels of a layer.

        In the checkpoint, groups of channels share poles and residues.
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

    def translate_hyena(
        self, weights: Mapping[str, Tensor], layer: int, block: str
    ) -> dict[str, Tensor]:
        filter = self._filter(weights, f"{block}filter.")
        rows = torch.arange(3 * self.width)
        if self.split:
            rows = grouped_by_head(self.width, self.heads)
        short = weights[f"{block}filter.short_filter_weight"].squeeze(1).flip(-1)
        bias = weights.get(f"{block}filter.short_filter_bias", torch.zeros_like(short[:, 0]))
        state = {
            "in_proj.weight": weights[f"{block}projections.weight"][rows],
            "in_proj.bias": weights[f"{block}projections.bias"][rows],
            "short.weight": short[rows],
            "short.bias": bias[rows],
            "out_proj.weight": weights[f"{block}out_filter_dense.weight"],
            "out_proj.bias": weights[f"{block}out_filter_dense.bias"],
        }
        return state | {f"filter.{name}": value for name, value in filter.state_dict().items()}
