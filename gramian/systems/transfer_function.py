r"""Rational transfer functions, and the choice of a recurrence that computes them.

`H(z) = d + (b_1 z^-1 + … + b_n z^-n) / (1 + a_1 z^-1 + … + a_n z^-n)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from gramian.ops import causal_convolution, rational_kernel
from gramian.ops.devices import has_float64
from gramian.ops.lengths import at_most, is_symbol
from gramian.ops.recursion import all_pole_filter
from gramian.systems._modal_recurrence import ModalRecurrence, ModalState
from gramian.systems._recurrence import REPRODUCED, Recurrence
from gramian.systems._rounding import delays, warn_of_lost_poles
from gramian.systems._state import State, check_state
from gramian.systems._system import STATIC, TimeInvariantSystem, check_tensor, working_dtype
from gramian.systems.companion import CompanionRecurrence, CompanionState, companion_form
from gramian.systems.fir import FIR, FIRState
from gramian.systems.lattice import (
    LatticeRecurrence,
    LatticeState,
    apply_lattice,
    lattice_realization,
)
from gramian.systems.modal import Modal
from gramian.systems.state_space import StateSpace

__all__ = ["TransferFunction", "TruncatedTransferFunction", "exact_numerator", "proper_fraction"]

_ANGLES = 512
"""The number of points on the upper half circle at which the frequency response is evaluated,
besides the angles of the poles."""

_DENSE_ELEMENTS = 2**20
"""The largest number of elements for which a Toeplitz product is computed without an FFT."""


Reducer = Callable[[Tensor, int], tuple[Modal, float]]
"""A function that takes taps (*C, K) and an order. It returns a modal system with nearly these
taps, and the relative error of that system."""


@dataclasses.dataclass(frozen=True, eq=False)
class TransferFunction(TimeInvariantSystem[Any]):
    """`H(z) = d + b(z) / a(z)`: a strictly proper fraction plus a direct term.

    Unlike in scipy, `b` starts at `z^-1` and `a` omits its leading 1. `from_scipy` makes a system
    from scipy's coefficients.

    Args:
        b: (*C, n), real: the numerator coefficients `b_1 … b_n`.
        a: (*C, n), real: the denominator coefficients `a_1 … a_n`.
        d: (*C), real: the direct term `h_0`.

    Raises:
        TypeError: if a field is not a real floating-point tensor.
        ValueError: if the shapes do not fit together.
    """

    _kind = "transfer function"
    _state_types = (CompanionState, LatticeState, ModalState, FIRState)

    b: Tensor
    a: Tensor
    d: Tensor
    taps: Tensor | None = dataclasses.field(default=None, repr=False, kw_only=True)
    """(*C, K): the first taps, if the system was made from them; see `from_truncated`."""
    reflection: Tensor | None = dataclasses.field(default=None, repr=False, kw_only=True)
    """(*C, n): the reflection coefficients of `a`, if `a` was computed from them."""
    reducer: Reducer | None = dataclasses.field(
        default=None, repr=False, kw_only=True, metadata=STATIC
    )
    """The function that finds a modal system with nearly the known taps, for recurrences of the
    form "modal". Filters pass `gramian.reduction.find_modal_form` to their systems."""

    def __post_init__(self) -> None:
        for name in ("b", "a", "d"):
            value = getattr(self, name)
            check_tensor(f"{name} of a transfer function", value)
            if not value.dtype.is_floating_point:
                raise TypeError(
                    f"{name} of a transfer function must be real floating point; got {value.dtype}."
                )
        if self.b.ndim == 0 or self.b.shape != self.a.shape or self.b.shape[:-1] != self.d.shape:
            raise ValueError(
                "a transfer function takes b and a (*channels, n) and d (*channels); got "
                f"{tuple(self.b.shape)}, {tuple(self.a.shape)} and {tuple(self.d.shape)}."
            )

    @classmethod
    def from_truncated(
        cls,
        b: Tensor,
        a: Tensor,
        d: Tensor,
        grid: int,
        length: int | None = None,
        dtype: torch.dtype | None = None,
        reflection: Tensor | None = None,
        reducer: Reducer | None = None,
    ) -> TransferFunction:
        """Make a system from a truncated numerator, the parametrization of RTF (section 3.2).

        On `grid` roots of unity, `b / a + d` is the spectrum of a kernel that is truncated to
        `grid` taps. The exact numerator is the first n coefficients of the product of `a` and that
        kernel, so the recurrence reproduces the kernel and no linear system is solved. Sampling a
        spectrum aliases time: tap 0 contains `d` and tap `grid` of the rational function.

        Args:
            b: (*C, n), real: the truncated numerator.
            a: (*C, n), real: the denominator. A shared denominator may have a shape that broadcasts
                to this.
            d: (*C), real: the constant term on the grid.
            grid: The number of roots of unity, greater than n.
            length: The number of taps to keep for `impulse_response`; by default `grid`.
            dtype: The dtype of the system; by default that of the coefficients. In float32 the
                error of the spectrum exceeds 1e-4 for most stable systems beyond n = 16.
            reflection: The reflection coefficients of `a`, in its shape, if `a` was computed from
                them.
            reducer: The field `reducer` of the system.

        Raises:
            ValueError: if the grid is not larger than the order.
        """
        order = b.shape[-1]
        if grid <= order:
            raise ValueError(f"the grid must be larger than the order {order}; got {grid}.")
        length = at_most(length, grid)
        kernel = rational_kernel(b, a, d, grid, length=max(length, order + 1), dtype=dtype)
        a = a.to(kernel.dtype).expand(b.shape)
        if reflection is not None:
            reflection = reflection.expand(b.shape)
        return TruncatedTransferFunction(
            None, a, kernel[..., 0], taps=kernel, reflection=reflection, reducer=reducer
        )

    @classmethod
    def from_scipy(
        cls,
        b: np.ndarray | Tensor,
        a: np.ndarray | Tensor,
        dtype: torch.dtype = torch.float64,
    ) -> Self:
        """Make a system from scipy's `(b, a)`.

        The transfer function is `(b[0] + b[1] z^-1 + …) / (a[0] + a[1] z^-1 + …)`.

        Args:
            b: (*C, m + 1): the numerator. If it is longer than the denominator, the system has
                further poles at zero.
            a: (*C, n + 1): the denominator; `a[..., 0]` must not be zero.
            dtype: The dtype of the result.

        Warns:
            UserWarning: if a pole is outside the unit circle, or if rounding the coefficients moves
                the frequency response by more than 1e-6 (3e-4 for a dtype of single precision).
                This happens if the degree is high and poles crowd, because the coefficients do not
                determine such poles.

        Raises:
            ValueError: if `a[..., 0]` is zero.
        """
        system = cls(*proper_fraction(b, a, dtype))
        _warn_of_lost_poles(system)
        return system

    def to_scipy(self) -> tuple[np.ndarray, np.ndarray]:
        """Return scipy.signal's `(b, a)`, float64, each (*C, n + 1): `b = [d, b + d a]`."""
        b, a, d = (value.detach().double().cpu() for value in (self.b, self.a, self.d))
        num = torch.cat([d.unsqueeze(-1), b + d.unsqueeze(-1) * a], dim=-1)
        den = torch.cat([torch.ones_like(d).unsqueeze(-1), a], dim=-1)
        return num.numpy(), den.numpy()

    @property
    def channel_shape(self) -> torch.Size:
        return self.d.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.d.dtype

    @property
    def device(self) -> torch.device:
        return self.d.device

    @property
    def order(self) -> int:
        """Return n, the degree of the denominator."""
        return self.a.shape[-1]

    def impulse_response(self, length: int) -> Tensor:
        if self.taps is not None and length <= self.taps.shape[-1]:
            # Slicing costs a copy of the gradient, so all taps are returned without a slice.
            whole = length == self.taps.shape[-1]
            return self.taps if whole else self.taps[..., :length]
        if length == 1 or self.order == 0:
            return torch.nn.functional.pad(self.d.unsqueeze(-1), (0, length - 1))
        impulse = self.a.new_zeros(*self.channel_shape, length - 1, dtype=torch.float64)
        impulse[..., 0] = 1
        series = all_pole_filter(self.a.double(), impulse)
        tail = causal_convolution(series, self.b.double()).to(self.dtype)
        return torch.cat([self.d.unsqueeze(-1), tail], dim=-1)

    def kernel_for(self, u: Tensor, length: int) -> Tensor:
        taps = self.taps
        if taps is not None and is_symbol(length) and length <= taps.shape[-1]:
            return taps.to(working_dtype(u))  # the convolution cuts them
        return super().kernel_for(u, length)

    def poles(self) -> Tensor:
        """Return the zeros of the denominator, computed as eigenvalues of the companion matrix.

        Returns:
            (*C, n), complex128.
        """
        return torch.linalg.eigvals(companion_form(self.a, self.a, self.d).A)

    def spectral_radius(self) -> Tensor:
        """Return the largest modulus of a pole, (*C), float64; 0 if there is no pole."""
        return torch.nn.functional.pad(self.poles().abs(), (0, 1)).amax(-1)

    def recurrence(self, form: str | None = None) -> Recurrence:
        """Return the system as a recurrence.

        The attribute `form` of the recurrence is the form that was chosen. Its attribute `error` is
        the largest relative l2 distance of a channel's impulse response from the known taps.

        Args:
            form: One of the following. "companion" takes O(n) operations a step, in double
                precision. "lattice" takes O(n) operations a step by the reflection coefficients, in
                single precision. "modal" steps the poles and residues that the `reducer` finds for
                the known taps at order n. "online" is the exact convolution with the known taps.
                None chooses the first of these that is available and reproduces the known taps to
                1e-5, and "online" on a device without double precision. If no taps are known, the
                coefficients define the system, and None chooses "companion".

        Raises:
            ValueError: if `form` is none of these, if it is "lattice" and no reflection
                coefficients are known, if it is "modal" or "online" and no taps are known, or if it
                is "modal" and there is no reducer.
        """
        forms: dict[str, Callable[[], Recurrence]] = {
            "companion": lambda: CompanionRecurrence(self)
        }
        if self.reflection is not None:
            k, b, d, taps = self.reflection, self.b, self.d, self.taps
            forms["lattice"] = lambda: LatticeRecurrence(k, b, d, taps)
        if self.taps is not None:
            kernel = FIR(self.taps)
            if self.reducer is not None and self.order:
                forms["modal"] = self._modal_recurrence
            forms["online"] = lambda: kernel.recurrence("online")
        if form is not None:
            if form not in forms:
                raise ValueError(
                    f"this transfer function has the recurrence forms {', '.join(forms)}; got "
                    f'{form!r} ("lattice" needs reflection coefficients, "online" the taps of a '
                    'finite kernel, "modal" those and a reducer).'
                )
            return forms[form]()
        if self.taps is None:
            return forms["companion"]()
        if not has_float64(self.device):  # the others are made and verified in double precision
            return forms["online"]()
        tried = (build() for build in forms.values())
        return next(recurrence for recurrence in tried if recurrence.error <= REPRODUCED)

    @cached_property
    def _modal(self) -> tuple[Modal, float]:
        """Return a modal system of order at most n with nearly the known taps, and its error."""
        assert self.reducer is not None and self.taps is not None
        return self.reducer(self.taps.detach(), self.order)

    def _modal_recurrence(self) -> ModalRecurrence:
        system, error = self._modal
        recurrence = system.recurrence()
        recurrence.error = error
        return recurrence

    def fits(self, state: State, shape: torch.Size) -> bool:
        if isinstance(state, FIRState | ModalState):  # the system that uses the state checks it
            return True
        return super().fits(state, shape)

    def apply_from(self, u: Tensor, state: Any) -> tuple[Tensor, Any]:
        if isinstance(state, FIRState) and self.taps is not None:
            return FIR(self.taps)(u, state)
        if isinstance(state, LatticeState) and self.reflection is not None:
            return apply_lattice(lattice_realization(self.reflection, self.b, self.d), u, state)
        if isinstance(state, ModalState) and self.taps is not None and self.reducer is not None:
            return self._modal[0](u, state)
        check_state("this transfer function", state, [CompanionState])
        past = state.past
        if self.order == 0:
            return u * self.d.unsqueeze(-1).to(u.dtype), state
        a, b, d = self.a.double(), self.b.double(), self.d.double()
        w = all_pole_filter(a, u.double(), past.double())
        history = torch.cat([past.flip(-1), w], dim=-1)
        y = causal_convolution(history, torch.nn.functional.pad(b, (1, 0)))[..., self.order :]
        y = y + d.unsqueeze(-1) * u.double()
        return y.to(u.dtype), CompanionState(history[..., -self.order :].flip(-1))

    def state_space(self) -> StateSpace:
        """Return the companion form as a state-space system, in float64."""
        return companion_form(self.b, self.a, self.d)

    def _as_control(self, control: Any) -> Any:
        return control.TransferFunction(*self.to_scipy(), True)

    def _infinite_hankel_singular_values(self) -> Tensor:
        return self.state_space().hankel_singular_values()


