r"""S4D: diagonal state spaces in continuous time, discretized.

The system is `x' = A x + B u`, `y = 2 Re C x + D u`, where A is diagonal and complex. It has one
mode of each conjugate pair (S4D, Gu et al. 2022, arXiv 2206.11893). With a step dt for every
channel (section 3.1 of the paper), there are two discretizations:

    zoh:       Ā = exp(dt A),                      B̄ = (exp(dt A) - 1) / A
    bilinear:  Ā = (1 + dt A / 2) / (1 - dt A / 2),  B̄ = dt / (1 - dt A / 2)

The kernel is `h_t = 2 Re Σ_k C_k B̄_k Ā_k^t`, plus D at t = 0. This is a modal system with the
poles Ā and the residues `2 C B̄ Ā`. Only the product of B and C matters, so B = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian._checks import check_choice, check_positive
from gramian.filters._filter import register
from gramian.filters._hippo import normal_plus_low_rank
from gramian.filters._rational import ModeFilter, Selection, with_conjugates
from gramian.systems import Modal

__all__ = ["S4D"]

_INITIALIZATIONS = ("legs", "lin", "inv")
_DISCRETIZATIONS = ("zoh", "bilinear")


@register("s4d")
class S4D(ModeFilter):
    """Diagonal state spaces of `state_size / 2` conjugate pairs of modes for every channel.

    The parameters are real. `log_dt` and `D` are (channels), `log_A_real` and `A_imag` are
    (channels, n/2), and `C` is (channels, n/2, 2). They give `A = -exp(log_A_real) + i A_imag`. The
    real part of A stays negative, so the poles stay inside the unit circle. Poles are computed and
    kept in double precision, and the kernel's samples in the precision of the parameters.

    Args:
        channels: The number of filters.
        state_size: The number n of real states of every channel. It is even, since modes come in
            conjugate pairs.
        max_length: The number of taps that kernels have in training. The kernel continues beyond
            them.
        initialization: The initial A, whose real parts are -1/2. "legs" takes the eigenvalues of
            the normal part of HiPPO-LegS, and scales C by its B (S4D-LegS). "lin" takes `πk i`,
            k = 0 … n/2 - 1 (S4D-Lin). "inv" takes `n/π (n / (2k + 1) - 1) i` (S4D-Inv; equations 8
            and 9 in the paper).
        discretization: "zoh" (zero-order hold) or "bilinear".
        dt_min: The smallest initial step. The initial steps are log-uniform.
        dt_max: The largest initial step.
        lr: The largest learning rate for `log_dt`, `log_A_real` and `A_imag`.
        orders: The number of modes of every channel, which come first among its n/2 modes. The
            other modes are padding. By default all modes are in use. Truncation in training sets
            it.

    Raises:
        ValueError: if an argument does not have one of the values described here.
    """

    def __init__(
        self,
        channels: int,
        state_size: int,
        max_length: int,
        initialization: str = "legs",
        discretization: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        lr: float = 1e-3,
        orders: Sequence[int] | None = None,
    ) -> None:
        super().__init__(channels, max_length)
        check_state_space(state_size, dt_min, dt_max, lr)
        check_choice("initialization", initialization, _INITIALIZATIONS)
        check_choice("discretization", discretization, _DISCRETIZATIONS)
        self.state_size = state_size
        self.initialization = initialization
        self.discretization = discretization
        self.dt_min, self.dt_max = dt_min, dt_max
        self.lr = lr
        modes = state_size // 2
        self.orders = None if orders is None else tuple(int(order) for order in orders)
        if self.orders is not None and (
            len(self.orders) != channels or not all(0 <= order <= modes for order in self.orders)
        ):
            raise ValueError(
                f"orders must be None or one number of modes, at most {modes}, for each of "
                f"{channels} channels; got {orders!r}."
            )
        self.log_dt = nn.Parameter(torch.empty(channels))
        self.log_A_real = nn.Parameter(torch.empty(channels, modes))
        self.A_imag = nn.Parameter(torch.empty(channels, modes))
        self.C = nn.Parameter(torch.empty(channels, modes, 2))
        self.D = nn.Parameter(torch.empty(channels))
        present = None if orders is None else torch.empty(channels, modes, dtype=torch.bool)
        self.register_buffer("_present", present, persistent=False)
        self.reset_parameters()

    _present: Tensor | None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set A as `initialization` says, and draw the other parameters.

        Steps are log-uniform, C is complex normal of unit variance (times the moduli of HiPPO's B
        for "legs"), and D is standard normal.
        """
        nn.init.uniform_(self.log_dt, math.log(self.dt_min), math.log(self.dt_max))
        nn.init.constant_(self.log_A_real, math.log(0.5))
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        nn.init.normal_(self.D)
        n = self.state_size
        k = torch.arange(n // 2, dtype=torch.float64, device="cpu")
        if self.initialization == "legs":
            hippo = normal_plus_low_rank(n)
            self.A_imag.copy_(hippo.diagonal.imag)
            self.C.mul_(hippo.B.abs().unsqueeze(-1).to(self.C))
        elif self.initialization == "lin":
            self.A_imag.copy_(math.pi * k)
        else:
            self.A_imag.copy_(n / math.pi * (n / (2 * k + 1) - 1))
        self.reset_buffers()

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Mark the modes that are in use, if some are padding."""
        if self._present is not None:
            used = torch.tensor(self.orders, device="cpu").unsqueeze(-1)
            self._present.copy_(torch.arange(self.state_size // 2, device="cpu") < used)

    def forward(self, length: int | None = None) -> Modal:
        A = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        dt = self.log_dt.double().exp().unsqueeze(-1)
        step = dt * A
        if self.discretization == "zoh":
            growth = torch.expm1(step)
            poles, B = 1 + growth, growth / A
        else:
            half = 1 / (1 - step / 2)
            poles, B = (1 + step / 2) * half, dt * half
        C = torch.view_as_complex(self.C)
        first = 2 * C.to(B.dtype) * B  # h_t = Re Σ first poles^t
        if self._present is not None:
            first = torch.where(self._present, first, 0)
        d = self.D + first.real.sum(-1)
        return Modal(poles, (first * poles).to(C.dtype), d.to(self.D.dtype), counts=self.orders)

    @torch.no_grad()
    def poles(self) -> Tensor:
        """Return the poles of every channel, with their conjugates: (channels, n), complex128.

        The padding of channels with fewer modes than others is zero.
        """
        poles = self(1).poles
        return with_conjugates(
            poles if self._present is None else torch.where(self._present, poles, 0)
        )

    @torch.no_grad()
    def resample(self, step: float) -> None:
        check_positive(step=step)
        self.log_dt.add_(math.log(step))

    @torch.no_grad()
    def keep_modes(self, kept: Tensor) -> dict[str, Selection]:
        self._check_kept(kept, self.state_size // 2)
        kept = kept if self._present is None else kept & self._present
        width = max(1, int(kept.sum(-1).max()))
        place = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)[:, :width]
        inside = kept.gather(1, place)

        def select(numbers: Tensor) -> Tensor:
            rest = (1,) * (numbers.ndim - 2)
            index = place.reshape(*place.shape, *rest).expand(-1, -1, *numbers.shape[2:])
            return numbers.gather(1, index) * inside.reshape(*inside.shape, *rest)

        selections: dict[str, Selection] = dict.fromkeys(("log_A_real", "A_imag", "C"), select)
        self.orders = tuple(kept.sum(-1).tolist())
        self.state_size = 2 * width
        self._replace(selections)
        self._present = torch.empty_like(inside)
        self.reset_buffers()
        return selections

    def optimizer_hints(self) -> dict[str, dict[str, float]]:
        """Return optimizer options for the parameters of the dynamics.

        The options are a learning rate of at most `lr`, and no weight decay. Weight decay would
        drive A and dt to meaningless values.
        """
        return {
            name: {"lr": self.lr, "weight_decay": 0.0}
            for name in ("log_dt", "log_A_real", "A_imag")
        }

    def config(self) -> dict[str, Any]:
        return {
            **super().config(),
            "state_size": self.state_size,
            "initialization": self.initialization,
            "discretization": self.discretization,
            "dt_min": self.dt_min,
            "dt_max": self.dt_max,
            "lr": self.lr,
            "orders": None if self.orders is None else list(self.orders),
        }


def check_state_space(state_size: Any, dt_min: float, dt_max: float, lr: float) -> None:
    """Raise a ValueError unless the arguments of a continuous-time state space are valid."""
    if not isinstance(state_size, int) or state_size < 2 or state_size % 2:
        raise ValueError(
            "state_size must be even and at least 2, since modes come in conjugate pairs; got "
            f"{state_size!r}."
        )
    if not 0 < dt_min <= dt_max < math.inf:
        raise ValueError(f"dt_min and dt_max must be 0 < dt_min <= dt_max; got {dt_min}, {dt_max}.")
    if not lr > 0:
        raise ValueError(f"lr must be positive; got {lr}.")
