r"""RTF: the coefficients of a rational transfer function as parameters.

``H(z) = h_0 + (b_1 z^-1 + … + b_n z^-n) / (1 + a_1 z^-1 + … + a_n z^-n)``, evaluated on roots of
unity by FFT, in time and memory that do not grow with n (RTF, Parnichkun et al. 2024, section 3).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from gramian.filters._filter import Filter, register
from gramian.systems import TransferFunction

__all__ = ["RTF"]

_INITIALIZATIONS = ("zeros", "xavier", "montel")


@register("rtf")
class RTF(Filter):
    """Rational filters with the truncated numerator of the published parametrisation.

    The kernel of ``max_length`` taps is exactly rational; coefficients are transformed and divided
    in float64, since in float32 the spectrum itself is off by more than 1e-4 for most stable
    systems beyond n = 16. The system that ``forward`` returns carries the exact numerator, so its
    recurrence computes the convolution that was learned.

    Args:
        channels: Number of filters.
        state_size: n, the degree of the denominators.
        max_length: Taps; fixes the grid of ``max_length + max_length % 2`` roots of unity whatever
            the length of an input. Greater than ``state_size``.
        numerator: "truncated", the state-free parametrisation.
        stability: "none": the denominators are free.
        num_denominators: Denominators, each shared by ``channels / num_denominators`` neighbouring
            channels; default: one for every channel.
        initialization: "zeros"; "xavier", uniform within ±1/√n, which can be unstable; "montel",
            uniform within ±1/n, inside the region where Montel's bound keeps all poles in the unit
            disc.

    Raises:
        ValueError: for an argument outside of these.
    """

    def __init__(
        self,
        channels: int,
        state_size: int,
        max_length: int,
        numerator: str = "truncated",
        stability: str = "none",
        num_denominators: int | None = None,
        initialization: str = "zeros",
    ) -> None:
        super().__init__(channels, max_length)
        if not 1 <= state_size < max_length:
            raise ValueError(
                f"state_size must lie in 1 … max_length - 1 = {max_length - 1}, got {state_size}."
            )
        if numerator != "truncated":
            raise ValueError(f'numerator must be "truncated", got {numerator!r}.')
        if stability != "none":
            raise ValueError(f'stability must be "none", got {stability!r}.')
        if initialization not in _INITIALIZATIONS:
            raise ValueError(
                f"initialization must be one of {', '.join(_INITIALIZATIONS)}, got "
                f"{initialization!r}."
            )
        num_denominators = channels if num_denominators is None else num_denominators
        if num_denominators < 1 or channels % num_denominators:
            raise ValueError(
                f"num_denominators must divide the {channels} channels, got {num_denominators}."
            )
        self.state_size = state_size
        self.numerator = numerator
        self.stability = stability
        self.num_denominators = num_denominators
        self.initialization = initialization
        self.a = nn.Parameter(torch.empty(num_denominators, state_size))
        self.b = nn.Parameter(torch.empty(channels, state_size))
        self.d = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Coefficients as ``initialization`` says, the direct term standard normal."""
        bound = {
            "zeros": 0.0,
            "xavier": 1 / math.sqrt(self.state_size),
            "montel": 1 / self.state_size,
        }[self.initialization]
        for parameter in (self.a, self.b):
            nn.init.uniform_(parameter, -bound, bound)
        nn.init.normal_(self.d)

    @property
    def grid(self) -> int:
        """Roots of unity on which the transfer function is sampled."""
        return self.max_length + self.max_length % 2

    def forward(self, length: int | None = None) -> TransferFunction:
        shared = (self.num_denominators, self.channels // self.num_denominators)
        system = TransferFunction.from_truncated(
            self.b.reshape(*shared, -1),
            self.a.unsqueeze(1),
            self.d.reshape(shared),
            self.grid,
            length=min(self.max_length, length or self.max_length),
            dtype=torch.float64,
        )
        return system.reshape_channels(self.channels)

    def config(self) -> dict[str, Any]:
        return {
            **super().config(),
            "state_size": self.state_size,
            "numerator": self.numerator,
            "stability": self.stability,
            "num_denominators": self.num_denominators,
            "initialization": self.initialization,
        }
