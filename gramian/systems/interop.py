"""Systems of python-control, and scipy's zeros, poles and gains."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gramian.systems._system import TimeInvariantSystem
from gramian.systems.convert import to_state_space, to_transfer_function
from gramian.systems.fir import FIR
from gramian.systems.state_space import StateSpace
from gramian.systems.transfer_function import TransferFunction

__all__ = ["from_control", "from_zpk", "to_control", "to_zpk"]

_POINTS = 4096
"""Points of the upper half circle on which a frequency response is compared."""

_TOLERANCE = 1e-6
"""Relative l2 error of a frequency response up to which polynomials stand for their zeros."""


def to_control(system: TimeInvariantSystem) -> Any:
    """See `TimeInvariantSystem.to_control`."""
    control = _control()
    _check_single(system)
    if isinstance(system, TransferFunction | FIR):
        b, a = to_transfer_function(system).to_scipy()
        return control.TransferFunction(b, a, True)
    return control.StateSpace(*to_state_space(system).to_scipy(), True)


def from_control(system: Any, dtype: torch.dtype = torch.float64) -> TransferFunction | StateSpace:
    """A system of python-control, discrete in time, as one channel.

    Args:
        system: ``control.TransferFunction`` or ``control.StateSpace`` with one input and one
            output; its ``dt`` (a number above 0, or True) is not kept.
        dtype: Of the result.

    Returns:
        A `TransferFunction` of the former, a `StateSpace` of the latter.

    Raises:
        ImportError: if python-control is not installed.
        TypeError: if it is neither of these.
        ValueError: if it is continuous in time, has several inputs or outputs, or more zeros than
            poles.
    """
    control = _control()
    if not isinstance(system, control.TransferFunction | control.StateSpace):
        raise TypeError(
            "a control.TransferFunction or control.StateSpace is needed, got "
            f"{type(system).__name__}."
        )
    if not system.isdtime(strict=True):
        raise ValueError(
            f"a system in discrete time is needed, got dt={system.dt}; control.c2d makes one."
        )
    if system.ninputs != 1 or system.noutputs != 1:
        raise ValueError(
            f"a channel has one input and one output, got {system.ninputs} and {system.noutputs}."
        )
    if isinstance(system, control.StateSpace):
        return StateSpace.from_scipy(system.A, system.B, system.C, system.D, dtype=dtype)
    num, den = np.asarray(system.num[0][0]), np.asarray(system.den[0][0])
    return _from_polynomials(num, den, dtype)


def from_zpk(
    zeros: Any, poles: Any, gain: float, dtype: torch.dtype = torch.float64
) -> TransferFunction:
    """scipy's ``gain Π (z - zeros) / Π (z - poles)`` as one channel.

    Args:
        zeros: (m,), in conjugate pairs, m ≤ n.
        poles: (n,), in conjugate pairs.
        gain: Real.
        dtype: Of the result.

    Raises:
        ValueError: if there are more zeros than poles, complex ones without their conjugates, or
            the coefficients of the polynomials lose what their zeros hold: high degrees with poles
            that crowd.
    """
    num, den = (np.atleast_1d(np.poly(np.atleast_1d(np.asarray(r)))) for r in (zeros, poles))
    for name, polynomial in (("zeros", num), ("poles", den)):
        if np.iscomplexobj(polynomial):
            raise ValueError(f"complex {name} must come in conjugate pairs.")
    z = np.exp(1j * np.pi * (np.arange(_POINTS) + 0.5) / _POINTS)[:, None]
    given = gain * np.prod(z - np.atleast_1d(zeros), -1) / np.prod(z - np.atleast_1d(poles), -1)
    expanded = gain * np.polyval(num, z[:, 0]) / np.polyval(den, z[:, 0])
    error = np.linalg.norm(expanded - given) / max(np.linalg.norm(given), 1e-300)
    if gain and not error <= _TOLERANCE:
        raise ValueError(
            f"the coefficients of polynomials of degree {len(den) - 1} lose what these poles hold: "
            f"in double precision the frequency response is off by {error:.1e} (at most "
            f"{_TOLERANCE:.0e} is accepted)."
        )
    return _from_polynomials(gain * num, den, dtype)


def to_zpk(system: TransferFunction) -> tuple[np.ndarray, np.ndarray, float]:
    """scipy's ``(zeros, poles, gain)`` of a transfer function of one channel, with
    ``H(z) = gain Π (z - zeros) / Π (z - poles)``.

    Raises:
        ValueError: if the system has several channels: index one.
    """
    _check_single(system)
    b, a = system.to_scipy()
    nonzero = np.flatnonzero(b)
    if not len(nonzero):
        return np.empty(0), np.roots(a), 0.0
    numerator = b[nonzero[0] :]
    return np.roots(numerator), np.roots(a), float(numerator[0])


def _from_polynomials(num: np.ndarray, den: np.ndarray, dtype: torch.dtype) -> TransferFunction:
    """From polynomials in z, the highest power first."""
    num = np.trim_zeros(num, "f")
    if len(num) > len(den):
        raise ValueError(
            f"a causal system has at most as many zeros as poles, got {len(num) - 1} and "
            f"{len(den) - 1}."
        )
    num = np.pad(num, (len(den) - len(num), 0))
    return TransferFunction.from_scipy(num, den, dtype=dtype)


def _check_single(system: TimeInvariantSystem) -> None:
    if system.channel_shape:
        raise ValueError(
            f"one channel at a time: index the system, whose channels are "
            f"{tuple(system.channel_shape)}, as in system[0]."
        )


def _control() -> Any:
    try:
        import control
    except ImportError as error:
        raise ImportError("this needs python-control: pip install control") from error
    return control
