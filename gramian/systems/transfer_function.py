r"""Rational transfer functions, and the companion recurrence that steps them.

``H(z) = d + (b_1 z^-1 + … + b_n z^-n) / (1 + a_1 z^-1 + … + a_n z^-n)``.

Companion realisation (RTF, section 3.1): ``A = [[-a], [I, 0]]``, ``B = e_1``, ``C = b``. The state
is the last n values of ``w = u / a(z)``, so a step takes O(n) operations. Coefficients and state
are kept in double precision: rounding ``a`` to single makes half of all stable denominators of
degree 128 unstable.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from gramian.ops import causal_convolution, rational_kernel
from gramian.ops.recursion import all_pole_filter
from gramian.systems._hankel import check_spectral_radius, reachability_factor
from gramian.systems._state import State
from gramian.systems._system import LinearRecurrence, System, check_tensor
from gramian.systems.fir import FIR, FIRRecurrence, FIRState

__all__ = ["CompanionRecurrence", "CompanionState", "TransferFunction"]

_TOLERANCE = 1e-5
"""Relative l2 error up to which a companion recurrence counts as the kernel it came from."""

_DENSE_ELEMENTS = 2**20
"""Elements up to which a product with a Toeplitz matrix is taken without an FFT."""


class _Fields(NamedTuple):
    past: Tensor


class CompanionState(_Fields, State):
    """The last n values of ``w = u / a(z)``, newest first: (*B, *C', n), float64."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True, eq=False)
class TransferFunction(System):
    """``H(z) = d + b(z) / a(z)``, strictly proper fraction plus direct term.

    Unlike scipy's, ``b`` starts at ``z^-1`` and ``a`` omits its leading 1: see :meth:`from_scipy`.

    Args:
        b: (*C, n), real: numerator coefficients ``b_1 … b_n``.
        a: (*C, n), real: denominator coefficients ``a_1 … a_n``.
        d: (*C), real: the direct term ``h_0``.

    Raises:
        TypeError: if a field is not a real floating-point tensor.
        ValueError: if the shapes do not belong together.
    """

    b: Tensor
    a: Tensor
    d: Tensor
    taps: Tensor | None = dataclasses.field(default=None, repr=False, kw_only=True)
    """The first taps, where they were known before ``b`` was: see :meth:`from_truncated`."""

    def __post_init__(self) -> None:
        for name in ("b", "a", "d"):
            value = getattr(self, name)
            check_tensor(f"{name} of a transfer function", value)
            if not value.dtype.is_floating_point:
                raise TypeError(
                    f"{name} of a transfer function must be real floating point, got {value.dtype}."
                )
        if self.b.ndim == 0 or self.b.shape != self.a.shape or self.b.shape[:-1] != self.d.shape:
            raise ValueError(
                "a transfer function takes b and a (*channels, n) and d (*channels), got "
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
    ) -> Self:
        """From a truncated numerator: the parametrisation of RTF (section 3.2).

        On ``grid`` roots of unity ``b / a + d`` is the spectrum of a kernel truncated to ``grid``
        taps. The exact numerator is the first n coefficients of ``a`` times that kernel, so the
        recurrence reproduces it; no linear system is solved. Sampling a spectrum aliases time:
        tap 0 holds ``d`` and tap ``grid`` of the rational function.

        Args:
            b: (*C, n), real: truncated numerator.
            a: (*C, n) or, with shared denominators, broadcasting against it.
            d: (*C), real.
            grid: Number of roots of unity, greater than n.
            length: Taps to keep for :meth:`impulse_response`; default: all of the grid.
            dtype: Of the system; default: that of the coefficients. In float32 the spectrum
                itself is off by more than 1e-4 for most stable systems beyond n = 16.

        Raises:
            ValueError: if the grid is not larger than the order.
        """
        order = b.shape[-1]
        if grid <= order:
            raise ValueError(f"the grid must be larger than the order {order}, got {grid}.")
        length = grid if length is None else min(length, grid)
        kernel = rational_kernel(b, a, d, grid, length=max(length, order + 1), dtype=dtype)
        a = a.to(kernel.dtype)
        exact = _exact_numerator(a, kernel[..., 1 : order + 1]) if order else b
        return cls(exact, a.expand(b.shape), kernel[..., 0], taps=kernel)

    @classmethod
    def from_scipy(
        cls,
        b: np.ndarray | Tensor,
        a: np.ndarray | Tensor,
        dtype: torch.dtype = torch.float64,
    ) -> Self:
        """From scipy's ``(b, a)``: ``(b[0] + b[1] z^-1 + …) / (a[0] + a[1] z^-1 + …)``.

        Args:
            b: (*C, m + 1), numerator.
            a: (*C, n + 1), denominator; ``a[..., 0]`` must not be zero.
            dtype: Of the result.

        Raises:
            ValueError: if the numerator has more coefficients than the denominator and the rest is
                not zero (an FIR part belongs into ``FIR``), or ``a[..., 0]`` is zero.
        """
        num = torch.atleast_1d(torch.as_tensor(b)).to(torch.float64)
        den = torch.atleast_1d(torch.as_tensor(a)).to(torch.float64)
        if bool((den[..., 0] == 0).any()):
            raise ValueError("the leading denominator coefficient a[0] must not be zero.")
        size = max(num.shape[-1], den.shape[-1])
        den = torch.nn.functional.pad(den, (0, size - den.shape[-1]))
        num = torch.nn.functional.pad(num, (0, size - num.shape[-1]))
        num, den = torch.broadcast_tensors(num / den[..., :1], den / den[..., :1])
        d = num[..., 0]
        strict = num[..., 1:] - d.unsqueeze(-1) * den[..., 1:]
        return cls(strict.to(dtype), den[..., 1:].to(dtype), d.to(dtype))

    def to_scipy(self) -> tuple[np.ndarray, np.ndarray]:
        """``(b, a)`` of scipy.signal, float64, each (*C, n + 1): ``b = [d, b + d a]``."""
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
        """n, the degree of the denominator."""
        return self.a.shape[-1]

    def impulse_response(self, length: int) -> Tensor:
        if self.taps is not None and length <= self.taps.shape[-1]:
            # A slice of everything is not free: its gradient is copied.
            whole = length == self.taps.shape[-1]
            return self.taps if whole else self.taps[..., :length]
        if length == 1 or self.order == 0:
            return torch.nn.functional.pad(self.d.unsqueeze(-1), (0, length - 1))
        impulse = torch.zeros(*self.channel_shape, length - 1, dtype=torch.float64)
        impulse[..., 0] = 1
        series = all_pole_filter(self.a.double(), impulse.to(self.device))
        tail = causal_convolution(series, self.b.double()).to(self.dtype)
        return torch.cat([self.d.unsqueeze(-1), tail], dim=-1)

    def poles(self) -> Tensor:
        """(*C, n), complex128: the zeros of the denominator, by eigenvalues of the companion."""
        return torch.linalg.eigvals(self._companion())

    def spectral_radius(self) -> Tensor:
        """(*C), float64: the largest modulus of a pole; 0 without any."""
        return torch.nn.functional.pad(self.poles().abs(), (0, 1)).amax(-1)

    def recurrence(self, form: str | None = None) -> CompanionRecurrence | FIRRecurrence:
        """The system as a recurrence.

        Args:
            form: "companion", O(n) a step in double precision; "online", exact convolution with the
                known taps; None: the companion form if its impulse response is that of the known
                taps to 1e-5 in the relative l2 norm (always, where no taps are known: then the
                coefficients are the definition), else "online".

        Raises:
            ValueError: for another form, or "online" where no taps are known.
        """
        if form not in (None, "companion", "online"):
            raise ValueError(
                'a transfer function has the recurrence forms "companion" and "online", got '
                f"{form!r}."
            )
        if form == "online":
            if self.taps is None:
                raise ValueError(
                    'the form "online" needs the taps of a finite kernel: use '
                    "FIR(system.impulse_response(length)).recurrence()."
                )
            return FIR(self.taps).recurrence()
        companion = CompanionRecurrence(self)
        if form is None and self.taps is not None and not companion.error <= _TOLERANCE:
            return FIR(self.taps).recurrence()
        return companion

    def _apply_from(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        if isinstance(state, FIRState) and self.taps is not None:
            return FIR(self.taps)(u, state)
        if not isinstance(state, CompanionState):
            raise TypeError(
                f"a transfer function continues from a CompanionState, got {type(state).__name__}."
            )
        (past,) = state
        if self.order == 0:
            return u * self.d.unsqueeze(-1).to(u.dtype), state
        a, b, d = self.a.double(), self.b.double(), self.d.double()
        w = all_pole_filter(a, u.double(), past.double())
        history = torch.cat([past.flip(-1), w], dim=-1)
        y = causal_convolution(history, torch.nn.functional.pad(b, (1, 0)))[..., self.order :]
        y = y + d.unsqueeze(-1) * u.double()
        return y.to(u.dtype), CompanionState(history[..., -self.order :].flip(-1))

    def _companion(self) -> Tensor:
        shift = torch.eye(self.order, dtype=torch.float64, device=self.device)[:-1]
        top = -self.a.double().unsqueeze(-2)
        return torch.cat([top, shift.expand(*self.channel_shape, -1, -1)], dim=-2)

    def _infinite_hankel_singular_values(self) -> Tensor:
        if self.order == 0:
            return self.b.double()
        A = self._companion()
        check_spectral_radius(self.spectral_radius())
        first = torch.zeros_like(self.a, dtype=torch.float64)
        first[..., 0] = 1
        reach = reachability_factor(A, first)
        observe = reachability_factor(A.mT, self.b.double())
        return torch.linalg.svdvals(observe @ reach.mT)


def _exact_numerator(a: Tensor, taps: Tensor) -> Tensor:
    """``b_j = Σ_{i<j} a_i h_{j-i}``, a_0 = 1, from the taps h_1 … h_n (*C, n)."""
    order = taps.shape[-1]
    monic = torch.cat([torch.ones_like(a[..., :1]), a[..., :-1]], dim=-1)  # a_0 … a_{n-1}
    if a.numel() * order > _DENSE_ELEMENTS:
        return causal_convolution(taps, monic)
    shifted = torch.nn.functional.pad(monic, (order - 1, 0)).unfold(-1, order, 1)  # (*C, n, n)
    return (shifted @ taps.flip(-1).unsqueeze(-1)).squeeze(-1)


class CompanionRecurrence(LinearRecurrence):
    """``w_t = u_t - Σ a_j w_{t-j}``, ``y_t = d u_t + Σ b_j w_{t-j}``, in double precision."""

    form = "companion"
    _state = CompanionState

    def __init__(self, system: TransferFunction) -> None:
        self.system: TransferFunction = system.frozen().to(dtype=torch.float64)
        self._taps = torch.stack([-self.system.a, self.system.b], dim=-1)  # (*C, n, 2)
        self._like, self._state_shape = self._taps, (self.system.order,)
        if self.system.taps is not None and self.system.order:
            self.error = self._measured_error(self.system.taps)

    @torch.no_grad()
    def step(self, u_t: Tensor, state: State) -> tuple[Tensor, State]:
        assert isinstance(state, CompanionState)
        (past,) = state
        sample = u_t.to(past.dtype)
        feedback, output = torch.einsum("...n,...nk->...k", past, self._taps).unbind(-1)
        newest = (sample + feedback).unsqueeze(-1)
        y = torch.addcmul(output, self.system.d, sample)
        past = torch.cat([newest, past[..., : self.system.order - 1]], dim=-1)
        return y.to(u_t.dtype), CompanionState(past if self.system.order else state.past)
