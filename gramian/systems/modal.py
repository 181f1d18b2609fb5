r"""Modal systems, given by poles and residues.

`H(z) = d + Re Σ_k residues_k z^-1 / (1 - poles_k z^-1)`, so `h_0 = d` and
`h_t = Re Σ_k residues_k poles_k^(t-1)` (Laughing Hyena, equation 3.2). One complex entry stands for
a pole and its conjugate. An entry whose imaginary part is zero is a real pole.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from typing_extensions import Self

from gramian._checks import check_positive
from gramian.ops import causal_convolution
from gramian.ops.devices import from_host
from gramian.ops.lengths import tail_count
from gramian.ops.vandermonde import (
    geometric_powers,
    integer_power,
    vandermonde_product,
    vandermonde_transpose_product,
)
from gramian.systems._hankel import check_spectral_radius
from gramian.systems._modal_recurrence import (
    Group,
    ModalRecurrence,
    ModalState,
    modes_fit,
    pair_axis,
    partition_channels,
)
from gramian.systems._system import STATIC, TimeInvariantSystem, check_tensor
from gramian.systems.state_space import StateSpace

__all__ = ["Modal", "ModalRecurrence", "ModalState"]

_SHORT_CHUNK = 16
"""Samples up to which a chunk is computed from a table of all powers of the poles."""

_LARGEST_TABLE = 2**22
"""Products of powers and samples that such a table may hold."""


@dataclasses.dataclass(frozen=True, eq=False)
class Modal(TimeInvariantSystem[ModalState]):
    """`h_0 = d`, `h_t = Re Σ_k residues_k poles_k^(t-1)`.

    Args:
        poles: (*C, m), complex: the poles. A pole whose imaginary part is zero is real. Channels
            with fewer modes are padded with modes whose residue is zero.
        residues: (*C, m), complex: the residues of the poles.
        d: (*C), real: the direct term.
        counts: For every index along the first channel dimension, the number of modes in use, which
            come first. By default all m modes are in use. If it is given, states hold no slots for
            the padding of channels with few modes.
        real: Whether all poles and residues are real numbers. They are still given as complex
            numbers, whose imaginary parts must be zero. States of a real system hold one number for
            each mode instead of two.

    Raises:
        TypeError: if the poles or residues are not complex, or `d` is not real.
        ValueError: if the shapes do not fit together.
    """

    _kind = "modal system"
    _state_types = (ModalState,)

    poles: Tensor
    residues: Tensor
    d: Tensor
    counts: tuple[int, ...] | None = dataclasses.field(default=None, repr=False, metadata=STATIC)
    real: bool = dataclasses.field(default=False, metadata=STATIC)

    def __post_init__(self) -> None:
        for name in ("poles", "residues", "d"):
            check_tensor(f"{name} of a modal system", getattr(self, name))
        if not (self.poles.is_complex() and self.residues.is_complex()) or self.d.is_complex():
            raise TypeError(
                "a modal system takes complex poles and residues and a real d; got "
                f"{self.poles.dtype}, {self.residues.dtype} and {self.d.dtype}."
            )
        if self.poles.shape != self.residues.shape or self.poles.shape[:-1] != self.d.shape:
            raise ValueError(
                "a modal system takes poles and residues (*channels, modes) and d (*channels); "
                f"got {tuple(self.poles.shape)}, {tuple(self.residues.shape)} and "
                f"{tuple(self.d.shape)}."
            )
        if self.counts is None:
            return
        object.__setattr__(self, "counts", tuple(self.counts))
        if self.d.ndim == 0 or len(self.counts) != self.d.shape[0]:
            raise ValueError(
                "counts must be one number of modes for each channel of the first dimension of "
                f"{tuple(self.d.shape)}; got {len(self.counts)}."
            )

    @classmethod
    def from_zpk(
        cls, zeros: ArrayLike, poles: ArrayLike, gain: float, dtype: torch.dtype = torch.float64
    ) -> Modal:
        """Make one channel from scipy's `gain Π (z - zeros) / Π (z - poles)` by partial fractions.

        No polynomial is expanded, so poles may crowd, but they must not coincide.

        Args:
            zeros: The zeros, (m,), in conjugate pairs, where m ≤ n.
            poles: The poles, (n,), in conjugate pairs.
            gain: A real number.
            dtype: The dtype of the direct term; poles and residues are complex of that precision.

        Raises:
            ValueError: if there are more zeros than poles, if a complex root has no conjugate, or
                if poles are so close that their residues cancel more than eight digits.
                `StateSpace.from_zpk` has no such limit.
        """
        from gramian.systems.interop import modal_of_zpk

        return modal_of_zpk(zeros, poles, gain).to(dtype=dtype)

    @classmethod
    def from_sos(cls, sos: ArrayLike, dtype: torch.dtype = torch.float64) -> Modal:
        """Make one channel from scipy's second-order sections by partial fractions.

        Args:
            sos: The sections, (sections, 6), with rows (b0, b1, b2, a0, a1, a2).
            dtype: The dtype of the direct term; poles and residues are complex of that precision.

        Raises:
            ValueError: if `sos` has another shape, if a value is not finite, if an a0 is zero, or
                if poles coincide or nearly coincide. `StateSpace.from_sos` accepts such poles.
        """
        from gramian.systems.interop import modal_of_sos

        return modal_of_sos(sos).to(dtype=dtype)

    @classmethod
    def from_control(cls, system: Any, dtype: torch.dtype = torch.float64) -> Modal:
        """Convert a discrete-time system of python-control to one channel of poles and residues.

        Args:
            system: As in `gramian.systems.from_control`.
            dtype: The dtype of the direct term; poles and residues are complex of that precision.

        Raises:
            ImportError: if python-control is not installed.
            TypeError: if the system is not a system of python-control.
            ValueError: if the system is continuous in time, has several inputs or outputs, has more
                zeros than poles, or has no modal form; see `gramian.systems.to_modal`.
        """
        from gramian.systems.convert import to_modal
        from gramian.systems.interop import from_control

        return to_modal(from_control(system)).to(dtype=dtype)

    def __getitem__(self, index: Any) -> Self:
        first = index[0] if isinstance(index, tuple) and index else index
        kept = self.counts[first] if self.counts and isinstance(first, slice) else None
        return dataclasses.replace(super().__getitem__(index), counts=kept or None)

    def reshape_channels(self, *shape: int) -> Self:
        """Return the channels in another shape, and adapt `counts` to it."""
        system = super().reshape_channels(*shape)
        if self.counts is None:
            return system
        counts = _reshape_counts(self.counts, self.channel_shape, system.channel_shape)
        return dataclasses.replace(system, counts=counts)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Return the groups of channels that share a tensor of the state."""
        if self.counts is None:
            return (Group(None, self.poles.shape[-1]),)
        return partition_channels(self.counts)

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
        """Return the state dimension of every channel, counted in real numbers, (*C), int64.

        A conjugate pair counts 2, a real pole 1, and an entry with residue zero 0.
        """
        tiny = torch.finfo(self.poles.real.dtype).eps
        pair = self.poles.imag.abs() > tiny * self.poles.abs()
        return torch.where(self.residues != 0, 1 + pair.long(), 0).sum(-1)

    @property
    def order(self) -> int:
        """Return the largest of `orders`."""
        return int(self.orders.max()) if self.poles.numel() else 0

    def impulse_response(self, length: int) -> Tensor:
        if length <= 1 or self.poles.shape[-1] == 0:
            return torch.nn.functional.pad(self.d.unsqueeze(-1), (0, length - 1))
        tail = vandermonde_product(self.poles, self.residues, tail_count(length))
        return torch.cat([self.d.unsqueeze(-1), tail.to(self.d.dtype)], dim=-1)[..., :length]

    def spectral_radius(self) -> Tensor:
        """Return the largest modulus of poles with nonzero residues, (*C); 0 if none exist."""
        radii = torch.where(self.residues != 0, self.poles.abs(), 0.0)
        return torch.nn.functional.pad(radii, (0, 1)).amax(-1)

    def resample(self, step: float) -> Modal:
        """Return the system for samples that are `step` samples of this system apart.

        The input is held between the new samples (zero-order hold). For an integer step, the new
        system thus returns every `step`-th output of this system, the last of each held input, and
        its taps are sums of `step` taps. Other steps take principal powers of the poles; that of a
        negative pole is complex.

        Args:
            step: The distance of new samples in old ones. It is above 1 for a lower sampling rate,
                and below 1 for a higher rate.

        Raises:
            ValueError: if the step is not a positive, finite number; or if it is below 1 and a pole
                with a nonzero residue is 0, since its mode has no value between samples.
        """
        check_positive(step=step)
        idle = self.residues == 0  # padding
        if step < 1 and bool(((self.poles == 0) & ~idle).any()):
            raise ValueError("a pole at 0 has no value between samples; the step must be >= 1.")
        poles = self.poles.to(torch.complex128)
        z = torch.where(poles == 0, -1e3, poles.log())  # its exponential is 0 too
        # Σ_{i<m} λ^i = (λ^m - 1) / (λ - 1), which is m at λ = 1.
        still = z == 0
        one = torch.expm1(torch.where(still, 1, z))
        begun = torch.where(still, step - 1, torch.expm1((step - 1) * z) / one)
        held = torch.where(still, step, torch.expm1(step * z) / one)
        residues = self.residues.to(torch.complex128)
        d = self.d + torch.where(idle, 0, residues * begun).real.sum(-1).to(self.d.dtype)
        residues = torch.where(idle, 0, residues * torch.exp((step - 1) * z) * held)
        poles = torch.exp(step * z)
        return dataclasses.replace(
            self,
            poles=poles.to(self.poles.dtype),
            residues=residues.to(self.residues.dtype),
            d=d,
            real=self.real and not bool(poles.imag.any()),
        )

    def recurrence(self, form: str | None = None) -> ModalRecurrence:
        """Return the recurrence. Each step takes one complex multiplication for each mode.

        Raises:
            ValueError: if `form` is given and is not "modal", the only form.
        """
        if form not in (None, "modal"):
            raise ValueError(f'a modal system has the recurrence form "modal" only; got {form!r}.')
        return ModalRecurrence(self)

    def state_space(self) -> StateSpace:
        """Return the same system with one rotation for every conjugate pair, in float64."""
        poles, residues = self.poles.to(torch.complex128), self.residues.to(torch.complex128)
        modes, shape = poles.shape[-1], poles.shape[:-1]
        A = poles.real.new_zeros(*shape, modes, 2, modes, 2)
        index = torch.arange(modes, device=poles.device)
        # These blocks compute x ← λ x + u in real and imaginary parts, and y = Re (r x).
        A[..., index, 0, index, 0] = A[..., index, 1, index, 1] = poles.real
        A[..., index, 0, index, 1] = -poles.imag
        A[..., index, 1, index, 0] = poles.imag
        B = torch.zeros_like(torch.view_as_real(residues))
        B[..., 0] = 1
        C = torch.stack([residues.real, -residues.imag], dim=-1)
        A, B, C = A.reshape(*shape, 2 * modes, 2 * modes), B.flatten(-2), C.flatten(-2)
        # The imaginary part of a real pole's mode stays zero, so its row is no part of the state.
        idle = (poles.imag == 0).all(dim=tuple(range(poles.ndim - 1)))
        keep = torch.stack([torch.ones_like(idle), ~idle], dim=-1).flatten().nonzero().flatten()
        A = A.index_select(-1, keep).index_select(-2, keep)
        return StateSpace(A, B.index_select(-1, keep), C.index_select(-1, keep), self.d.double())

    def fits(self, state: ModalState, shape: torch.Size) -> bool:
        return modes_fit(state, self.groups, self.d.ndim, shape, 1 if self.real else 2)

    def apply_from(self, u: Tensor, state: ModalState) -> tuple[Tensor, ModalState]:
        length = u.shape[-1]
        signal = u.to(state.modes[0].dtype)
        table = signal.numel() * self.poles.shape[-1]
        if length <= _SHORT_CHUNK and table <= _LARGEST_TABLE and len(self.groups) == 1:
            y, new = self._apply_briefly(signal, state.modes[0])
            return y.to(u.dtype), ModalState((new,))
        y = causal_convolution(signal, self.impulse_response(length).to(signal.dtype))
        pair = pair_axis(self.d.ndim)
        free, states = [], []
        for group, modes in zip(self.groups, state.modes, strict=True):
            part, chosen = self.part(group), signal
            if group.channels is not None:
                index = from_host(group.channels, u.device)
                chosen = signal.index_select(-self.d.ndim - 1, index)
            re = modes.select(pair, 0)
            im = torch.zeros_like(re) if self.real else modes.select(pair, 1)
            past = torch.complex(re, im).movedim(pair + 1, -1)  # (*B, *C', m)
            free.append(
                vandermonde_product(part.poles, part.residues.to(past.dtype) * past, length)
            )
            step = integer_power(part.poles.to(torch.complex128), length)
            new = step.to(past.dtype) * past + vandermonde_transpose_product(part.poles, chosen)
            states.append(self._stack(new))
        y = y + _ungroup(free, self.groups, -self.d.ndim - 1)
        return y.to(u.dtype), ModalState(tuple(states))

    def _apply_briefly(self, signal: Tensor, modes: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs and modes after a chunk of few samples, from a table of all powers.

        Args:
            signal: (*B, *C', T).
            modes: The modes of the only group.
        """
        length, pair = signal.shape[-1], pair_axis(self.d.ndim)
        wide, residues, past = self.poles.to(torch.complex128), self.residues, modes.select(pair, 0)
        if self.real:
            wide, residues = wide.real, residues.real
        else:
            past = torch.complex(past, modes.select(pair, 1))
        past = past.movedim(pair + 1, -1)  # (*B, *C', m)
        powers = geometric_powers(wide, length + 1).to(past.dtype)  # (*C, m, T + 1)
        inner, last = powers[..., :length], powers[..., length]
        read = residues.to(past.dtype).unsqueeze(-1) * inner
        taps, free = read.sum(-2), (read * past.unsqueeze(-1)).sum(-2)
        new = last * past + (inner.flip(-1) * signal.unsqueeze(-2)).sum(-1)
        if not self.real:
            taps, free = taps.real, free.real
        kernel = torch.cat([self.d.unsqueeze(-1).to(taps.dtype), taps[..., : length - 1]], dim=-1)
        return causal_convolution(signal, kernel) + free, self._stack(new)

    def _stack(self, modes: Tensor) -> Tensor:
        """Lay out modes (*B, *C', m) as states hold them."""
        pair = pair_axis(self.d.ndim)
        modes = modes.movedim(-1, pair + 1)
        if self.real:
            return (modes.real if modes.is_complex() else modes).unsqueeze(pair).contiguous()
        return torch.stack([modes.real, modes.imag], dim=pair)

    def part(self, group: Group) -> Modal:
        """Return the channels of one group as a system without the other channels' padding."""
        poles, residues, d = (
            self.poles[..., : group.modes],
            self.residues[..., : group.modes],
            self.d,
        )
        if group.channels is not None:
            index = from_host(group.channels, d.device)
            poles, residues, d = (value.index_select(0, index) for value in (poles, residues, d))
        return Modal(poles, residues, d, real=self.real)

    def _infinite_hankel_singular_values(self) -> Tensor:
        """Compute the singular values with the Takenaka–Malmquist basis of the poles {λ, λ̄}.

        The basis is a closed form of the QR factorization of the poles' Vandermonde matrix. It
        consists of products of quotients, so nothing cancels.
        """
        check_spectral_radius(self.spectral_radius())
        poles = self.poles.to(torch.complex128)
        residues = self.residues.to(torch.complex128) / 2
        poles = torch.where(residues != 0, poles, 0)
        poles = torch.cat([poles, poles.conj()], dim=-1).resolve_conj()
        residues = torch.cat([residues, residues.conj()], dim=-1).resolve_conj()
        columns = []
        blaschke = torch.ones_like(poles)  # at every pole: the product of the factors so far
        for s in range(poles.shape[-1]):
            pole = poles[..., s : s + 1]
            denominator = 1 - pole.conj() * poles
            columns.append((1 - pole.abs().square()).sqrt() * blaschke / denominator)
            blaschke = blaschke * (poles - pole) / denominator
        factor = torch.stack(columns, dim=-1)  # (*C, 2m, 2m): Gram matrix = factor factor^H
        return torch.linalg.svdvals(factor.mT @ (residues.unsqueeze(-1) * factor))


def _reshape_counts(
    counts: tuple[int, ...], before: torch.Size, after: torch.Size
) -> tuple[int, ...] | None:
    """Return the `counts` of a system after its channels were reshaped.

    The result is None if the new shape has no channel or no channel dimension.
    """
    if not after or not after.numel():
        return None
    old, new = before[1:].numel(), after[1:].numel()  # channels for each index of the first dim
    return tuple(
        max(counts[begin // old : (begin + new - 1) // old + 1])
        for begin in range(0, after.numel(), new)
    )


def _ungroup(parts: list[Tensor], groups: tuple[Group, ...], dim: int) -> Tensor:
    """Join the results of the groups in the order of the channels along `dim`."""
    if len(parts) == 1:
        return parts[0]
    order = sum((group.channels or () for group in groups), ())
    index = from_host(order, parts[0].device).argsort()
    return torch.cat(parts, dim=dim).index_select(dim, index)
