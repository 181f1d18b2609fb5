"""Conversions to and from python-control systems and scipy's zeros, poles, gains and sections."""

from __future__ import annotations

import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from gramian.systems._system import TimeInvariantSystem, check_single, import_control
from gramian.systems.cascade import Section, cascade, check_roots, partial_fractions, sections
from gramian.systems.convert import TOLERANCE, conversion_error
from gramian.systems.modal import Modal
from gramian.systems.state_space import StateSpace
from gramian.systems.transfer_function import TransferFunction, proper_fraction

__all__ = ["from_control", "from_zpk", "to_control", "to_zpk"]

_TOLERANCE = 1e-6
"""The coefficients of a polynomial may replace its zeros if the relative l2 error of the impulse
response is at most this."""


def to_control(system: TimeInvariantSystem) -> Any:
    """Convert to a system of python-control; see `TimeInvariantSystem.to_control`."""
    return system.to_control()


def from_control(system: Any, dtype: torch.dtype = torch.float64) -> TransferFunction | StateSpace:
    """Convert a discrete-time system of python-control to a system with one channel.

    Args:
        system: A `control.TransferFunction` or `control.StateSpace` with one input and one output.
            Its sampling time `dt` (a number above 0, or True) is not kept.
        dtype: The dtype of the result.

    Returns:
        A `TransferFunction` for a `control.TransferFunction`, and a `StateSpace` for a
        `control.StateSpace`.

    Raises:
        ImportError: if python-control is not installed.
        TypeError: if the system is neither a `control.TransferFunction` nor a `control.StateSpace`.
        ValueError: if the system is continuous in time, has several inputs or outputs, or has more
            zeros than poles.
    """
    control = import_control()
    if not isinstance(system, control.TransferFunction | control.StateSpace):
        raise TypeError(
            "a control.TransferFunction or control.StateSpace is needed; got "
            f"{type(system).__name__}."
        )
    if not system.isdtime(strict=True):
        raise ValueError(
            f"a system in discrete time is needed; got dt={system.dt}; control.c2d makes one."
        )
    if system.ninputs != 1 or system.noutputs != 1:
        raise ValueError(
            f"a channel has one input and one output; got {system.ninputs} and {system.noutputs}."
        )
    if isinstance(system, control.StateSpace):
        return StateSpace.from_scipy(system.A, system.B, system.C, system.D, dtype=dtype)
    num, den = np.asarray(system.num[0][0]), np.asarray(system.den[0][0])
    return _from_polynomials(num, den, dtype)


def from_zpk(
    zeros: Any, poles: Any, gain: float, dtype: torch.dtype = torch.float64
) -> TransferFunction:
    """Make one channel from scipy's `gain Π (z - zeros) / Π (z - poles)`.

    Args:
        zeros: The zeros, (m,), in conjugate pairs, where m ≤ n.
        poles: The poles, (n,), in conjugate pairs.
        gain: A real number.
        dtype: The dtype of the result.

    Raises:
        ValueError: if there are more zeros than poles, if a complex root has no conjugate, or if
            the coefficients of the polynomials do not determine their zeros in double precision, as
            happens if the degree is high and poles crowd. `StateSpace.from_zpk` and
            `Modal.from_zpk` expand no polynomial.
    """
    z, p = check_roots(zeros, poles, gain)
    num, den = (np.atleast_1d(np.poly(roots)).real for roots in (z, p))
    system = _from_polynomials(gain * num, den, torch.float64, checked=True)
    error = float(conversion_error(system, state_space_of_zpk(z, p, gain), _TOLERANCE))
    if error > _TOLERANCE:
        raise ValueError(
            f"the coefficients of polynomials of degree {len(den) - 1} lose what these poles hold: "
            f"in double precision {_lost(error)} (at most {_TOLERANCE:.0e} is accepted); "
            "StateSpace.from_zpk and Modal.from_zpk expand none."
        )
    return system.to(dtype=dtype)


def state_space_of_zpk(zeros: Any, poles: Any, gain: float) -> StateSpace:
    """Make one channel; see `StateSpace.from_zpk`."""
    z, p = check_roots(zeros, poles, gain)
    _warn_if_unstable(p)
    return _state_space(sections(z, p), float(gain))


def state_space_of_sos(sos: Any) -> StateSpace:
    """Make one channel; see `StateSpace.from_sos`."""
    parts = _given_sections(sos)
    _warn_if_unstable(np.array([pole for part in parts for pole in part.roots()[1]]))
    return _state_space(parts)


def _warn_if_unstable(poles: np.ndarray) -> None:
    largest = float(np.abs(poles).max(initial=0))
    if largest > 1:
        warnings.warn(
            f"a pole has the modulus {largest:.6g}, outside of the unit circle: the system is "
            "unstable (poles of an analogue design are not those of a digital one).",
            stacklevel=4,
        )


