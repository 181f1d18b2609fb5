r"""State-space systems with a dense state matrix.

``x_{t+1} = A x_t + B u_t``, ``y_t = C x_t + D u_t``, so ``h_0 = D`` and ``h_t = C A^(t-1) B``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from typing_extensions import Self

from gramian.ops import causal_convolution
from gramian.ops.krylov import krylov_product, krylov_sum, matrix_power, plain_steps
from gramian.ops.similarity import Coordinates, coordinates
from gramian.systems._hankel import check_spectral_radius, infinite_hankel_singular_values
from gramian.systems._rounding import delays, warn_of_lost_poles
from gramian.systems._state import State
from gramian.systems._system import (
    LinearRecurrence,
    TimeInvariantSystem,
    check_tensor,
    working_dtype,
)

__all__ = ["StateSpace", "StateSpaceRecurrence", "StateSpaceState"]


_ANGLES = 64
"""Points of the half circle on which a response is looked at, besides the angles of the poles."""

_Realised = tuple[Coordinates, tuple[Tensor, Tensor, Tensor]]


class _Fields(NamedTuple):
    x: Tensor


class StateSpaceState(_Fields, State):
    """The state vector: (*B, *C', n)."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True, eq=False)
class StateSpace(TimeInvariantSystem):
    """``x_{t+1} = A x_t + B u_t``, ``y_t = C x_t + D u_t``: one input and one output a channel.

    Args:
        A: (*C, n, n), real: the state matrix.
        B: (*C, n), real: the input vector.
        C: (*C, n), real: the output vector.
        D: (*C), real: the direct term ``h_0``.

    Raises:
        TypeError: if a field is not a real floating-point tensor.
        ValueError: if the shapes do not belong together.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor

    def __post_init__(self) -> None:
        for name in ("A", "B", "C", "D"):
            value = getattr(self, name)
            check_tensor(f"{name} of a state-space system", value)
            if not value.dtype.is_floating_point:
                raise TypeError(
                    f"{name} of a state-space system must be real floating point, got "
                    f"{value.dtype}."
                )
        vector = (*self.D.shape, self.B.shape[-1] if self.B.ndim else 0)
        expected = ((*vector, vector[-1]), vector, vector)
        if tuple(field.shape for field in (self.A, self.B, self.C)) != expected:
            raise ValueError(
                "a state-space system takes A (*channels, n, n), B and C (*channels, n) and D "
                f"(*channels), got {tuple(self.A.shape)}, {tuple(self.B.shape)}, "
                f"{tuple(self.C.shape)} and {tuple(self.D.shape)}."
            )

    @classmethod
    def from_scipy(
        cls,
        A: ArrayLike,
        B: ArrayLike,
        C: ArrayLike,
        D: ArrayLike,
        dtype: torch.dtype = torch.float64,
    ) -> Self:
        """From scipy's matrices ``(A, B, C, D)`` of a discrete-time system: a single channel.

        Args:
            A: (n, n).
            B: (n, 1).
            C: (1, n).
            D: (1, 1).
            dtype: Of the result.

        Warns:
            UserWarning: if a pole is outside of the unit circle, or if rounding of the matrices
                alone moves the frequency response by more than 1e-6 (3e-4 for a dtype of single
                precision), as it does in companion matrices of polynomials of high degree.

        Raises:
            ValueError: if the system has several inputs or outputs, or the shapes do not fit.
        """
        a, b, c, d = (np.atleast_2d(np.asarray(m, dtype=np.float64)) for m in (A, B, C, D))
        n = a.shape[0] if a.size else 0
        if a.size != n * n or b.size != n or c.size != n or d.size != 1:
            raise ValueError(
                "a channel has one input and one output, A (n, n), B (n, 1), C (1, n) and D "
                f"(1, 1); got {a.shape}, {b.shape}, {c.shape} and {d.shape}."
            )
        fields = (a.reshape(n, n), b.reshape(n), c.reshape(n), d.reshape(()))
        system = cls(*(torch.from_numpy(np.array(f)).to(dtype) for f in fields))
        system._warn_of_lost_poles()
        return system

    @torch.no_grad()
    def _warn_of_lost_poles(self) -> None:
        if not self.order or not bool(self.A.isfinite().all()):
            return
        # With R = (zI - A)⁻¹ rounding moves the response by at most eps |c R| |A| |R b|.
        A, B, C = self.A.double(), self.B.double(), self.C.double()
        poles = self.poles()
        z = 1 / delays(poles, _ANGLES)
        identity = torch.eye(self.order, dtype=torch.float64, device=self.device)
        resolvent = z[:, None, None] * identity - A
        column = torch.linalg.solve(resolvent, (B + 0j).unsqueeze(-1)).squeeze(-1)
        row = torch.linalg.solve(resolvent.mT, (C + 0j).unsqueeze(-1)).squeeze(-1)
        response = (self.D.double() + (column * C).sum(-1)).abs().amax()
        change = ((row.abs() @ A.abs()) * column.abs()).sum(-1).amax()
        moved = torch.finfo(self.dtype).eps / 2 * change / response.clamp_min(1e-300)
        warn_of_lost_poles("these matrices", moved, poles.abs().amax(), self.dtype, 4)

    @classmethod
    def from_zpk(
        cls, zeros: ArrayLike, poles: ArrayLike, gain: float, dtype: torch.dtype = torch.float64
    ) -> Self:
        """scipy's ``gain Π (z - zeros) / Π (z - poles)`` as a cascade of second-order sections, one
        channel: no polynomial is expanded, so poles may crowd and coincide.

        Args:
            zeros: (m,), in conjugate pairs, m ≤ n.
            poles: (n,), in conjugate pairs.
            gain: Real.
            dtype: Of the result.

        Raises:
            ValueError: if there are more zeros than poles, or complex ones without conjugates.
        """
        from gramian.systems.interop import state_space_of_zpk

        return cls._from_fields(state_space_of_zpk(zeros, poles, gain).to(dtype=dtype)._fields())

    @classmethod
    def from_sos(cls, sos: ArrayLike, dtype: torch.dtype = torch.float64) -> Self:
        """scipy's second-order sections as a cascade, one channel.

        Args:
            sos: (sections, 6), rows (b0, b1, b2, a0, a1, a2).
            dtype: Of the result.

        Raises:
            ValueError: for another shape, values that are not finite, or an a0 of zero.
        """
        from gramian.systems.interop import state_space_of_sos

        return cls._from_fields(state_space_of_sos(sos).to(dtype=dtype)._fields())

    @classmethod
    def from_control(cls, system: Any, dtype: torch.dtype = torch.float64) -> Self:
        """A system of python-control as in `gramian.systems.from_control`, with a state matrix: the
        companion form of a transfer function.

        Raises:
            ImportError: if python-control is not installed.
            TypeError: if it is no system of it.
            ValueError: if it is continuous in time, has several inputs or outputs, or more zeros
                than poles.
        """
        from gramian.systems.convert import to_state_space
        from gramian.systems.interop import from_control

        return cls._from_fields(to_state_space(from_control(system)).to(dtype=dtype)._fields())

    def to_scipy(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """``(A, B, C, D)`` of scipy.signal, float64: (*C, n, n), (*C, n, 1), (*C, 1, n) and
        (*C, 1, 1)."""
        a, b, c, d = (
            field.detach().double().cpu().numpy() for field in (self.A, self.B, self.C, self.D)
        )
        return a, b[..., :, None], c[..., None, :], d[..., None, None]

    @property
    def channel_shape(self) -> torch.Size:
        return self.D.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.D.dtype

    @property
    def device(self) -> torch.device:
        return self.D.device

    @property
    def order(self) -> int:
        """n, the dimension of the state."""
        return self.B.shape[-1]

    def poles(self) -> Tensor:
        """(*C, n), complex128: the eigenvalues of ``A``, in coordinates where rounding moves them
        least."""
        return torch.linalg.eigvals(self._realised()[1][0])

    def spectral_radius(self) -> Tensor:
        """(*C), float64: the largest modulus of a pole."""
        return torch.nn.functional.pad(self.poles().abs(), (0, 1)).amax(-1)

    def frozen(self) -> Self:
        system = super().frozen()
        system.__dict__["_known"] = {}  # its values cannot change: coordinates are found once
        return system

    def _realised(self) -> _Realised:
        """Coordinates in which powers of A can be taken, and A, B and C there, in float64."""
        known = self.__dict__.get("_known")
        if known:
            return known["realised"]
        A, B, C = self.A.double(), self.B.double(), self.C.double()
        found = coordinates(A, B, C)
        realised = found, found.system(A, B, C)
        if known is not None:
            known["realised"] = realised
        return realised

    def impulse_response(self, length: int) -> Tensor:
        """The Markov parameters (*C, length): O(n² √L + n L + n³ log L) operations."""
        if length == 1 or self.order == 0:
            return torch.nn.functional.pad(self.D.unsqueeze(-1), (0, length - 1))
        tail = self._free(self.B, length - 1, self._realised())
        return torch.cat([self.D.unsqueeze(-1), tail], dim=-1)

    def _free(self, x: Tensor, length: int, realised: _Realised) -> Tensor:
        """``C A^t x`` for t = 0 … length - 1 of states x (*B, n), in their dtype."""
        found, (A, _, C) = realised
        if found.stepwise:
            silence = x.new_zeros(*x.shape[:-1], length)
            return plain_steps(self.A, self.B, self.C, silence, x)[0].to(x.dtype)
        if not found.factors:
            return krylov_product(C, A, x, length)
        # Not rounded before the last product, which may cancel a few digits.
        return krylov_product(C, A, found.into(x.double()), length).to(x.dtype)

    def recurrence(self, form: str | None = None) -> StateSpaceRecurrence:
        """One product with the dense ``A`` a step; the only form of a state-space system.

        `gramian.systems.to_modal` and `gramian.systems.to_transfer_function` lead to
        cheaper ones where they exist.

        Raises:
            ValueError: for any other form than "state_space".
        """
        if form not in (None, "state_space"):
            raise ValueError(
                f'a state-space system has the recurrence form "state_space" only, got {form!r}.'
            )
        return StateSpaceRecurrence(self)

    def _apply_from(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        if not isinstance(state, StateSpaceState):
            raise TypeError(
                f"a state-space system continues from a StateSpaceState, got "
                f"{type(state).__name__}."
            )
        (x,) = state
        length = u.shape[-1]
        signal = u.to(x.dtype)
        realised = found, (A, B, _) = self._realised()
        if found.stepwise:
            y, end = plain_steps(self.A, self.B, self.C, signal, x)
            y = y + self.D.double().unsqueeze(-1) * signal
            return y.to(u.dtype), StateSpaceState(end.to(x.dtype))
        taps = torch.cat([self.D.unsqueeze(-1), self._free(self.B, length, realised)], dim=-1)
        y = causal_convolution(signal, taps[..., :length].to(x.dtype))
        y = y + self._free(x, length, realised)
        past = found.into(x.double()).unsqueeze(-1)
        carried = (matrix_power(A, length) @ past).squeeze(-1) + krylov_sum(A, B, signal.double())
        return y.to(u.dtype), StateSpaceState(found.out_of(carried).to(x.dtype))

    def _infinite_hankel_singular_values(self) -> Tensor:
        if self.order == 0:
            return self.B.double()
        found, (A, B, C) = self._realised()
        if found.stepwise:
            raise ValueError(
                "the Hankel singular values of this state-space system cannot be computed in "
                "double precision: powers of its state matrix lose every digit; give `length` for "
                "a finite horizon."
            )
        check_spectral_radius(torch.linalg.eigvals(A).abs().amax(-1))
        return infinite_hankel_singular_values(A, B, C)


class StateSpaceRecurrence(LinearRecurrence):
    """``y_t = C x + D u_t``, ``x ← A x + B u_t``."""

    form = "state_space"
    _state = StateSpaceState

    def __init__(self, system: StateSpace) -> None:
        self.system: StateSpace = system.frozen()
        dtype = working_dtype(system.D)
        # One matrix for output and next state: a step is one product and one sum.
        rows = torch.cat([self.system.A, self.system.C.unsqueeze(-2)], dim=-2).to(dtype)
        inputs = torch.cat([self.system.B, self.system.D.unsqueeze(-1)], dim=-1).to(dtype)
        self._rows, self._inputs = rows, inputs
        self._like, self._state_shape = inputs, (self.system.order,)

    @torch.no_grad()
    def step(self, u_t: Tensor, state: State) -> tuple[Tensor, State]:
        assert isinstance(state, StateSpaceState)
        (x,) = state
        sample = u_t.to(x.dtype).unsqueeze(-1)
        with torch.autocast(x.device.type, enabled=False):
            new = (self._rows.to(x.dtype) @ x.unsqueeze(-1)).squeeze(-1) + self._inputs * sample
        return new[..., -1].to(u_t.dtype), StateSpaceState(new[..., :-1])
