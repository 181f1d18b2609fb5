"""Warnings where rounding of a system's numbers changes its frequency response."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

__all__ = ["delays", "warn_of_lost_poles"]

_LOST = 1e-6
"""Relative error of a frequency response above which numbers have lost what they stand for; half
of the digits in single precision and below."""

_RADIUS = 1 + 2.0**-14
"""Radius of the circle on which a response is evaluated: a pole at z = 1 is regular there."""


def delays(poles: Tensor, points: int) -> Tensor:
    """Return `z^-1` at the angles of the poles (*C, n) and at `points` more, (*C, n + points).

    The further points lie on the upper half circle.
    """
    grid = torch.linspace(0, torch.pi, points, dtype=torch.float64, device=poles.device)
    angles = torch.cat([poles.angle(), grid.expand(*poles.shape[:-1], -1)], dim=-1)
    return torch.polar(torch.full_like(angles, 1 / _RADIUS), -angles)


def warn_of_lost_poles(
    given: str, moved: Tensor, radius: Tensor, dtype: torch.dtype, stacklevel: int
) -> None:
    """Warn where numbers do not hold a system, or not a stable one.

    Args:
        given: What the numbers are, as the subject of a sentence in the plural.
        moved: How far their rounding moves the frequency response, relative, (*C).
        radius: The spectral radius, (*C).
        dtype: In which they are held.
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
