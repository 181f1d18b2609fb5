"""Warnings about systems whose frequency response changes when their numbers are rounded."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

__all__ = ["delays", "warn_of_lost_poles"]

_LOST = 1e-6
"""The relative error of a frequency response above which the rounded numbers no longer describe the
system. In single precision and below, the limit is half of the digits instead."""

_RADIUS = 1 + 2.0**-14
"""The radius of the circle on which a frequency response is evaluated. It is above 1 so that a pole
at z = 1 gives a finite value."""


def delays(poles: Tensor, points: int) -> Tensor:
    """Return values of `z^-1` at which to evaluate a frequency response.

    Args:
        poles: (*C, n), complex: the poles of every channel.
        points: The number of further points, spread evenly over the upper half circle.

    Returns:
        (*C, n + points), complex128: first the values at the angles of the poles, then those at the
        further points.
    """
    grid = torch.linspace(0, torch.pi, points, dtype=torch.float64, device=poles.device)
    angles = torch.cat([poles.angle(), grid.expand(*poles.shape[:-1], -1)], dim=-1)
    return torch.polar(torch.full_like(angles, 1 / _RADIUS), -angles)


def warn_of_lost_poles(
    given: str, moved: Tensor, radius: Tensor, dtype: torch.dtype, stacklevel: int
) -> None:
    """Warn if rounding changes a frequency response too much, or if the system is unstable.

    Args:
        given: A name for the numbers that describe the system. The warning uses it as a plural
            subject.
        moved: (*C): the relative change of the frequency response when these numbers are rounded.
        radius: The spectral radius of every channel, (*C).
        dtype: The dtype that holds the numbers.
        stacklevel: As in `warnings.warn`, counted from the caller.
    """
    instead = (
        "StateSpace.from_zpk and StateSpace.from_sos take zeros and poles, or second-order "
        "sections, without expanding polynomials."
    )
    largest = float(radius.max())
    if not bool((moved <= max(_LOST, torch.finfo(dtype).eps ** 0.5)).all()):
        warnings.warn(
            f"{given} in {str(dtype)[6:]} do not hold these poles: their rounding alone moves the "
            f"frequency response by {float(moved.nan_to_num(torch.inf).max()):.0e} (relative), and "
            f"the largest pole has modulus {largest:.6g}; {instead}",
            stacklevel=stacklevel + 1,
        )
    elif bool((radius > 1 + 1e-9).any()):
        warnings.warn(
            f"{given} have a pole of modulus {largest:.9g}, outside of the unit circle, so the "
            f"impulse response grows without end; if that was not meant, {instead}",
            stacklevel=stacklevel + 1,
        )
