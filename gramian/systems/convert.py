r"""Conversions between the realizations of a system.

`to_transfer_function`, `to_modal`, `to_state_space` and `to_fir` return a system with the same
impulse response in float64, or raise an error that says why there is none. The table shows how the
first three find it. Rounding may ruin the conversions that find the zeros of a polynomial or
compute coefficients from zeros, so their results are verified. The impulse responses before and
after are compared over the infinite horizon. The conversion is refused if they differ by more than
`tol`, or if a stable system would become unstable. A system with a pole within 1e-7 of the unit
circle is compared over 2^20 steps, and an unstable system over 4,096.

==================  =====================  =======================  ==========================
from \ to           TransferFunction       Modal                    StateSpace
==================  =====================  =======================  ==========================
TransferFunction    itself                 partial fractions        companion form
Modal               products of the poles  itself                   2 × 2 blocks
StateSpace          eigenvalues            eigenvectors             itself
DPLR                eigenvalues            eigenvectors             dense
FIR                 `a = 0`                a single delay only      shift register
==================  =====================  =======================  ==========================

The impulse response of a rational system with a nonzero pole never ends, so only a finite kernel
converts to an `FIR`. `FIR(system.impulse_response(length))` truncates any impulse response, and
`gramian.reduce` finds an approximation where a conversion is refused.

`to_dense_operator` converts the first L steps of any system, and `to_time_varying` the first L
steps of any recurrence. `gated_convolution` makes a time-varying system from a convolution and two
gates.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from gramian.ops.similarity import reached
from gramian.systems._system import System, TimeInvariantSystem
from gramian.systems.dense_operator import DenseOperator
from gramian.systems.fir import FIR
from gramian.systems.modal import Modal
from gramian.systems.state_space import StateSpace
from gramian.systems.time_varying import TimeVarying
from gramian.systems.transfer_function import TransferFunction, exact_numerator

__all__ = [
    "TOLERANCE",
    "conversion_error",
    "gated_convolution",
    "to_dense_operator",
    "to_fir",
    "to_modal",
    "to_state_space",
    "to_time_varying",
    "to_transfer_function",
]

TOLERANCE = 1e-8
"""The largest relative l2 error of the impulse response with which a conversion is accepted."""

_TAPS = 4096
"""The largest number of taps over which computed impulse responses are compared. It is also the
horizon for unstable systems, whose responses grow without end."""

_LONG = 2**20
"""The number of steps that are compared if a pole is within `_MARGIN` of the unit circle."""

_MARGIN = 1e-7


def to_transfer_function(system: TimeInvariantSystem, tol: float = TOLERANCE) -> TransferFunction:
    """Convert to a fraction of polynomials.

    The denominator is the product of `1 - λ z^-1` over the poles λ. The numerator is the first n
    coefficients of the product of the denominator and the impulse response. The degree is the order
    of the largest channel. Channels of a lower order get additional poles at zero.

    Args:
        system: A time-invariant system, channels (*C).
        tol: The largest accepted relative l2 error of a channel's impulse response.

    Returns:
        A `TransferFunction` in float64, channels (*C).

    Raises:
        TypeError: if the system is not time-invariant.
        ValueError: if rounding makes the error larger than `tol`, as happens for polynomials of
            high degree whose zeros crowd.
    """
    if isinstance(system, TransferFunction):
        return system.to(dtype=torch.float64)
    if isinstance(system, FIR):
        kernel = system.kernel.double()
        return TransferFunction(kernel[..., 1:], torch.zeros_like(kernel[..., 1:]), kernel[..., 0])
    if isinstance(system, Modal):
        poles = _all_poles(system)
    else:
        poles = to_state_space(system).poles()
    a = _polynomial(poles).real
    taps = system.to(dtype=torch.float64).impulse_response(a.shape[-1] + 1)
    b = exact_numerator(a, taps[..., 1:]) if a.shape[-1] else a
    return _verified(TransferFunction(b, a, taps[..., 0]), system, tol)


def to_modal(system: TimeInvariantSystem, tol: float = TOLERANCE) -> Modal:
    """Convert to poles and residues by partial fractions.

    Args:
        system: A time-invariant system, channels (*C).
        tol: The largest accepted relative l2 error of a channel's impulse response.

    Returns:
        A `Modal` in float64 and complex128, channels (*C).

    Raises:
        TypeError: if the system is not time-invariant.
        ValueError: if there is no modal form because poles coincide, as the poles of a finite
            kernel do, or if rounding makes the error larger than `tol`.
    """
    if isinstance(system, Modal):
        return system.to(dtype=torch.float64)
    if isinstance(system, FIR):
        kernel = system.kernel.double()
        if bool((kernel[..., 2:] != 0).any()):
            raise ValueError(
                f"a finite kernel of {kernel.shape[-1]} taps has all its poles at zero, and equal "
                "poles have no modal form; gramian.reduce finds a modal system near it."
            )
        residues = torch.nn.functional.pad(kernel[..., 1:2], (0, 2 - min(2, kernel.shape[-1])))
        return Modal(torch.zeros_like(residues) + 0j, residues + 0j, kernel[..., 0])
    dense = to_state_space(system)
    _, (A, B, C) = dense.realized()
    poles, vectors = torch.linalg.eig(A)
    weights = torch.linalg.lstsq(vectors, (B + 0j).unsqueeze(-1)).solution.squeeze(-1)
    residues = ((C + 0j).unsqueeze(-2) @ vectors).squeeze(-2) * weights
    real = poles.imag == 0
    kept = poles.imag >= 0
    # One pole of a conjugate pair counts for both. A real pole counts once, with a real residue.
    residues = torch.where(real, residues.real + 0j, 2 * residues)
    order = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)
    modes = int(kept.sum(-1).max()) if kept.numel() else 0
    poles = torch.where(kept, poles, 0).gather(-1, order)[..., :modes]
    residues = torch.where(kept, residues, 0).gather(-1, order)[..., :modes]
    return _verified(Modal(poles, residues, dense.D), system, tol)


def to_state_space(system: TimeInvariantSystem) -> StateSpace:
    """Convert to a system with a dense state matrix. This conversion is always exact.

    Args:
        system: A time-invariant system, channels (*C).

    Returns:
        A `StateSpace` in float64, channels (*C): the companion form of a transfer function, one
        rotation for every conjugate pair of a modal system, or the shift register of an FIR.

    Raises:
        TypeError: if the system is not time-invariant.
    """
    if not isinstance(system, TimeInvariantSystem):
        raise TypeError(
            "a time-invariant system is needed (TransferFunction, Modal, StateSpace, DPLR or FIR); "
            f"got {type(system).__name__}."
        )
    return system.state_space()


def to_fir(system: TimeInvariantSystem) -> FIR:
    """Convert to a finite kernel.

    Args:
        system: An `FIR`, or another system all of whose poles are zero.

    Returns:
        An `FIR` in float64, channels (*C).

    Raises:
        TypeError: if the system is not time-invariant.
        ValueError: if the impulse response never ends.
    """
    if isinstance(system, FIR):
        return system.to(dtype=torch.float64)
    if isinstance(system, TransferFunction):
        finite = bool((system.a == 0).all())
    elif isinstance(system, Modal):
        finite = bool(((system.poles == 0) | (system.residues == 0)).all())
    else:
        A = to_state_space(system).A
        finite = bool((torch.linalg.matrix_power(A, max(1, A.shape[-1])) == 0).all())
    if not finite:
        raise ValueError(
            f"the impulse response of this {type(system).__name__} has no end; cut it with "
            "FIR(system.impulse_response(length))."
        )
    return FIR(system.to(dtype=torch.float64).impulse_response(system.order + 1))


def to_time_varying(system: TimeInvariantSystem | TimeVarying, length: int) -> TimeVarying:
    """Convert the first `length` steps of a system to a time-varying system.

    Args:
        system: A time-invariant system of finite order, or a `TimeVarying` to shorten. A modal
            system without complex poles becomes a diagonal system. Every other time-invariant
            system becomes a dense system, in coordinates where products of state matrices are
            bounded.
        length: The number of steps, L.

    Returns:
        A `TimeVarying` in float64, channels (*C). All steps share the memory of a constant
        coefficient.

    Raises:
        TypeError: if the system is of another kind.
        ValueError: if a time-varying system has fewer than `length` steps.
    """
    if isinstance(system, TimeVarying):
        system.check_steps(0, length)
        return system.steps(0, length).to(dtype=torch.float64)
    if isinstance(system, Modal) and not bool((system.poles.imag * system.residues.abs()).any()):
        ones = torch.ones_like(system.poles.real, dtype=torch.float64)
        A, B, C, D = system.poles.real.double(), ones, system.residues.real.double(), system.d
    else:
        dense = to_state_space(system)
        found, (A, B, C) = dense.realized()
        if found.stepwise:
            A, B, C = dense.A, dense.B, dense.C
        D = dense.D

    def constant(value: Tensor, size: int) -> Tensor:
        """Insert a time axis before the last `size` dimensions and expand it to L steps."""
        lead, own = value.shape[: value.ndim - size], value.shape[value.ndim - size :]
        return value.unsqueeze(-1 - size).expand(*lead, length, *own)

    own = A.ndim - D.ndim
    return TimeVarying(constant(A, own), constant(B, 1), constant(C, 1), constant(D.double(), 0))


def gated_convolution(system: TimeInvariantSystem, q: Tensor, k: Tensor) -> TimeVarying:
    """Make the operator `diag(q) T diag(k)`, a convolution T between two gates as in Hyena.

    Args:
        system: The convolution: a time-invariant system of finite order, channels (*C).
        q: (*B, L), real: the gate that multiplies the output of the convolution.
        k: (*B, L), real: the gate that multiplies its input. C broadcasts against B, and B may have
            further dimensions.

    Returns:
        A `TimeVarying` of L steps in float64, channels (*B). Gradients flow to the gates, and
        through `to_time_varying` to the system.

    Raises:
        TypeError: if the system is of another kind.
        ValueError: if the gates have different shapes, or if these do not fit the channels of the
            system.
    """
    lead = q.shape[:-1]
    try:
        fits = torch.broadcast_shapes(system.channel_shape, lead) == lead and q.shape == k.shape
    except RuntimeError:
        fits = False
    if not fits or not q.ndim:
        raise ValueError(
            f"the gates q and k must have one shape (*channels, L) that the system's channels "
            f"{tuple(system.channel_shape)} broadcast against; got {tuple(q.shape)} and "
            f"{tuple(k.shape)}."
        )
    constant = to_time_varying(system, q.shape[-1])
    q, k = q.double(), k.double()
    A = constant.A.expand(*lead, *constant.A.shape[len(constant.channel_shape) :])
    B = constant.B * k.unsqueeze(-1)
    C = constant.C * q.unsqueeze(-1)
    return TimeVarying(A, B, C, q * constant.D * k)


def to_dense_operator(system: System, length: int) -> DenseOperator:
    """Convert the first `length` steps of any system to a matrix, in the system's dtype.

    Args:
        system: Any system, channels (*C).
        length: The number of steps, L.

    Returns:
        A `DenseOperator` of L steps, channels (*C).

    Raises:
        ValueError: if the system has fewer than `length` steps.
    """
    return DenseOperator(system.matrix(length))


def _all_poles(system: Modal) -> Tensor:
    """Return every channel's poles including conjugates, (*C, n), padded with zeros."""
    poles, residues = system.poles.to(torch.complex128), system.residues
    tiny = torch.finfo(system.poles.real.dtype).eps
    used = residues != 0
    pair = used & (poles.imag.abs() > tiny * poles.abs())
    poles = torch.where(pair, poles, poles.real + 0j)
    both = torch.stack([poles, poles.conj().resolve_conj()], dim=-1).flatten(-2)
    there = torch.stack([used, pair], dim=-1).flatten(-2)
    order = (~there).to(torch.uint8).argsort(dim=-1, stable=True)[..., : system.order]
    return torch.where(there, both, 0).gather(-1, order)


