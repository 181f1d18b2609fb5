r"""S6, Mamba's scan: ``h_t = exp(-Δ_t a) h_{t-1} + Δ_t B_t x_t``, ``y_t = C_t · h_t + D x_t``.

Gu and Dao 2023 (arXiv 2312.00752), algorithm 2 and section 3.4: every channel has n states of its
own; Δ, B and C are made from the input, a = 1, 2, …, n to begin with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from gramian.mixers._linear_recurrence import (
    Coefficients,
    Dynamics,
    LinearRecurrence,
    check_sizes,
    steps_of_time,
)
from gramian.ops.packed import Linear

__all__ = ["S6"]


class _SelectiveDynamics(Dynamics):
    """``Δ = softplus(x + bias)``, rates ``a = exp(A_log)``, and the skip D."""

    def __init__(self, channels: int, state_size: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(channels, state_size))
        self.dt_bias = nn.Parameter(torch.empty(channels))
        self.D = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """a = 1 … n, Δ log-uniform in [0.001, 0.1], D = 1."""
        nn.init.ones_(self.D)
        steps_of_time(self.dt_bias)
        rates = torch.arange(1, self.A_log.shape[1] + 1, device=self.A_log.device)
        self.A_log.detach().copy_(rates.log())

    @torch.no_grad()
    def slow(self, amount: Tensor) -> None:
        """Divide the rates: a normalisation factor of ``exp(amount)``."""
        self.A_log.sub_(amount.unsqueeze(-1))

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Δ (batch, channels, length), gates (…, n), and D (channels, 1)."""
        dt = softplus(logits.to(self.dt_bias.dtype) + self.dt_bias).mT
        return dt, torch.exp(-dt.unsqueeze(-1) * self.A_log.exp().unsqueeze(1)), self.D[:, None]


class S6(LinearRecurrence):
    """Mamba's block: projection, short convolution, selective scan, gate, projection.

    Its operator is a system for each of ``expand × width`` channels, whose values are the channel's
    convolved samples; the skip D is part of it.

    Args:
        width: Channels of input and output.
        state_size: n, states of a channel.
        expand: Channels of the scan, in multiples of the width.
        step_rank: Rank of the map to Δ; by default ⌈width / 16⌉.
        short_kernel: Taps of the short convolution.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        width: int,
        state_size: int = 16,
        *,
        expand: int = 2,
        step_rank: int | None = None,
        short_kernel: int = 4,
    ) -> None:
        check_sizes(width=width, state_size=state_size, expand=expand)
        step_rank = -(-width // 16) if step_rank is None else step_rank
        check_sizes(step_rank=step_rank)
        channels = expand * width
        super().__init__(
            width,
            channels,
            state_size,
            1,
            convolved=channels,
            others=channels,
            inner=channels,
            short_kernel=short_kernel,
        )
        self.step_rank = step_rank
        self.x_proj = Linear(channels, step_rank + 2 * state_size, bias=False)
        self.dt_proj = Linear(step_rank, channels, bias=False)
        self.dynamics = _SelectiveDynamics(channels, state_size)

    def _read(self, mixed: Tensor, rest: Tensor) -> tuple[Coefficients, Tensor]:
        x = silu(mixed)
        n = self.state_size
        low, B, C = self.x_proj(x).split((self.step_rank, n, n), dim=-1)
        dt, a, skip = self.dynamics(self.dt_proj(low))
        B, C = B.to(dt.dtype), C.to(dt.dtype)
        direct = dt * (B * C).sum(-1).unsqueeze(1) + skip  # (batch, channels, length)
        B = dt.unsqueeze(-1) * B.unsqueeze(1)
        return Coefficients(a, B, a * C.unsqueeze(1), direct), x.mT.to(dt.dtype).unsqueeze(-1)

    def _write(self, y: Tensor, rest: Tensor) -> Tensor:
        return y.squeeze(-1).mT * silu(rest.to(y.dtype))
