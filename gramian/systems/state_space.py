r"""State-space systems with a dense state matrix.

`x_{t+1} = A x_t + B u_t`, `y_t = C x_t + D u_t`, so `h_0 = D` and `h_t = C A^(t-1) B`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from typing_extensions import Self

from gramian.ops import causal_convolution
from gramian.ops.krylov import krylov_product, krylov_sum, matrix_power, plain_steps
from gramian.ops.similarity import Coordinates, coordinates
from gramian.systems._hankel import check_spectral_radius, infinite_hankel_singular_values
from gramian.systems._recurrence import VectorRecurrence
from gramian.systems._rounding import delays, warn_of_lost_poles
from gramian.systems._state import State, define_state
from gramian.systems._system import TimeInvariantSystem, check_tensor, working_dtype
from gramian.systems.blocks import BlockForm, VectorBlockForm

__all__ = ["StateSpace", "StateSpaceRecurrence", "StateSpaceState"]


_ANGLES = 64
"""The number of points on the upper half circle at which the frequency response is evaluated,
besides the angles of the poles."""

_Realized = tuple[Coordinates, tuple[Tensor, Tensor, Tensor]]


@define_state
class StateSpaceState(State):
    """The state of a state-space system.

    Attributes:
        x: (*B, *C', n): the state vector.
    """

    x: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class StateSpace(TimeInvariantSystem[StateSpaceState]):
    """`x_{t+1} = A x_t + B u_t`, `y_t = C x_t + D u_t`, with one input and one output per channel.

    Args:
        A: (*C, n, n), real: the state matrix.
        B: (*C, n), real: the input vector.
        C: (*C, n), real: the output vector.
        D: (*C), real: the direct term `h_0`.

    Raises:
        TypeError: if a field is not a real floating-point tensor.
        ValueError: if the shapes do not fit together.
    """

    _kind = "state-space system"
    _state_types = (StateSpaceState,)
    _known: ClassVar[dict[str, _Realized] | None] = None
    """The coordinates of a frozen copy, once they are computed; None for a system that is not
    frozen."""

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
                    f"{name} of a state-space system must be real floating point; got "
                    f"{value.dtype}."
                )
        vector = (*self.D.shape, self.B.shape[-1] if self.B.ndim else 0)
        expected = ((*vector, vector[-1]), vector, vector)
        if tuple(field.shape for field in (self.A, self.B, self.C)) != expected:
            raise ValueError(
                "a state-space system takes A (*channels, n, n), B and C (*channels, n) and D "
                f"(*channels); got {tuple(self.A.shape)}, {tuple(self.B.shape)}, "
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
        """Make one channel from scipy's matrices `(A, B, C, D)` of a discrete-time system.

        Args:
            A: The state matrix, (n, n).
            B: The input vector, (n, 1).
            C: The output vector, (1, n).
            D: The direct term, (1, 1).
            dtype: The dtype of the result.

        Warns:
            UserWarning: if a pole is outside the unit circle, or if rounding the matrices moves the
                frequency response by more than 1e-6 (3e-4 for a dtype of single precision). This
                happens with companion matrices of polynomials of high degree.

        Raises:
            ValueError: if the system has several inputs or outputs, or if the shapes do not fit
                together.
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
        # With R = (zI - A)⁻¹, rounding changes the response by at most eps |c R| |A| |R b|.
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
        """Make one channel from scipy's `gain Π (z - zeros) / Π (z - poles)`.

        The result is a cascade of second-order sections. No polynomial is expanded, so poles may
        crowd or coincide.

        Args:
            zeros: The zeros, (m,), in conjugate pairs, where m ≤ n.
            poles: The poles, (n,), in conjugate pairs.
            gain: A real number.
            dtype: The dtype of the result.

        Raises:
            ValueError: if there are more zeros than poles, or a complex root has no conjugate.
        """
        from gramian.systems.interop import state_space_of_zpk

        return cls._from_fields(state_space_of_zpk(zeros, poles, gain).to(dtype=dtype)._fields())

    @classmethod
    def from_sos(cls, sos: ArrayLike, dtype: torch.dtype = torch.float64) -> Self:
        """Make one channel from scipy's second-order sections, connected in series.

        Args:
            sos: The sections, (sections, 6), with rows (b0, b1, b2, a0, a1, a2).
            dtype: The dtype of the result.

        Raises:
            ValueError: if `sos` has another shape, if a value is not finite, or if an a0 is zero.
        """
        from gramian.systems.interop import state_space_of_sos

        return cls._from_fields(state_space_of_sos(sos).to(dtype=dtype)._fields())

    @classmethod
    def from_control(cls, system: Any, dtype: torch.dtype = torch.float64) -> Self:
        """Convert a discrete-time system of python-control to one channel with a state matrix.

        A transfer function becomes its companion form.

        Args:
            system: As in `gramian.systems.from_control`.
            dtype: The dtype of the result.

        Raises:
            ImportError: if python-control is not installed.
            TypeError: if the system is not a system of python-control.
            ValueError: if the system is continuous in time, has several inputs or outputs, or has
                more zeros than poles.
        """
        from gramian.systems.convert import to_state_space
        from gramian.systems.interop import from_control

        return cls._from_fields(to_state_space(from_control(system)).to(dtype=dtype)._fields())

    def to_scipy(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return scipy.signal's `(A, B, C, D)`.

        Returns:
            Arrays (*C, n, n), (*C, n, 1), (*C, 1, n) and (*C, 1, 1), float64.
        """
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
        """Return n, the dimension of the state."""
        return self.B.shape[-1]

    def poles(self) -> Tensor:
        """Return the eigenvalues of `A`, (*C, n), complex128.

        The eigenvalues are computed in the coordinates in which rounding moves them least.
        """
        return torch.linalg.eigvals(self.realized()[1][0])

    def spectral_radius(self) -> Tensor:
        """Return the largest modulus of a pole, (*C), float64."""
        return torch.nn.functional.pad(self.poles().abs(), (0, 1)).amax(-1)

    def frozen(self) -> Self:
        system = super().frozen()
        object.__setattr__(system, "_known", {})  # values are constant: coordinates are found once
        return system

    def realized(self) -> _Realized:
        """Return coordinates for powers of A, and A, B and C in these coordinates, in float64."""
        known = self._known
        if known:
            return known["realized"]
        A, B, C = self.A.double(), self.B.double(), self.C.double()
        found = coordinates(A, B, C)
        realized = found, found.system(A, B, C)
        if known is not None:
            known["realized"] = realized
        return realized

    def impulse_response(self, length: int) -> Tensor:
        """Compute the Markov parameters (*C, length) in O(n² √L + n L + n³ log L) operations."""
        if length == 1 or self.order == 0:
            return torch.nn.functional.pad(self.D.unsqueeze(-1), (0, length - 1))
        tail = self._free(self.B, length - 1, self.realized())
        return torch.cat([self.D.unsqueeze(-1), tail], dim=-1)

    def _free(self, x: Tensor, length: int, realized: _Realized) -> Tensor:
        """Return `C A^t x`, t = 0 … length - 1, for states x (*B, n), in the dtype of x."""
        found, (A, _, C) = realized
        if found.stepwise:
            silence = x.new_zeros(*x.shape[:-1], length)
            return plain_steps(self.A, self.B, self.C, silence, x)[0].to(x.dtype)
        if not found.factors:
            return krylov_product(C, A, x, length)
        # x is not rounded before the last product, which may cancel a few digits.
        return krylov_product(C, A, found.into(x.double()), length).to(x.dtype)

    def recurrence(self, form: str | None = None) -> StateSpaceRecurrence:
        """Return the recurrence, which takes one product with the dense `A` for each step.

        `gramian.systems.to_modal` and `gramian.systems.to_transfer_function` lead to cheaper
        recurrences where these forms exist.

        Raises:
            ValueError: if `form` is given and is not "state_space", the only form.
        """
        if form not in (None, "state_space"):
            raise ValueError(
                f'a state-space system has the recurrence form "state_space" only; got {form!r}.'
            )
        return StateSpaceRecurrence(self)

    def state_space(self) -> StateSpace:
        """Return the system itself in float64."""
        return self.to(dtype=torch.float64)

    def apply_from(self, u: Tensor, state: StateSpaceState) -> tuple[Tensor, StateSpaceState]:
        x = state.x
        length = u.shape[-1]
        signal = u.to(x.dtype)
        realized = found, (A, B, _) = self.realized()
        if found.stepwise:
            y, end = plain_steps(self.A, self.B, self.C, signal, x)
            y = y + self.D.double().unsqueeze(-1) * signal
            return y.to(u.dtype), StateSpaceState(end.to(x.dtype))
        taps = torch.cat([self.D.unsqueeze(-1), self._free(self.B, length, realized)], dim=-1)
        y = causal_convolution(signal, taps[..., :length].to(x.dtype))
        y = y + self._free(x, length, realized)
        past = found.into(x.double()).unsqueeze(-1)
        carried = (matrix_power(A, length) @ past).squeeze(-1) + krylov_sum(A, B, signal.double())
        return y.to(u.dtype), StateSpaceState(found.out_of(carried).to(x.dtype))

    def _infinite_hankel_singular_values(self) -> Tensor:
        if self.order == 0:
            return self.B.double()
        found, (A, B, C) = self.realized()
        if found.stepwise:
            raise ValueError(
                "the Hankel singular values of this state-space system cannot be computed in "
                "double precision: powers of its state matrix lose every digit; give `length` for "
                "a finite horizon."
            )
        check_spectral_radius(torch.linalg.eigvals(A).abs().amax(-1))
        return infinite_hankel_singular_values(A, B, C)


class StateSpaceRecurrence(VectorRecurrence[StateSpaceState]):
    """`y_t = C x + D u_t`, `x ← A x + B u_t`.

    Args:
        system: The state-space system to step.
    """

    form = "state_space"
    state_type = StateSpaceState

    def __init__(self, system: StateSpace) -> None:
        self.system: StateSpace = system.frozen()
        dtype = working_dtype(system.D)
        # One matrix holds A and C, so a step is one product and one sum.
        rows = torch.cat([self.system.A, self.system.C.unsqueeze(-2)], dim=-2).to(dtype)
        inputs = torch.cat([self.system.B, self.system.D.unsqueeze(-1)], dim=-1).to(dtype)
        self._rows, self._inputs = rows, inputs
        self._like, self._state_shape = inputs, (self.system.order,)

    def _advance(self, u_t: Tensor, state: StateSpaceState) -> tuple[Tensor, StateSpaceState]:
        x = state.x
        sample = u_t.to(x.dtype).unsqueeze(-1)
        with torch.autocast(x.device.type, enabled=False):
            new = (self._rows.to(x.dtype) @ x.unsqueeze(-1)).squeeze(-1) + self._inputs * sample
        return new[..., -1].to(u_t.dtype), StateSpaceState(new[..., :-1])

    def block_form(self, size: int, streams: int = 0) -> BlockForm[StateSpaceState]:
        return VectorBlockForm.from_state_space(self.system, size, self._like.dtype, streams)