def _polynomial(zeros: Tensor) -> Tensor:
    """Return the coefficients a_1 … a_n of `Π (1 - λ z^-1)`, (*C, n), complex128.

    The factors are multiplied in the Leja order of their zeros, in which each zero is as far as
    possible from the zeros before it. So no intermediate coefficient grows beyond the final
    coefficients.
    """
    zeros = _leja(zeros)
    coefficients = torch.ones_like(zeros[..., :1])
    for zero in zeros.unbind(-1):
        shifted = torch.nn.functional.pad(coefficients, (1, 0)) * zero.unsqueeze(-1)
        coefficients = torch.nn.functional.pad(coefficients, (0, 1)) - shifted
    return coefficients[..., 1:]


def _leja(points: Tensor) -> Tensor:
    """Sort points (*C, n) so that each has the largest product of distances to its predecessors."""
    count = points.shape[-1]
    if count < 3:
        return points
    chosen: list[Tensor] = []
    distance = points.abs().clamp_min(1e-300).log()
    for _ in range(count):
        index = distance.argmax(-1, keepdim=True)
        point = points.gather(-1, index)
        chosen.append(point)
        gap = (points - point).abs().clamp_min(1e-300).log()
        distance = (distance + gap).scatter(-1, index, -math.inf)
    return torch.cat(chosen, dim=-1)


