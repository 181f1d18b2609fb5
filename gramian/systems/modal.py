r"""Modal systems: poles and residues.

``H(z) = d + Re Σ_k residues_k z^-1 / (1 - poles_k z^-1)``, so ``h_0 = d`` and
``h_t = Re Σ_k residues_k poles_k^(t-1)`` (Laughing Hyena, equation 3.2). One complex entry stands
for a pole and its conjugate; a real pole is an entry with imaginary part zero.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from gramian.ops import causal_convolution
from gramian.ops.vandermonde import (
    integer_power,
    vandermonde_product,
    vandermonde_transpose_product,
)
from gramian.systems._hankel import check_spectral_radius
from gramian.systems._state import State
from gramian.systems._system import (
    LinearRecurrence,
    TimeInvariantSystem,
    check_tensor,
    working_dtype,
)

__all__ = ["Modal", "ModalRecurrence", "ModalState"]


class _Fields(NamedTuple):
    modes: Tensor


class ModalState(_Fields, State):
    """``x_{t+1} = λ x_t + u_t`` for every mode: (*B, *C', m, 2), real and imaginary part."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Modal(TimeInvariantSystem):
    """``h_0 = d``, ``h_t = Re Σ_k residues_k poles_k^(t-1)``.

    Args:
        poles: (*C, m), complex. A real pole is an entry without imaginary part; channels with
            fewer modes are padded with residues of zero.
        residues: (*C, m), complex.
        d: (*C), real: the direct term.

    Raises:
        TypeError: if poles or residues are not complex, or ``d`` not real.
        ValueError: if the shapes do not belong together.
    """

    poles: Tensor
    residues: Tensor
    d: Tensor

    def __post_init__(self) -> None:
        for name in ("poles", "residues", "d"):
            check_tensor(f"{name} of a modal system", getattr(self, name))
        if not (self.poles.is_complex() and self.residues.is_complex()) or self.d.is_complex():
            raise TypeError(
                "a modal system takes complex poles and residues and a real d, got "
                f"{self.poles.dtype}, {self.residues.dtype} and {self.d.dtype}."
            )
        if self.poles.shape != self.residues.shape or self.poles.shape[:-1] != self.d.shape:
            raise ValueError(
                "a modal system takes poles and residues (*channels, modes) and d (*channels), "
                f"got {tuple(self.poles.shape)}, {tuple(self.residues.shape)} and "
                f"{tuple(self.d.shape)}."
            )

    @property
    def channel_shape(self) -> torch.Size:
        return self.poles.shape[:-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.d.dtype

    @property
    def device(self) -> torch.device:
        return self.poles.device

    @property
    def orders(self) -> Tensor:
        """(*C), int64: state dimension over the reals of every channel.

        A conjugate pair counts 2, a real pole 1, an entry without residue nothing.
        """
        tiny = torch.finfo(self.poles.real.dtype).eps
        pair = self.poles.imag.abs() > tiny * self.poles.abs()
        return torch.where(self.residues != 0, 1 + pair.long(), 0).sum(-1)

    @property
    def order(self) -> int:
        """The largest of ``orders``."""
        return int(self.orders.max()) if self.poles.numel() else 0

    def impulse_response(self, length: int) -> Tensor:
        if length <= 1 or self.poles.shape[-1] == 0:
            return torch.nn.functional.pad(self.d.unsqueeze(-1), (0, length - 1))
        tail = vandermonde_product(self.poles, self.residues, length - 1)
        return torch.cat([self.d.unsqueeze(-1), tail.to(self.d.dtype)], dim=-1)

    def spectral_radius(self) -> Tensor:
        """(*C): the largest modulus of a pole that has a residue; 0 without any."""
        radii = torch.where(self.residues != 0, self.poles.abs(), 0.0)
        return torch.nn.functional.pad(radii, (0, 1)).amax(-1)

    def recurrence(self, form: str | None = None) -> ModalRecurrence:
        """One complex multiplication a mode and step; the only form of a modal system.

        Raises:
            ValueError: for any other form than "modal".
        """
        if form not in (None, "modal"):
            raise ValueError(f'a modal system has the recurrence form "modal" only, got {form!r}.')
        return ModalRecurrence(self)

    def _apply_from(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        if not isinstance(state, ModalState):
            raise TypeError(
                f"a modal system continues from a ModalState, got {type(state).__name__}."
            )
        length = u.shape[-1]
        signal = u.to(state.modes.dtype)
        past = torch.view_as_complex(state.modes)
        y = causal_convolution(signal, self.impulse_response(length).to(signal.dtype))
        y = y + vandermonde_product(self.poles, self.residues.to(past.dtype) * past, length)
        step = integer_power(self.poles.to(torch.complex128), length)
        new = step.to(past.dtype) * past + vandermonde_transpose_product(self.poles, signal)
        return y.to(u.dtype), ModalState(torch.view_as_real(new))

    def _infinite_hankel_singular_values(self) -> Tensor:
        """By the Takenaka–Malmquist basis of {λ, λ̄}, the QR factorisation of their Vandermonde
        matrix in closed form: products of quotients, so nothing cancels."""
        check_spectral_radius(self.spectral_radius())
        poles = self.poles.to(torch.complex128)
        residues = self.residues.to(torch.complex128) / 2
        poles = torch.where(residues != 0, poles, 0)
        poles = torch.cat([poles, poles.conj()], dim=-1).resolve_conj()
        residues = torch.cat([residues, residues.conj()], dim=-1).resolve_conj()
        columns = []
        blaschke = torch.ones_like(poles)  # the product of the factors so far, at every pole
        for s in range(poles.shape[-1]):
            pole = poles[..., s : s + 1]
            denominator = 1 - pole.conj() * poles
            columns.append((1 - pole.abs().square()).sqrt() * blaschke / denominator)
            blaschke = blaschke * (poles - pole) / denominator
        factor = torch.stack(columns, dim=-1)  # (*C, 2m, 2m): Gram matrix = factor factor^H
        return torch.linalg.svdvals(factor.mT @ (residues.unsqueeze(-1) * factor))


class ModalRecurrence(LinearRecurrence):
    """``y_t = Re Σ_k residues_k x_k + d u_t``, ``x ← λ x + u_t``."""

    form = "modal"
    _state = ModalState

    def __init__(self, system: Modal) -> None:
        self.system: Modal = system.frozen()
        dtype = working_dtype(system.d)
        self._poles = self.system.poles.to(dtype.to_complex())
        # Re (r x) = (Re r)(Re x) - (Im r)(Im x): an inner product of real pairs.
        self._readout = torch.view_as_real(self.system.residues.conj().resolve_conj())
        self._readout = self._readout.flatten(-2).to(dtype)
        self._d = self._like = self.system.d.to(dtype)
        self._state_shape = (self.system.poles.shape[-1], 2)

    @torch.no_grad()
    def step(self, u_t: Tensor, state: State) -> tuple[Tensor, State]:
        assert isinstance(state, ModalState)
        (modes,) = state
        sample = u_t.to(modes.dtype)
        y = torch.addcmul((modes.flatten(-2) * self._readout).sum(-1), self._d, sample)
        torch.view_as_complex(modes).mul_(self._poles).add_(sample.unsqueeze(-1))
        return y.to(u_t.dtype), state
