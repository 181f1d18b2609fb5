r"""Modal systems: poles and residues.

``H(z) = d + Re Σ_k residues_k z^-1 / (1 - poles_k z^-1)``, so ``h_0 = d`` and
``h_t = Re Σ_k residues_k poles_k^(t-1)`` (Laughing Hyena, equation 3.2). One complex entry stands
for a pole and its conjugate; a real pole is an entry with imaginary part zero.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from typing_extensions import Self

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


_MAX_GROUPS = 4
_PADDING = 0.1  # share of padding that is tolerated rather than making one more group


class _Fields(NamedTuple):
    modes: tuple[Tensor, ...]


class ModalState(_Fields, State):
    """``x_{t+1} = λ x_t + u_t`` for every mode, real and imaginary parts.

    One tensor for each group of channels with nearly as many modes, so that one channel of many
    does not make all of them large: (*B, *C'[:-1], 2, m, C'[-1]). The last of the channel
    dimensions comes last: it is what a processor's vectors run along.
    """

    __slots__ = ()


class Group(NamedTuple):
    """Channels, along the first of their dimensions, that are stepped together."""

    channels: tuple[int, ...] | None  # None: all of them, in order
    modes: int


@functools.lru_cache(maxsize=1024)
def group_channels(counts: tuple[int, ...]) -> tuple[Group, ...]:
    """Partition channels of ``counts`` modes into few groups with little padding.

    The fewest groups, at most four, whose padding is within a tenth of all modes, and of those the
    partition with the least, by dynamic programming over the different counts.
    """
    sizes = sorted(set(counts))
    many = [counts.count(size) for size in sizes]
    # least[g][j]: slots of the j smallest sizes in g groups, and where the last of them begins
    least: list[list[tuple[float, int]]] = [[(0.0, 0)] + [(torch.inf, 0)] * len(sizes)]
    groups = 0
    while groups < _MAX_GROUPS:
        groups += 1
        row = [(torch.inf, 0)]
        for j in range(1, len(sizes) + 1):
            costs = [least[-1][i][0] + sum(many[i:j]) * sizes[j - 1] for i in range(j)]
            best = min(range(j), key=costs.__getitem__)
            row.append((costs[best], best))
        least.append(row)
        if row[-1][0] <= (1 + _PADDING) * sum(counts):
            break
    if groups == 1:
        return (Group(None, sizes[-1]),)
    found, end = [], len(sizes)
    for g in range(groups, 0, -1):
        begin = least[g][end][1]
        inside = {*sizes[begin:end]}
        members = tuple(c for c, count in enumerate(counts) if count in inside)
        found.append(Group(members, sizes[end - 1]))
        end = begin
    return tuple(reversed(found))


@dataclasses.dataclass(frozen=True, eq=False)
class Modal(TimeInvariantSystem):
    """``h_0 = d``, ``h_t = Re Σ_k residues_k poles_k^(t-1)``.

    Args:
        poles: (*C, m), complex. A real pole is an entry without imaginary part; channels with
            fewer modes are padded with residues of zero.
        residues: (*C, m), complex.
        d: (*C), real: the direct term.
        counts: How many modes, the leading ones, each channel along the first channel dimension
            has, where that is known: states have no room for the padding of the others. By default
            as many as there are poles.

    Raises:
        TypeError: if poles or residues are not complex, or ``d`` not real.
        ValueError: if the shapes do not belong together.
    """

    poles: Tensor
    residues: Tensor
    d: Tensor
    counts: dataclasses.InitVar[tuple[int, ...] | None] = None

    def __post_init__(self, counts: tuple[int, ...] | None) -> None:
        object.__setattr__(self, "_counts", None if counts is None else tuple(counts))
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
        if counts is not None and (self.d.ndim == 0 or len(counts) != self.d.shape[0]):
            raise ValueError(
                "counts must be one number of modes for each channel of the first dimension of "
                f"{tuple(self.d.shape)}, got {len(counts)}."
            )

    _counts: ClassVar[tuple[int, ...] | None] = None

    @classmethod
    def from_zpk(
        cls, zeros: ArrayLike, poles: ArrayLike, gain: float, dtype: torch.dtype = torch.float64
    ) -> Modal:
        """scipy's ``gain Π (z - zeros) / Π (z - poles)`` by partial fractions, one channel: no
        polynomial is expanded, so poles may crowd, though not coincide.

        Args:
            zeros: (m,), in conjugate pairs, m ≤ n.
            poles: (n,), in conjugate pairs.
            gain: Real.
            dtype: Of the direct term; poles and residues are complex of that precision.

        Raises:
            ValueError: if there are more zeros than poles, complex ones without conjugates, or
                poles so close that their residues cancel more than eight digits: see
                `StateSpace.from_zpk`.
        """
        from gramian.systems.interop import modal_of_zpk

        return modal_of_zpk(zeros, poles, gain).to(dtype=dtype)

    @classmethod
    def from_sos(cls, sos: ArrayLike, dtype: torch.dtype = torch.float64) -> Modal:
        """scipy's second-order sections by partial fractions, one channel.

        Args:
            sos: (sections, 6), rows (b0, b1, b2, a0, a1, a2).
            dtype: As in `from_zpk`.

        Raises:
            ValueError: for another shape, values that are not finite, an a0 of zero, or poles that
                coincide, or nearly so: see `StateSpace.from_sos`.
        """
        from gramian.systems.interop import modal_of_sos

        return modal_of_sos(sos).to(dtype=dtype)

    @classmethod
    def from_control(cls, system: Any, dtype: torch.dtype = torch.float64) -> Modal:
        """A system of python-control as in `gramian.systems.from_control`, as poles and residues.

        Raises:
            ImportError: if python-control is not installed.
            TypeError: if it is no system of it.
            ValueError: if it is continuous in time, has several inputs or outputs, more zeros than
                poles, or no modal form: see `gramian.systems.to_modal`.
        """
        from gramian.systems.convert import to_modal
        from gramian.systems.interop import from_control

        return to_modal(from_control(system)).to(dtype=dtype)

    @property
    def _static(self) -> Any:
        return self._counts

    @classmethod
    def _from_fields(cls, values: Any, static: Any = None) -> Self:
        system = super()._from_fields(values)
        object.__setattr__(system, "_counts", static)
        return system

    def __getitem__(self, index: Any) -> Self:
        system = super().__getitem__(index)
        first = index[0] if isinstance(index, tuple) and index else index
        kept = self._counts[first] if self._counts and isinstance(first, slice) else None
        object.__setattr__(system, "_counts", kept)
        return system

    def reshape_channels(self, *shape: int) -> Self:
        system = super().reshape_channels(*shape)
        object.__setattr__(system, "_counts", None)
        return system

    @property
    def groups(self) -> tuple[Group, ...]:
        """How states group the channels."""
        if self._counts is None:
            return (Group(None, self.poles.shape[-1]),)
        return group_channels(self._counts)

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
        signal = u.to(state.modes[0].dtype)
        y = causal_convolution(signal, self.impulse_response(length).to(signal.dtype))
        pair = self._pair
        free, states = [], []
        for group, modes in zip(self.groups, state.modes, strict=True):
            part, chosen = self._part(group), signal
            if group.channels is not None:
                index = torch.tensor(group.channels, device=u.device)
                chosen = signal.index_select(-self.d.ndim - 1, index)
            re, im = modes.unbind(pair)
            past = torch.complex(re, im).movedim(pair + 1, -1)  # (*B, *C', m)
            free.append(
                vandermonde_product(part.poles, part.residues.to(past.dtype) * past, length)
            )
            step = integer_power(part.poles.to(torch.complex128), length)
            new = step.to(past.dtype) * past + vandermonde_transpose_product(part.poles, chosen)
            new = new.movedim(-1, pair + 1)
            states.append(torch.stack([new.real, new.imag], dim=pair))
        y = y + _ungroup(free, self.groups, -self.d.ndim - 1)
        return y.to(u.dtype), ModalState(tuple(states))

    @property
    def _pair(self) -> int:
        """The dimension of a state that holds real and imaginary part."""
        return -3 if self.d.ndim else -2

    def _part(self, group: Group) -> Modal:
        """The system of the channels of one group, with as many modes as they need."""
        if group.channels is None:
            return Modal(self.poles[..., : group.modes], self.residues[..., : group.modes], self.d)
        index = torch.tensor(group.channels, device=self.d.device)
        return Modal(
            self.poles[..., : group.modes].index_select(0, index),
            self.residues[..., : group.modes].index_select(0, index),
            self.d.index_select(0, index),
        )

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


def _ungroup(parts: list[Tensor], groups: tuple[Group, ...], dim: int) -> Tensor:
    """What the groups made of their channels, in the order of the channels along ``dim``."""
    if len(parts) == 1:
        return parts[0]
    order = sum((group.channels or () for group in groups), ())
    return torch.cat(parts, dim=dim).index_select(
        dim, torch.tensor(order, device=parts[0].device).argsort()
    )


class _GroupStep(NamedTuple):
    """What stepping a group needs, shaped against its state."""

    channels: Tensor | None
    real: Tensor  # of the poles, (*C[:-1], m, C[-1])
    imaginary: Tensor
    read_real: Tensor  # Re (r x) = (Re r)(Re x) - (Im r)(Im x)
    read_imaginary: Tensor

    def widen(self, width: int) -> _GroupStep:
        """For streams that share a filter along the last dimension: numbers side by side."""

        channels, *values = self
        assert all(value is not None for value in values)
        return _GroupStep(
            channels, *(value.expand(*value.shape[:-1], width).contiguous() for value in values)
        )


class ModalRecurrence(LinearRecurrence):
    """``y_t = Re Σ_k residues_k x_k + d u_t``, ``x ← λ x + u_t``, in place and in real numbers."""

    form = "modal"

    def __init__(self, system: Modal) -> None:
        self.system: Modal = system.frozen()
        dtype = working_dtype(system.d)
        self._d = self._like = self.system.d.to(dtype)
        self._pair = self.system._pair
        self._widened: dict[int, list[_GroupStep]] = {}
        self._groups = []
        for group in self.system.groups:
            part = self.system._part(group)
            poles = part.poles.movedim(-1, self._pair + 1)
            residues = part.residues.movedim(-1, self._pair + 1)
            channels = group.channels
            self._groups.append(
                _GroupStep(
                    None if channels is None else torch.tensor(channels, device=poles.device),
                    poles.real.to(dtype).contiguous(),
                    poles.imag.to(dtype).contiguous(),
                    residues.real.to(dtype).contiguous(),
                    -residues.imag.to(dtype).contiguous(),
                )
            )
        order = [group.channels for group in self._groups if group.channels is not None]
        self._place = torch.cat(order).argsort() if order else None

    def initial_state(
        self,
        batch_shape: tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> ModalState:
        shape = torch.broadcast_shapes(tuple(batch_shape), self.system.channel_shape)
        split = len(shape) - self._d.ndim
        if self._d.ndim and self._d.shape[-1] == 1 and shape[-1] not in self._widened:
            self._widened[shape[-1]] = [group.widen(shape[-1]) for group in self._groups]
        states = []
        for group in self.system.groups:
            channels = list(shape[split:])
            if group.channels is not None:
                channels[0] = len(group.channels)
            size = (*shape[:split], *channels[:-1], 2, group.modes, *channels[-1:])
            states.append(self._like.new_zeros(size, dtype=dtype, device=device))
        return ModalState(tuple(states))

    @torch.no_grad()
    def step(self, u_t: Tensor, state: State) -> tuple[Tensor, State]:
        assert isinstance(state, ModalState)
        dims, pair = self._d.ndim, self._pair
        sample = u_t.to(state.modes[0].dtype)
        groups = self._widened.get(sample.shape[-1] if dims else 1, self._groups)
        outputs = []
        for group, modes in zip(groups, state.modes, strict=True):
            part = sample
            if group.channels is not None:
                part = sample.index_select(-dims, group.channels)
            re, im = modes.unbind(pair)  # (*B, *C'[:-1], m, C'[-1])
            read = torch.addcmul(re * group.read_real, im, group.read_imaginary)
            outputs.append(read.sum(pair + 1))
            turned = im * group.imaginary
            im.mul_(group.real).addcmul_(re, group.imaginary)
            re.mul_(group.real).sub_(turned).add_(part.unsqueeze(pair + 1))
        y = outputs[0]
        if self._place is not None:
            y = torch.cat(outputs, dim=-dims).index_select(-dims, self._place)
        y = torch.addcmul(y, self._d, sample)
        return y.to(u_t.dtype), state