_Converted = TypeVar("_Converted", TransferFunction, Modal)


def _verified(converted: _Converted, system: TimeInvariantSystem, tol: float) -> _Converted:
    error = conversion_error(converted, system, tol)
    if not bool((error <= tol).all()):
        kind = type(converted).__name__
        reason = (
            "its poles coincide, or partial fractions lose what its coefficients hold"
            if isinstance(converted, Modal)
            else "its coefficients lose what its poles hold"
        )
        worst = float(error.max())
        found = f"impulse responses differ by {worst:.1e}, tol is {tol:.1e}"
        if worst == math.inf:
            found = "the impulse response would grow or cannot be compared"
        raise ValueError(
            f"this {type(system).__name__} is no {kind} in double precision: {reason} ({found}); "
            "gramian.reduce finds a modal system near it."
        )
    return converted


@torch.no_grad()
def conversion_error(
    converted: TimeInvariantSystem, system: TimeInvariantSystem, tol: float
) -> Tensor:
    """Measure the relative l2 error of a conversion's impulse response, (*C).

    The result is the larger of two errors. The first is the difference of the exact impulse
    responses over the infinite horizon. The second is the difference of the taps that the two
    systems compute. It covers the taps that matter at the tolerance `tol`, but at most `_TAPS`.
    """
    error, memory = _difference(to_state_space(system), to_state_space(converted), tol)
    length = int(min(_TAPS, max(64, 8 * (system.order + 1), memory)))
    before = system.to(dtype=torch.float64).impulse_response(length)
    after = converted.impulse_response(length)
    norm = torch.linalg.vector_norm(before, dim=-1)
    computed = torch.linalg.vector_norm(after - before, dim=-1) / torch.where(norm > 0, norm, 1)
    return torch.maximum(error, computed.nan_to_num(torch.inf))


