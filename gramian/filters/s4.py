r"""S4: discretized state spaces whose matrix in continuous time is diagonal plus low rank.

The system is `x' = A x + B u`, `y = C x + D u` with `A = Λ - P P*` (S4, Gu et al. 2022, arXiv
2111.00396, section 3.2), initialized with HiPPO-LegS. The bilinear transform with a step dt is

    Ā = (1 - dt A / 2)^{-1} (1 + dt A / 2),  B̄ = (1 - dt A / 2)^{-1} dt B.

The transform keeps A diagonal plus rank one (Woodbury). With `R = (1 - dt Λ / 2)^{-1}` and
`γ = 1 / (1 + dt/2 P* R P)`,

    Ā = (2 R - 1) - dt γ R P P* R,  B̄ = dt (R B - dt/2 γ R P P* R B),

and `h_t = C Ā^t B̄`, plus D at t = 0. Inner products sum over the modes and their conjugates.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gramian._checks import check_choice, check_positive
from gramian.filters._filter import register
from gramian.filters._hippo import normal_plus_low_rank
from gramian.filters._rational import RationalFilter
from gramian.filters.s4d import check_state_space
from gramian.systems import DPLR

__all__ = ["S4"]


@register("s4")
class S4(RationalFilter):
    """State spaces with `A = Λ - P P*`, of `state_size / 2` conjugate pairs for every channel.

    The parameters are real. `log_dt` and `D` are (channels), `log_A_real` and `A_imag` are
    (channels, n/2), and `P`, `B` and `C` are (channels, n/2, 2). They give
    `Λ = -exp(log_A_real) + i A_imag`. The real part of Λ is negative, and `-P P*` only adds
    damping, so the system is stable for any parameters. C itself is learned, whereas the published
    code learns `C (1 - Ā^L)`. So the kernel does not depend on the length for which it is
    evaluated.

    Args:
        channels: The number of filters.
        state_size: The number n of real states of every channel. It is even, since modes come in
            conjugate pairs.
        max_length: The number of taps that kernels have in training. The kernel continues beyond
            them.
        initialization: The initial A and B. "legs", the only choice, is HiPPO-LegS.
        dt_min: The smallest initial step. The initial steps are log-uniform.
        dt_max: The largest initial step.
        lr: The largest learning rate for the parameters of the dynamics, which are all but C and D.

    Raises:
        ValueError: if an argument does not have one of the values described here.
    """

    def __init__(
        self,
        channels: int,
        state_size: int,
        max_length: int,
        initialization: str = "legs",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        lr: float = 1e-3,
    ) -> None:
        super().__init__(channels, max_length)
        check_state_space(state_size, dt_min, dt_max, lr)
        check_choice("initialization", initialization, ("legs",))
        self.state_size = state_size
        self.initialization = initialization
        self.dt_min, self.dt_max = dt_min, dt_max
        self.lr = lr
        modes = state_size // 2
        self.log_dt = nn.Parameter(torch.empty(channels))
        self.log_A_real = nn.Parameter(torch.empty(channels, modes))
        self.A_imag = nn.Parameter(torch.empty(channels, modes))
        self.P = nn.Parameter(torch.empty(channels, modes, 2))
        self.B = nn.Parameter(torch.empty(channels, modes, 2))
        self.C = nn.Parameter(torch.empty(channels, modes, 2))
        self.D = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set A and B to HiPPO-LegS, and draw the other parameters.

        Steps are log-uniform, C is complex normal of unit variance, and D is standard normal.
        """
        nn.init.uniform_(self.log_dt, math.log(self.dt_min), math.log(self.dt_max))
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        nn.init.normal_(self.D)
        hippo = normal_plus_low_rank(self.state_size)
        self.log_A_real.copy_((-hippo.diagonal.real).log())
        self.A_imag.copy_(hippo.diagonal.imag)
        self.P.copy_(torch.view_as_real(hippo.P))
        self.B.copy_(torch.view_as_real(hippo.B))

    def forward(self, length: int | None = None) -> DPLR:
        diagonal = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        P, B, C = (torch.view_as_complex(pairs.double()) for pairs in (self.P, self.B, self.C))
        dt = self.log_dt.double().exp().unsqueeze(-1)
        resolvent = 1 / (1 - dt / 2 * diagonal)  # R
        reads = P.conj_physical() * resolvent  # P* R
        gain = dt / (1 + dt / 2 * _both(reads, P))  # dt γ
        enters = gain * resolvent * P
        poles = 2 * resolvent - 1
        first = dt * resolvent * B - dt / 2 * enters * _both(reads, B)  # B̄
        # y = C x_{t+1} + D u = C Ā x_t + (C B̄ + D) u
        output = C * poles - reads * _both(C, enters)  # C Ā
        d = self.D + _both(C, first).squeeze(-1)
        return DPLR(poles, first, output, enters, reads, d.to(self.D.dtype))

    @torch.no_grad()
    def poles(self) -> Tensor:
        return self(1).state_space().poles()

    @torch.no_grad()
    def resample(self, step: float) -> None:
        check_positive(step=step)
        self.log_dt.add_(math.log(step))

    def optimizer_hints(self) -> dict[str, dict[str, float]]:
        """Return optimizer options for the parameters of the dynamics.

        The options are a learning rate of at most `lr`, and no weight decay. Weight decay would
        drive A and dt to meaningless values.
        """
        names = ("log_dt", "log_A_real", "A_imag", "P", "B")
        return {name: {"lr": self.lr, "weight_decay": 0.0} for name in names}

    def config(self) -> dict[str, Any]:
        return {
            **super().config(),
            "state_size": self.state_size,
            "initialization": self.initialization,
            "dt_min": self.dt_min,
            "dt_max": self.dt_max,
            "lr": self.lr,
        }


def _both(row: Tensor, column: Tensor) -> Tensor:
    """Multiply a row and a column, and sum over all modes and their conjugates: (*C, 1), real."""
    return 2 * (row * column).real.sum(-1, keepdim=True)
