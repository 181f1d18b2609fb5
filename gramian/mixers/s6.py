r"""S6, Mamba's scan: `h_t = exp(-Δ_t a) h_{t-1} + Δ_t B_t x_t`, `y_t = C_t · h_t + D x_t`.

Every channel has its own n states. Δ, B and C are computed from the input, and a is initialized to
1, 2, …, n (Gu and Dao 2023, arXiv 2312.00752, algorithm 2 and section 3.4).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from gramian._checks import check_sizes
from gramian.mixers.linear_recurrence import Coefficients, Dynamics, LinearRecurrence, steps_of_time
from gramian.mixers.registry import register
from gramian.ops.diagonal_scan import diagonal_scan
from gramian.ops.kernels import runs_in_triton
from gramian.ops.kernels.selective_scan import selective_scan
from gramian.ops.packed import Linear

__all__ = ["S6"]


class _SelectiveDynamics(Dynamics):
    """The parameters of `Δ = softplus(x + bias)`, of the rates `a = exp(A_log)`, and D."""

    def __init__(self, channels: int, state_size: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(channels, state_size))
        self.dt_bias = nn.Parameter(torch.empty(channels))
        self.D = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the rates to 1 … n and D to 1, and draw Δ log-uniformly from [0.001, 0.1]."""
        nn.init.ones_(self.D)
        steps_of_time(self.dt_bias)
        rates = torch.arange(1, self.A_log.shape[1] + 1, device=self.A_log.device)
        self.A_log.detach().copy_(rates.log())

    @torch.no_grad()
    def slow(self, amount: Tensor) -> None:
        """Divide the rates by `exp(amount)`, which acts as a normalization factor."""
        self.A_log.sub_(amount.unsqueeze(-1))

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute Δ from its logits (batch, length, channels).

        Returns:
            Δ in the shape of the logits, the rates (channels, n), and D (channels).
        """
        return softplus(logits.to(self.dt_bias.dtype) + self.dt_bias), self.A_log.exp(), self.D


class SelectiveSteps(NamedTuple):
    """The inputs of a selective scan, which are n times smaller than its coefficients."""

    dt: Tensor
    """Δ, (batch, length, channels)."""
    rates: Tensor
    """a, (channels, n)."""
    B: Tensor
    """(batch, length, n), and C has the same shape."""
    C: Tensor
    skip: Tensor
    """D, (channels)."""

    def masked(self, mask: Tensor) -> SelectiveSteps:
        """Return steps that have Δ = 0 where the mask (batch, length) is zero."""
        return self._replace(dt=self.dt * (mask != 0).to(self.dt.device).unsqueeze(-1))

    def steps(self, start: int, stop: int) -> SelectiveSteps:
        dt, B, C = (tensor[:, start:stop] for tensor in (self.dt, self.B, self.C))
        return self._replace(dt=dt, B=B, C=C)

    def _gates(self) -> Tensor:
        """Return the gates, (batch, length, channels, n)."""
        return torch.exp(self.dt.unsqueeze(-1) * -self.rates)

    def _direct(self) -> Tensor:
        """Return the factor from each input to its own output, (batch, length, channels)."""
        return self.dt * (self.B * self.C).sum(-1, keepdim=True) + self.skip

    def coefficients(self) -> Coefficients:
        a = self._gates()
        B, C = self.dt.unsqueeze(-1) * self.B.unsqueeze(2), a * self.C.unsqueeze(2)
        a, B, C = (tensor.transpose(1, 2) for tensor in (a, B, C))
        return Coefficients(a, B, C, self._direct().mT)

    def run(self, values: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        x = values.squeeze(-1).mT  # (batch, length, channels); states have n as a last dimension
        if runs_in_triton(x):
            start = memory.squeeze(-1)
            y, end = selective_scan(x, self.dt, self.rates, self.B, self.C, self.skip, start)
            return y.mT.unsqueeze(-1), end.unsqueeze(-1)
        a = self._gates()
        inputs = (self.dt * x).unsqueeze(-1) * self.B.unsqueeze(2)
        states, end = diagonal_scan(a.transpose(1, 2), inputs.transpose(1, 2), memory.squeeze(-1))
        with torch.autocast(x.device.type, enabled=False):
            carried = (a * states.transpose(1, 2)) @ self.C.unsqueeze(-1)
        y = carried.squeeze(-1) + self._direct() * x
        return y.mT.unsqueeze(-1), end.unsqueeze(-1)

    def step(self, values: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return self.coefficients().step(values, memory)


@register("s6")
class S6(LinearRecurrence):
    """Mamba's block: projection, short convolution, selective scan, gate and projection.

    The operator has one system for each of the `expand × width` channels of the scan. A system acts
    on its channel's samples after the short convolution, and includes the skip D.

    Args:
        width: Channels of input and output.
        state_size: n, the number of states of a channel.
        expand: Number of channels of the scan, in multiples of the width.
        step_rank: Rank of the map from the input to Δ; by default ⌈width / 16⌉.
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
        self.expand = expand
        self.step_rank = step_rank
        self.x_proj = Linear(channels, step_rank + 2 * state_size, bias=False)
        self.dt_proj = Linear(step_rank, channels, bias=False)
        self.dynamics = _SelectiveDynamics(channels, state_size)

    def config(self) -> dict[str, Any]:
        return super().config() | {"expand": self.expand, "step_rank": self.step_rank}

    def _most_elements(self, device: torch.device) -> int:
        if device.type == "cpu":
            return 2**20  # so that they fit into the cache of the processor
        return super()._most_elements(device)

    def _read(self, mixed: Tensor, rest: Tensor) -> tuple[SelectiveSteps, Tensor]:
        x = silu(mixed)
        n = self.state_size
        low, B, C = self.x_proj(x).split((self.step_rank, n, n), dim=-1)
        dt, rates, skip = self.dynamics(self.dt_proj(low))
        steps = SelectiveSteps(dt, rates, B.to(dt.dtype), C.to(dt.dtype), skip)
        return steps, x.mT.to(dt.dtype).unsqueeze(-1)

    def _write(self, y: Tensor, rest: Tensor) -> Tensor:
        return y.squeeze(-1).mT * silu(rest.to(y.dtype))