def _difference(before: StateSpace, after: StateSpace, tol: float) -> tuple[Tensor, float]:
    """Measure how much two systems differ over an infinite horizon.

    The measure is computed from a square-root factor of the reachability Gramian of both systems
    together, so that no condition number is squared.

    Returns:
        Two results. The first, (*C), is the l2 norm of the difference between the impulse
        responses, relative to the norm of the impulse response of `before`. It is infinite if
        `before` is stable and `after` is not. The second is the number of steps in which the
        slowest pole of `before` decays to `tol`.
    """
    (one, (A, B, C)), (two, (F, G, H)) = before.realized(), after.realized()
    radius, other = _radius(A), _radius(F)
    size, step = before.D.square(), (after.D - before.D).square()
    order = B.shape[-1]
    if order + G.shape[-1]:
        both = torch.nn.functional.pad(A, (0, G.shape[-1], 0, G.shape[-1]))
        both[..., order:, order:] = F
        rows = torch.cat([B, G], dim=-1).unsqueeze(-2)
        outputs = torch.stack([torch.cat([C, 0 * H], dim=-1), torch.cat([-C, H], dim=-1)], dim=-1)
        energy = (reached(both, rows) @ outputs).square().sum(-2)  # (*C, 2)
        for slow, horizon in ((radius >= 1 - _MARGIN, _LONG), (radius > 1 + _MARGIN, _TAPS)):
            if bool(slow.any()):
                factor = reached(both, rows, torch.inf, horizon.bit_length() - 1)
                finite = (factor @ outputs).square().sum(-2)
                energy = torch.where(slow.unsqueeze(-1), finite, energy)
        size, step = size + energy[..., 0], step + energy[..., 1]
    error = (step / torch.where(size > 0, size, 1)).sqrt().nan_to_num(torch.inf)
    unstable = other >= torch.where(radius < 1 - _MARGIN, 1.0, 1 + _MARGIN)
    lost = (radius <= 1 + _MARGIN) & unstable
    if one.stepwise or two.stepwise:  # the comparison is not reliable
        lost = torch.ones_like(lost)
    slowest = float(radius.max()) if radius.numel() else 0.0
    memory = 0 if slowest == 0 else _TAPS if slowest >= 1 else math.log(tol) / math.log(slowest)
    return torch.where(lost, torch.inf, error), memory


def _radius(A: Tensor) -> Tensor:
    """Return the spectral radius of every matrix, (*C)."""
    return torch.nn.functional.pad(torch.linalg.eigvals(A).abs(), (0, 1)).amax(-1)
