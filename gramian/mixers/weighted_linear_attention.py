r"""Weighted linear attention: `S_t = diag(a) S_{t-1} + k_t v_tᵀ`, with input-independent gates.

This mixer is called WLA in arXiv 2504.19561. Linear attention never forgets, and gated linear
attention computes its gates from the input. Weighted linear attention learns gates that do not
depend on the input, one for each row of a head's memory. RetNet (Sun et al. 2023) and lightning
attention (Qin et al. 2024) are the special case of one fixed gate per head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gramian.mixers.linear_attention import LinearAttention, powered_sigmoid
from gramian.mixers.linear_recurrence import Dynamics
from gramian.mixers.registry import register

__all__ = ["WeightedLinearAttention"]


class _InvariantGates(Dynamics):
    """The parameters of gates that are the same for every input and every step."""

    def __init__(self, heads: int, gates: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.logits = nn.Parameter(torch.empty(heads, gates))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the logits uniformly from [0, 5].

        At a temperature of 16, memories then last 23 to 2,400 steps.
        """
        nn.init.uniform_(self.logits, 0.0, 5.0)

    @torch.no_grad()
    def slow(self, amount: Tensor) -> None:
        """Add `amount` to the logits, which moves the gates towards 1."""
        self.logits.add_(amount.unsqueeze(-1))

    def forward(self) -> Tensor:
        """Return the gates, (heads, 1, n), or (heads, 1, 1) if a head has one gate."""
        return powered_sigmoid(self.logits, self.temperature).unsqueeze(1)


@register("weighted_linear_attention")
class WeightedLinearAttention(LinearAttention):
    """`LinearAttention` whose memory decays by learned gates `σ(logits)^(1/temperature)`.

    Args:
        width: Channels of input and output. All arguments that are not listed here are as in
            `LinearAttention`.
        temperature: τ of the gates, positive. With a high temperature the gates start near 1.
        head_gates: Whether the rows of a head's memory share one gate, as in RetNet.

    Raises:
        ValueError: if an argument is invalid for `LinearAttention`, or if the temperature is not
            positive.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        state_size: int | None = None,
        value_width: int | None = None,
        *,
        short_kernel: int = 3,
        feature_map: str = "identity",
        feature_size: int | None = None,
        temperature: float = 16.0,
        head_gates: bool = False,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive; got {temperature!r}.")
        sizes = state_size, value_width, feature_size
        self._build(width, heads, sizes, short_kernel, feature_map, 0)
        self.head_gates = head_gates
        self.dynamics = _InvariantGates(heads, 1 if head_gates else self.state_size, temperature)

    @property
    def scalar_gates(self) -> bool:
        return self.head_gates

    def config(self) -> dict[str, Any]:
        own = {"temperature": self.dynamics.temperature, "head_gates": self.head_gates}
        return super().config() | own

    def _gates(self, features: Tensor) -> Tensor:
        return self.dynamics()
