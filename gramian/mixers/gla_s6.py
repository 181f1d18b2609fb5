r"""GLA-S6: gated linear attention with S6's gates, `a_t = exp(-Δ_t (1, 2, …, n) / c)`.

In S6 (`gramian.mixers.s6`), state j decays j times as fast as the first state. A larger n therefore
adds states with hardly any memory, and the effective state-size stops growing. Here the rates are
divided by a normalization factor c that grows with n, so the same range of rates is spread over
more states (arXiv 2504.19561, on GLA-S6).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from gramian._checks import check_sizes
from gramian.mixers.linear_attention import LinearAttention
from gramian.mixers.linear_recurrence import Coefficients, Dynamics, steps_of_time
from gramian.mixers.registry import register

__all__ = ["GLAS6"]


class _NormalizedDynamics(Dynamics):
    """The parameters of a head's `Δ = softplus(x + bias)` and its n rates `exp(A_log) / c`."""

    def __init__(self, heads: int, state_size: int, normalization: float) -> None:
        super().__init__()
        self.normalization = normalization
        self.A_log = nn.Parameter(torch.empty(heads, state_size))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the rates to (1 … n) / c and draw Δ log-uniformly from [0.001, 0.1]."""
        steps_of_time(self.dt_bias)
        rates = torch.arange(1, self.A_log.shape[1] + 1, device=self.A_log.device)
        self.A_log.detach().copy_(rates.log())

    @torch.no_grad()
    def slow(self, amount: Tensor) -> None:
        """Divide the rates by `exp(amount)`, as a larger normalization factor does."""
        self.A_log.sub_(amount.unsqueeze(-1))

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gates from their logits (batch, length, heads).

        Returns:
            Δ, (batch, heads, length, 1), and the gates, (batch, heads, length, n).
        """
        dt = softplus(logits.to(self.dt_bias.dtype) + self.dt_bias).mT.unsqueeze(-1)
        return dt, torch.exp(-dt * self.A_log.exp().unsqueeze(1) / self.normalization)


@register("gla_s6")
class GLAS6(LinearAttention):
    """Linear attention in heads whose memory decays as in S6 (GLA-S6).

    The memory of a head is `S_t = exp(-Δ_t a / c) S_{t-1} + Δ_t k_t v_tᵀ`, with one Δ_t per head
    and one rate a for each of its n states. Queries, keys, values, norm and output gate are the
    same as in `LinearAttention`.

    Args:
        width: Channels of input and output. All arguments that are not listed here are as in
            `LinearAttention`.
        normalization: The divisor c of the rates, positive; n by default. With 1, the rates are the
            same as in S6.

    Raises:
        ValueError: if an argument is invalid for `LinearAttention`, or if the normalization is not
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
        normalization: float | None = None,
    ) -> None:
        if normalization is not None and not normalization > 0:
            raise ValueError(f"normalization must be positive or None; got {normalization!r}.")
        check_sizes(heads=heads)
        sizes = state_size, value_width, feature_size
        self._build(width, heads, sizes, short_kernel, feature_map, heads)
        c = self.state_size if normalization is None else normalization
        self.dynamics = _NormalizedDynamics(heads, self.state_size, c)

    @property
    def scalar_gates(self) -> bool:
        return False

    def config(self) -> dict[str, Any]:
        return super().config() | {"normalization": self.dynamics.normalization}

    def _read(self, mixed: Tensor, rest: Tensor) -> tuple[Coefficients, Tensor]:
        dt, a = self.dynamics(rest[..., : self.gate_features])
        q, k, v = self._qkv(mixed)
        q, k = self.map_features(q, k)
        k = dt * k
        return Coefficients(a, k, a * q, (q * k).sum(-1)), v
