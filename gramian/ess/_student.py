"""Compute quantiles of Student's t distribution, which PyTorch does not have.

The formulas are those of Abramowitz and Stegun, *Handbook of Mathematical Functions*, 1964.
"""

from __future__ import annotations

import math

__all__ = ["student_quantile"]

_NORMAL = 1.959963984540054  # the quantile of the normal distribution at 97.5 %
_MANY = 100
"""With more degrees of freedom, the expansion is exact up to 1e-9."""


def student_quantile(freedom: int) -> float:
    """Return the bound t with `P(|T| < t) = 0.95`, for T with a number of degrees of freedom.

    Args:
        freedom: the degrees of freedom, at least 1.
    """
    if freedom > _MANY:
        return _expansion(freedom)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _share(middle, freedom) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _share(angle: float, freedom: int) -> float:
    """Return `P(|T| < tan(angle) √freedom)`, by equations 26.7.3 and 26.7.4."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def _expansion(freedom: int) -> float:
    """Return the quantile by equation 26.7.5, an expansion in `1 / freedom`."""
    z = _NORMAL
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**k for k, term in enumerate(terms))
