"""Layers whose configuration has one size for keys and values, so that keys cannot be cut alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from gramian.shrinking._family import Call, Family, Shape, register


@register
class OneSize(Family):
    """Kimi delta attention and lightning attention in transformers, which are refused."""

    layers = {  # noqa: RUF012 (families are not dataclasses)
        "BailingHybridDeltaAttention": "linear_head_dim",
        "KimiLinearDeltaAttention": "linear_head_dim",
        "MiniMaxLightningAttention": "head_dim",
    }

    def refusal(self, layer: nn.Module) -> str | None:
        return (
            f"its configuration has one size, {self.field(layer)}, for keys, values and gates, so "
            "that keys cannot be cut alone."
        )

    def shape(self, layer: Any) -> Shape:
        heads = layer.o_proj.in_features if hasattr(layer, "o_proj") else layer.out_proj.in_features
        return Shape(heads // layer.head_dim, layer.head_dim, heads)

    def watch(
        self, layer: Any, inputs: Tensor, visit: Callable[[Call], None]
    ) -> AbstractContextManager[object]:
        return nullcontext()

    def cut(self, layer: Any, kept: Tensor, energies: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {}
