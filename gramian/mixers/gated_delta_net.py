r"""Gated DeltaNet: `S_t = α_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ`, `y_t = q_tᵀ S_t`.

This is equation 10 of Yang, Kautz and Hatamizadeh 2024 (arXiv 2412.06464). The delta rule replaces
the value that is stored under a key, and α makes all stored values decay. Queries and keys are
normalized to length 1, so the factor of `S_{t-1}` never enlarges the memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from gramian._checks import check_sizes
from gramian.mixers.linear_attention import LinearAttention
from gramian.mixers.linear_recurrence import Coefficients, Dynamics, steps_of_time
from gramian.mixers.registry import register

__all__ = ["GatedDeltaNet"]

_EPS = 1e-6  # this is added to the squared length of queries and keys


class _DeltaDynamics(Dynamics):
    """The parameters of the gates `α = exp(-exp(A_log) softplus(x + bias))`, one gate per head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw rates log-uniformly from [1, 16] and Δ log-uniformly from [0.001, 0.1]."""
        nn.init.uniform_(self.A_log, 0.0, math.log(16.0))
        steps_of_time(self.dt_bias)

    @torch.no_grad()
    def slow(self, amount: Tensor) -> None:
        """Divide the rates by `exp(amount)`."""
        self.A_log.sub_(amount)

    def forward(self, logits: Tensor) -> Tensor:
        """Return gates (batch, heads, length, 1) for logits (batch, length, heads)."""
        dt = softplus(logits.to(self.dt_bias.dtype) + self.dt_bias)
        return torch.exp(-self.A_log.exp() * dt).mT.unsqueeze(-1)


@register("gated_delta_net")
class GatedDeltaNet(LinearAttention):
    """Linear attention with the gated delta rule.

    Queries, keys and values pass through a short convolution and SiLU. As in `LinearAttention`, the
    output of every head passes through a norm and is multiplied by a gate. The rows of the input
    projection belong to the queries of all heads, then to all keys, all values, β, α and the output
    gate. Within each of these groups, the heads are in order.

    Args:
        width: Channels of input and output.
        heads: Number of heads.
        state_size: n, the number of features of a query or key; by default `width / heads`.
        value_width: N, the number of features of a head's value; by default `width / heads`.
        short_kernel: Taps of the short convolution.

    Raises:
        ValueError: if a number is out of range. Also if `state_size` or `value_width` is not given
            and the heads do not divide the width.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        state_size: int | None = None,
        value_width: int | None = None,
        *,
        short_kernel: int = 4,
    ) -> None:
        check_sizes(heads=heads)
        sizes = state_size, value_width, None
        self._build(width, heads, sizes, short_kernel, "silu", 2 * heads)
        self.dynamics = _DeltaDynamics(heads)

    @property
    def scalar_gates(self) -> bool:
        return False

    def config(self) -> dict[str, Any]:
        own = super().config()
        del own["feature_map"], own["feature_size"]  # always SiLU, without a map
        return own

    def _read(self, mixed: Tensor, rest: Tensor) -> tuple[Coefficients, Tensor]:
        q, k, v = self._qkv(silu(mixed))
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _EPS) for x in (q, k))
        q = q * self.state_size**-0.5
        beta, logits = rest[..., : self.gate_features].chunk(2, dim=-1)
        beta = torch.sigmoid(beta.to(q.dtype)).mT.unsqueeze(-1)  # (batch, heads, length, 1)
        alpha = self.dynamics(logits)
        stored = beta * k
        agreement = (q * k).sum(-1, keepdim=True)
        C = alpha * (q - beta * agreement * k)
        direct = (beta * agreement).squeeze(-1)
        return Coefficients(alpha.expand_as(k), stored, C, direct, -alpha * stored, k), v
