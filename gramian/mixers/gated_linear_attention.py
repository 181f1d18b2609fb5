r"""Gated linear attention: `S_t = diag(a_t) S_{t-1} + k_t v_tᵀ`, with input-dependent gates.

The gates are `a_t = σ(W₂ W₁ x_t + b)^(1/τ)`, where `W₂ W₁` has low rank (Yang et al. 2024, arXiv
2312.06635, equation 3 and section 4.4). This mixer is called GLA in arXiv 2504.19561.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gramian._checks import check_sizes
from gramian.mixers.linear_attention import LinearAttention, powered_sigmoid
from gramian.mixers.linear_recurrence import Dynamics
from gramian.mixers.registry import register
from gramian.ops.packed import Linear

__all__ = ["GatedLinearAttention"]


class _SigmoidGates(Dynamics):
    """The bias and the temperature of the gates `σ(logits + bias)^(1 / temperature)`."""

    def __init__(self, heads: int, gates: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.bias = nn.Parameter(torch.empty(heads, gates))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the bias to zero, which gives gates of about 0.96 at a temperature of 16."""
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def slow(self, amount: Tensor) -> None:
        """Add `amount` to the bias, which moves the gates towards 1."""
        self.bias.add_(amount.unsqueeze(-1))

    def forward(self, logits: Tensor) -> Tensor:
        """Compute the gates from logits (batch, length, heads, gates), in the same shape."""
        return powered_sigmoid(logits.to(self.bias.dtype) + self.bias, self.temperature)


@register("gated_linear_attention")
class GatedLinearAttention(LinearAttention):
    """`LinearAttention` whose memory decays by input-dependent gates.

    Args:
        width: Channels of input and output. All arguments that are not listed here are as in
            `LinearAttention`.
        temperature: τ of the gates, positive. With a high temperature the gates start near 1.
        gate_rank: Rank of the map from the input to the gates.
        head_gates: Whether the rows of a head's memory share one gate in each step.

    Raises:
        ValueError: if an argument is invalid for `LinearAttention`, if the temperature is not
            positive, or if the rank is below 1.
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
        gate_rank: int = 16,
        head_gates: bool = False,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive; got {temperature!r}.")
        check_sizes(gate_rank=gate_rank)
        sizes = state_size, value_width, feature_size
        self._build(width, heads, sizes, short_kernel, feature_map, gate_rank)
        self.head_gates = head_gates
        gates = 1 if head_gates else self.state_size
        self.gate_proj = Linear(gate_rank, heads * gates, bias=False)
        self.dynamics = _SigmoidGates(heads, gates, temperature)

    @property
    def scalar_gates(self) -> bool:
        return self.head_gates

    def config(self) -> dict[str, Any]:
        own = {
            "temperature": self.dynamics.temperature,
            "gate_rank": self.gate_features,
            "head_gates": self.head_gates,
        }
        return super().config() | own

    def _gates(self, features: Tensor) -> Tensor:
        logits = self.gate_proj(features).unflatten(-1, (self.heads, -1))
        return self.dynamics(logits).transpose(1, 2)
