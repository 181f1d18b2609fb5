r"""Modal filters: poles and residues as parameters, with an order for every channel.

`λ_k = exp(-exp(log_decay_k) + iπ angle_k)` lies inside the unit circle for any parameters. An angle
of exactly 0 or 1 gives a real pole. Residues are pairs of real numbers, so no complex tensor is
stored. Poles that are not bounded are `exp(-decay_k + iπ angle_k)`. Real modes have no angle, and
one number for each residue, like the modes of the long filters of StripedHyena 2 (Ku et al. 2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from gramian._checks import check_positive
from gramian.filters._filter import check_lr, register
from gramian.filters._rational import ModeFilter, Selection, with_conjugates
from gramian.reduction.residues import fit_residues
from gramian.systems import Modal

__all__ = ["ModalFilter"]

_MAX_LOG_DECAY = 4.0  # |λ| = exp(-exp(4)) ≈ 2e-24, which is practically a pole at zero
_MIN_LOG_DECAY = -30.0  # |λ| = 1 - 1e-13, the slowest decay that a parameter can hold


@register("modal")
class ModalFilter(ModeFilter):
    """Filters `h_0 = d`, `h_t = Re Σ_k residues_k λ_k^(t-1)`, the form that distillation gives.

    Args:
        channels: The number of filters.
        orders: The number of modes of every channel, or one number for all channels. A mode is a
            real pole or a conjugate pair. Parameters are stored without padding, channel after
            channel.
        max_length: The number of taps over which the filter was trained or fitted. Its kernel
            continues beyond them.
        lr: The learning rate of the poles; by default that of the model.
        bounded: Whether poles are held inside the unit circle. Published modal models leave them
            free, so some may be outside, which does no harm over few taps.
        real: Whether all poles and residues are real. Real poles are in (0, 1) if `bounded`, and
            above 0 if not. States of a real filter hold one number for each mode instead of two.

    Raises:
        ValueError: if `orders` does not have one non-negative number for every channel, or if `lr`
            is negative.
    """

    def __init__(
        self,
        channels: int,
        orders: int | Sequence[int],
        max_length: int,
        lr: float | None = None,
        bounded: bool = True,
        real: bool = False,
    ) -> None:
        super().__init__(channels, max_length)
        listed = [orders] * channels if isinstance(orders, int) else [int(o) for o in orders]
        if len(listed) != channels or min(listed) < 0:
            raise ValueError(
                f"orders must be one non-negative integer for each of {channels} channels; got "
                f"{orders!r}."
            )
        self.orders = tuple(listed)
        self.lr = check_lr(lr)
        self.bounded = bounded
        modes = sum(self.orders)
        if bounded:
            self.log_decay = nn.Parameter(torch.empty(modes))
        else:
            self.decay = nn.Parameter(torch.empty(modes))
        self.real = real
        self.angle = None if real else nn.Parameter(torch.empty(modes))
        self.residues = nn.Parameter(torch.empty(modes, 1 if real else 2))
        self.d = nn.Parameter(torch.empty(channels))
        self.register_buffer("_slot", torch.empty(modes, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    _slot: Tensor

    @classmethod
    def from_system(
        cls,
        system: Modal,
        max_length: int,
        kernel: Tensor | None = None,
        bounded: bool = True,
    ) -> Self:
        """Make a filter whose system is `system`, without its padding.

        Parameters are rounded to float32. The filter stores poles in another form than the system,
        so their rounding differs. This shifts the phases of the modes over thousands of taps. If
        `kernel` is given, residues are fitted again to the rounded poles of the filter.

        Args:
            system: A system with one channel dimension, whose poles are inside the unit circle if
                the filter is `bounded`. If the system is `real`, the filter is real too, and the
                poles must be positive.
            max_length: As in the class.
            kernel: (*C, L), real floating point, finite: the taps of which the system is a
                reduction.
            bounded: As in the class.

        Raises:
            ValueError: if the filter is bounded and a pole with a nonzero residue is not inside the
                unit circle, if the filter is real and such a pole is not positive, or if the kernel
                does not have the system's channels.
        """
        if kernel is not None and kernel.shape[:-1] != system.d.shape:
            raise ValueError(
                f"a kernel for channels {tuple(system.d.shape)} has shape (*channels, taps); got "
                f"{tuple(kernel.shape)}."
            )
        radius = system.spectral_radius()
        if bounded and bool((radius >= 1).any()):
            raise ValueError(
                "a bounded modal filter holds poles inside the unit circle only; got spectral "
                f"radius {float(radius.max()):.9g}."
            )
        kept = system.residues != 0
        poles = system.poles[kept].to(torch.complex128)
        real = system.real
        if real and bool((poles.real <= 0).any()):
            raise ValueError(
                "a real modal filter holds positive poles only; got one of "
                f"{float(poles.real.min()):.9g}."
            )
        built = cls(len(kept), kept.sum(-1).tolist(), max_length, bounded=bounded, real=real)
        decay = -poles.abs().clamp_min(torch.finfo(torch.float64).tiny).log()
        with torch.no_grad():
            if bounded:
                built.log_decay.copy_(decay.log().clamp(_MIN_LOG_DECAY, _MAX_LOG_DECAY))
            else:
                built.decay.copy_(decay.clamp(max=math.exp(_MAX_LOG_DECAY)))
            if built.angle is not None:
                built.angle.copy_(poles.angle() / math.pi)
            built.residues.copy_(built._stored(system.residues[kept]))
            built.d.copy_(system.d)
        built = built.to(system.device)
        if kernel is not None and kernel.shape[-1] > 1 and len(built.residues):
            built.refit_residues(kernel)
        return built

    @torch.no_grad()
    def refit_residues(self, kernel: Tensor) -> None:
        """Fit residues to the current poles by least squares, and keep them if this is closer.

        Every channel keeps the residues, old or new, whose impulse response is closer to the taps.

        Args:
            kernel: (channels, L), real floating point: the taps to fit.
        """
        held, taps = self(), kernel.detach().double()
        width = max(self.orders)
        stored = torch.zeros(self.channels * width, dtype=torch.bool, device=kernel.device)
        stored[self._slot] = True
        stored = stored.reshape(self.channels, width)
        poles = torch.where(stored, held.poles, torch.nan).to(torch.complex128)
        fit = fit_residues(taps[:, 1:], poles, self.residues.dtype)
        residues = fit.residues.to(held.residues.dtype)
        if self.real:
            residues = residues.real + 0j
        fitted = Modal(held.poles, residues, held.d)
        old, new = (
            (system.impulse_response(taps.shape[-1]).double() - taps).norm(dim=-1)
            for system in (held, fitted)
        )
        residues = torch.where((new < old).unsqueeze(-1), residues, held.residues)
        self.residues.copy_(self._stored(residues[stored]))

    def _stored(self, residues: Tensor) -> Tensor:
        """Return complex residues (modes) as the filter stores them, (modes, 2) or (modes, 1)."""
        return torch.view_as_real(residues.resolve_conj())[:, : self.residues.shape[1]]

    @torch.no_grad()
    def resample(self, step: float) -> None:
        check_positive(step=step)
        system = self().resample(step)
        if self.bounded:
            self.log_decay.add_(math.log(step)).clamp_(_MIN_LOG_DECAY, _MAX_LOG_DECAY)
        else:
            self.decay.mul_(step)
        if self.angle is not None:  # in half turns
            principal = torch.remainder(self.angle.double() + 1, 2) - 1
            self.angle.copy_(torch.remainder(principal * step + 1, 2) - 1)
        self.residues.copy_(self._stored(system.residues.flatten()[self._slot]))
        self.d.copy_(system.d)

    @torch.no_grad()
    def keep_modes(self, kept: Tensor) -> dict[str, Selection]:
        self._check_kept(kept, max(self.orders))
        stored = kept.flatten()[self._slot]

        def select(numbers: Tensor) -> Tensor:
            return numbers[stored]

        names = ["log_decay" if self.bounded else "decay", "residues"]
        selections: dict[str, Selection] = dict.fromkeys(
            names + ([] if self.real else ["angle"]), select
        )
        channel = self._slot[stored] // max(self.orders)
        self.orders = tuple(torch.bincount(channel, minlength=self.channels).tolist())
        self._replace(selections)
        self._slot = torch.empty_like(self._slot[stored])
        self.reset_buffers()
        return selections

    def reset_parameters(self) -> None:
        """Draw the initial parameters.

        Decay times are log-uniform over `max_length`, angles are uniform over the half circle, and
        residues have unit energy per channel.
        """
        slowest = -math.log(max(self.max_length, 2))
        if self.bounded:
            nn.init.uniform_(self.log_decay, slowest, 0.0)
        else:
            nn.init.uniform_(self.decay, slowest, 0.0)
            with torch.no_grad():
                self.decay.exp_()
        if self.angle is not None:
            nn.init.uniform_(self.angle, 0.0, 1.0)
        nn.init.normal_(self.residues, std=1 / max(1.0, sum(self.orders) / self.channels))
        nn.init.normal_(self.d)
        self.reset_buffers()

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Compute the place of each stored mode in the padded (channels, modes) array."""
        width = max(self.orders)
        slots = [c * width + k for c, order in enumerate(self.orders) for k in range(order)]
        self._slot.copy_(torch.tensor(slots, dtype=torch.int64))

    def forward(self, length: int | None = None) -> Modal:
        # exp and the polar form use double precision, so that a float32 parameter loses nothing.
        decay = torch.exp(self.log_decay.double()) if self.bounded else self.decay.double()
        radius = torch.exp(-decay)
        if self.angle is None:
            poles = radius.unsqueeze(-1)
        else:
            angle = math.pi * self.angle.double()
            poles = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
        shape = (self.channels, max(self.orders), 2)

        def pad(numbers: Tensor) -> Tensor:
            pairs = nn.functional.pad(numbers, (0, 2 - numbers.shape[1]))
            if min(self.orders) == max(self.orders):  # every mode is in its place
                return torch.view_as_complex(pairs.reshape(shape))
            flat = pairs.new_zeros(shape[0] * shape[1], 2)
            return torch.view_as_complex(flat.index_copy(0, self._slot, pairs).reshape(shape))

        padded = pad(poles.to(self.residues.dtype)), pad(self.residues)
        # This is a copy, because a sharded parameter is whole only until this function returns.
        return Modal(*padded, self.d.clone(), counts=self.orders, real=self.real)

    @torch.no_grad()
    def poles(self) -> Tensor:
        """Return the poles of every channel, with their conjugates: (channels, n), complex128.

        Channels with fewer modes than others are padded with zeros.
        """
        poles = self(1).poles
        return poles.to(torch.complex128) if self.real else with_conjugates(poles)

    def config(self) -> dict[str, Any]:
        return {
            **super().config(),
            "orders": list(self.orders),
            "lr": self.lr,
            "bounded": self.bounded,
            "real": self.real,
        }

    def optimizer_hints(self) -> dict[str, dict[str, float]]:
        """Return no weight decay for the poles, and their learning rate if `lr` is given."""
        options = {"weight_decay": 0.0} | ({} if self.lr is None else {"lr": self.lr})
        names = ["log_decay" if self.bounded else "decay"] + ([] if self.real else ["angle"])
        return {name: dict(options) for name in names}

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, modes={min(self.orders)}…{max(self.orders)}, "
            f"max_length={self.max_length}"
        )
