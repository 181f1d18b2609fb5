"""Kimi delta attention, whose configuration has one size for keys and values."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from gramian.shrinking._family import Call, Family, Shape, register


@register
class KimiDelta(Family):
    """Kimi delta attention in transformers, which is refused."""

    layers = {"KimiLinearDeltaAttention": "linear_head_dim"}  # noqa: RUF012

    def refusal(self, layer: nn.Module) -> str | None:
        return (
            "its configuration has one size, linear_head_dim, for keys, values and gates, so that "
            "keys cannot be cut alone."
        )

    def shape(self, layer: Any) -> Shape:
        return Shape(layer.num_heads, layer.head_dim, layer.num_heads * layer.head_dim)

    def watch(
        self, layer: Any, inputs: Tensor, visit: Callable[[Call], None]
    ) -> AbstractContextManager[object]:
        return nullcontext()

    def cut(self, layer: Any, kept: Tensor, energies: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {}