def modal_of_zpk(zeros: Any, poles: Any, gain: float) -> Modal:
    """Make one channel; see `Modal.from_zpk`."""
    z, p = check_roots(zeros, poles, gain)
    return _partial_fractions(z, p, float(gain), state_space_of_zpk(z, p, gain), "from_zpk")


def modal_of_sos(sos: Any) -> Modal:
    """Make one channel; see `Modal.from_sos`."""
    parts, gain = _given_sections(sos), 1.0
    zeros: list[complex] = []
    poles: list[complex] = []
    for part in parts:
        more_zeros, more_poles = part.roots()
        zeros, poles = zeros + more_zeros, poles + more_poles
        gain *= float(next((value for value in part.b if value), 0))
    reference = _state_space(parts)
    z, p = np.array(zeros, dtype=np.complex128), np.array(poles, dtype=np.complex128)
    return _partial_fractions(z, p, gain, reference, "from_sos")


def _partial_fractions(
    zeros: np.ndarray, poles: np.ndarray, gain: float, reference: StateSpace, name: str
) -> Modal:
    with np.errstate(all="ignore"):
        kept, residues, d = partial_fractions(zeros, poles, gain)
    system = Modal(
        torch.from_numpy(kept), torch.from_numpy(residues), torch.tensor(d, dtype=torch.float64)
    )
    error = float(conversion_error(system, reference, TOLERANCE))
    largest = float(np.abs(poles).max(initial=0))
    if error > TOLERANCE and largest > 1:
        raise ValueError(
            f"a pole has the modulus {largest:.6g}, outside of the unit circle, and the partial "
            f"fractions cannot be verified over a response that grows: StateSpace.{name} takes "
            "poles as they are."
        )
    if error > TOLERANCE:
        raise ValueError(
            "these poles have no partial fractions in double precision: some coincide, or nearly "
            f"so: {_lost(error)} (at most {TOLERANCE:.0e} is accepted); "
            f"StateSpace.{name} takes them as they are."
        )
    return system


def _lost(error: float) -> str:
    if error == float("inf"):
        return "the modes are not stable, or their responses not finite"
    return f"the impulse response is off by {error:.1e}"


def _state_space(parts: list[Section], gain: float = 1.0) -> StateSpace:
    return StateSpace(*(torch.from_numpy(np.asarray(value)) for value in cascade(parts, gain)))


def _given_sections(sos: Any) -> list[Section]:
    rows = np.atleast_2d(np.asarray(sos, dtype=np.float64))
    if rows.ndim != 2 or rows.shape[1] != 6 or not len(rows) or not np.isfinite(rows).all():
        raise ValueError(
            "second-order sections are rows (b0, b1, b2, a0, a1, a2) of finite numbers; got shape "
            f"{rows.shape}."
        )
    if (rows[:, 3] == 0).any():
        raise ValueError("the leading denominator coefficient a0 of a section must not be zero.")
    parts = []
    for row in rows.tolist():
        b0, b1, b2, a0, a1, a2 = (Fraction(value) / Fraction(row[3]) for value in row)
        degree = 2 if a2 or b2 else 1 if a1 or b1 else 0
        parts.append(Section((b0, b1, b2)[: degree + 1], (a1, a2)[:degree]))
        assert a0 == 1
    return parts


def to_zpk(system: TransferFunction) -> tuple[np.ndarray, np.ndarray, float]:
    """Return scipy's `(zeros, poles, gain)` of a transfer function with one channel.

    The transfer function is `H(z) = gain Π (z - zeros) / Π (z - poles)`.

    Raises:
        ValueError: if the system has several channels. Index one of them first.
    """
    check_single(system)
    b, a = system.to_scipy()
    nonzero = np.flatnonzero(b)
    if not len(nonzero):
        return np.empty(0), np.roots(a), 0.0
    numerator = b[nonzero[0] :]
    return np.roots(numerator), np.roots(a), float(numerator[0])


def _from_polynomials(
    num: np.ndarray, den: np.ndarray, dtype: torch.dtype, checked: bool = False
) -> TransferFunction:
    """Make a transfer function from polynomials in z.

    Args:
        num: The numerator's coefficients, in the order of falling powers.
        den: The denominator's coefficients, in the order of falling powers.
        dtype: The dtype of the result.
        checked: Whether the caller has checked that the coefficients determine the poles. If false,
            this function checks it and warns if they do not.
    """
    num = np.trim_zeros(num, "f")
    if len(num) > len(den):
        raise ValueError(
            f"a causal system has at most as many zeros as poles; got {len(num) - 1} and "
            f"{len(den) - 1}."
        )
    num = np.pad(num, (len(den) - len(num), 0))
    if checked:
        return TransferFunction(*proper_fraction(num, den, dtype))
    return TransferFunction.from_scipy(num, den, dtype=dtype)