class TruncatedTransferFunction(TransferFunction):
    """A transfer function that is defined by its taps; see `TransferFunction.from_truncated`.

    The numerator is computed from the taps when it is first needed. A convolution needs only the
    taps, and computing n coefficients of many channels takes time.

    Args:
        b: (*C, n), real: the numerator if it is already known, or None.
        a: (*C, n), real: the denominator coefficients.
        d: (*C), real: the direct term.
        taps: (*C, K), K > n: the first taps.
        reflection: (*C, n): the reflection coefficients of `a`, if `a` was computed from them.
        reducer: As in `TransferFunction`.
    """

    taps: Tensor
    _numerator: Tensor | None

    def __init__(
        self,
        b: Tensor | None,
        a: Tensor,
        d: Tensor,
        *,
        taps: Tensor,
        reflection: Tensor | None = None,
        reducer: Reducer | None = None,
    ) -> None:
        known = {"taps": taps, "reflection": reflection, "reducer": reducer}
        for name, value in {"_numerator": b, "a": a, "d": d, **known}.items():
            object.__setattr__(self, name, value)

    @cached_property
    def b(self) -> Tensor:
        """Return the numerator (*C, n): the first n coefficients of `a` times the taps."""
        if self._numerator is not None:
            return self._numerator
        with torch.enable_grad():  # the first caller may have disabled gradients
            taps = self.taps[..., 1 : self.order + 1]
            return exact_numerator(self.a, taps) if self.order else taps

    @classmethod
    def _from_fields(cls, values: Iterable[Any], static: tuple[Any, ...] | None = None) -> Self:
        b, a, d, taps, reflection = values
        reducer = static[0] if static else None
        return cls(b, a, d, taps=taps, reflection=reflection, reducer=reducer)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        fields = (self._numerator, self.a, self.d, self.taps, self.reflection)
        mapped = (None if value is None else function(value) for value in fields)
        return self._from_fields(mapped, self._static)

    def to(
        self,
        device: torch.device | torch.dtype | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Move to another device or to another real floating-point dtype."""
        if self._numerator is None:  # compute it before the taps are rounded
            return self._from_fields(self._fields(), self._static).to(device, dtype)
        return super().to(device, dtype)


def proper_fraction(
    b: np.ndarray | Tensor, a: np.ndarray | Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Split scipy's `(b, a)` into the fields of a `TransferFunction`.

    Args:
        b: (*C, m + 1): the numerator.
        a: (*C, n + 1): the denominator.
        dtype: The dtype of the result.

    Returns:
        The strictly proper numerator (*C, max(m, n)), the denominator (*C, max(m, n)), and the
        direct term (*C).

    Raises:
        ValueError: if `a[..., 0]` is zero.
    """
    num, den = (
        torch.atleast_1d(c.double() if isinstance(c, Tensor) else torch.tensor(np.array(c, float)))
        for c in (b, a)
    )
    if bool((den[..., 0] == 0).any()):
        raise ValueError("the leading denominator coefficient a[0] must not be zero.")
    size = max(num.shape[-1], den.shape[-1])
    den = torch.nn.functional.pad(den, (0, size - den.shape[-1]))
    num = torch.nn.functional.pad(num, (0, size - num.shape[-1]))
    num, den = torch.broadcast_tensors(num / den[..., :1], den / den[..., :1])
    d = num[..., 0]
    strict = num[..., 1:] - d.unsqueeze(-1) * den[..., 1:]
    return strict.to(dtype), den[..., 1:].to(dtype), d.to(dtype)


def exact_numerator(a: Tensor, taps: Tensor) -> Tensor:
    """Return `b_j = Σ_{i<j} a_i h_{j-i}` with a_0 = 1, (*C, n), from the taps h_1 … h_n (*C, n)."""
    order = taps.shape[-1]
    monic = torch.cat([torch.ones_like(a[..., :1]), a[..., :-1]], dim=-1)  # a_0 … a_{n-1}
    if a.numel() * order > _DENSE_ELEMENTS:
        return causal_convolution(taps, monic)
    shifted = torch.nn.functional.pad(monic, (order - 1, 0)).unfold(-1, order, 1)  # (*C, n, n)
    return (shifted @ taps.flip(-1).unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def _warn_of_lost_poles(system: TransferFunction) -> None:
    if not system.order or not system.a.numel():
        return
    # Rounding may change a(z) by eps Σ |a_j|, which matters where a(z) is small: near the poles.
    poles = system.poles()
    delay = delays(poles, _ANGLES)
    value = torch.zeros_like(delay)
    for coefficient in system.a.double().flip(-1).unbind(-1):
        value = (value + coefficient.unsqueeze(-1)) * delay
    magnitude = 1 + system.a.double().abs().sum(-1, keepdim=True)
    moved = (torch.finfo(system.dtype).eps / 2 * magnitude / (1 + value).abs()).amax(-1)
    given = f"coefficients of degree {system.order}"
    warn_of_lost_poles(given, moved, poles.abs().amax(-1), system.dtype, 4)
