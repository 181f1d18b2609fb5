"""Impulse responses to 60 digits, and textbook filters to take them of."""

from __future__ import annotations

import mpmath
import numpy as np
import scipy.signal
import torch

DIGITS = 60
FAMILIES = ("butter", "cheby1", "cheby2", "ellip", "bessel")


def stepped_exactly(A, B, C, D, length: int, digits: int = DIGITS) -> np.ndarray:
    """The impulse response of these very numbers, (length,): plain steps in ``digits`` digits."""
    with mpmath.workdps(digits):
        a, b, c = (np.asarray(m, dtype=float) for m in (A, B, C))
        rows = [[(j, mpmath.mpf(v)) for j, v in enumerate(row) if v] for row in a.tolist()]
        x = [mpmath.mpf(v) for v in b.ravel().tolist()]
        read = [(j, mpmath.mpf(v)) for j, v in enumerate(c.ravel().tolist()) if v]
        taps = [float(np.asarray(D).ravel()[0])]
        for _ in range(length - 1):
            taps.append(float(mpmath.fsum(v * x[j] for j, v in read)))
            x = [mpmath.fsum(v * x[j] for j, v in row) for row in rows]
        return np.array(taps)


def designed(zeros, poles, gain: float, length: int, digits: int = 80) -> np.ndarray:
    """The impulse response of a design, (length,): its sections in turn, in ``digits`` digits.

    Poles may coincide. Every pole or conjugate pair is one section that is stepped as a recursion.
    """
    with mpmath.workdps(digits):
        z = [mpmath.mpc(complex(v)) for v in np.atleast_1d(zeros)]
        p = [mpmath.mpc(complex(v)) for v in np.atleast_1d(poles)]
        num, den = [mpmath.mpc(gain)], [mpmath.mpc(1)]
        for root in z:
            num = [a - root * b for a, b in zip([*num, 0], [0, *num], strict=True)]
        for root in p:
            den = [a - root * b for a, b in zip([*den, 0], [0, *den], strict=True)]
        num = [mpmath.mpf(0)] * (len(den) - len(num)) + [v.real for v in num]
        den = [v.real for v in den]
        past: list = []
        taps = []
        for t in range(length):
            value = num[t] if t < len(num) else mpmath.mpf(0)
            value -= mpmath.fsum(
                d * w for d, w in zip(den[1:], reversed(past), strict=False) if past
            )
            past = [*past[-(len(den) - 2) :], value] if len(den) > 1 else []
            taps.append(float(value))
        return np.array(taps)


def relative_error(value, expected) -> float:
    """l2 norm of the difference, relative to that of what is expected."""
    value, expected = (
        torch.as_tensor(np.asarray(v.detach() if isinstance(v, torch.Tensor) else v)).double()
        for v in (value, expected)
    )
    return float((value - expected).norm() / expected.norm().clamp_min(1e-300))


def design(family: str, order: int, cutoff, band: str = "low", output: str = "zpk"):
    """A discrete-time design of scipy.signal."""
    if family == "butter":
        return scipy.signal.butter(order, cutoff, band, output=output)
    if family == "cheby1":
        return scipy.signal.cheby1(order, 1.0, cutoff, band, output=output)
    if family == "cheby2":
        return scipy.signal.cheby2(order, 40.0, cutoff, band, output=output)
    if family == "ellip":
        return scipy.signal.ellip(order, 1.0, 40.0, cutoff, band, output=output)
    return scipy.signal.bessel(order, cutoff, band, output=output)
