"""Measure a number, and compute its standard error from the influence of each unit of data.

A mean over units is `v = Σ a_i / Σ w_i`. By the delta method, the influence of unit i on `g(v)` is
`g'(v) (a_i - v w_i) / Σ w_j`. The standard error of `g(v)` is the standard error of the sum of the
influences of all n units. If two models are measured on the same units, the standard error of the
difference is computed in the same way from the differences of their influences. In these
differences, the difficulty that a unit has for both models cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Measure", "difference_error", "exponential", "ratio"]


@dataclass(frozen=True)
class Measure:
    """One number about a model.

    Attributes:
        task: name of the task or text.
        metric: name of the metric.
        value: the number. It is NaN or infinite if the model's outputs are.
        error: standard error of the value, or None if it is not known.
        units: number of independent units of data (documents, rows, windows).
        higher_is_better: whether larger values are better, or None if that is not known.
        influence: influence of every unit on the value, or None.
        tokens: number of tokens that the value is a mean over, or None if it is no such mean.
    """

    task: str
    metric: str
    value: float
    error: float | None
    units: int
    higher_is_better: bool | None = None
    influence: tuple[float, ...] | None = field(default=None, repr=False)
    tokens: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes except the influences, as plain values."""
        return {
            "task": self.task,
            "metric": self.metric,
            "value": self.value,
            "error": self.error,
            "units": self.units,
            "tokens": self.tokens,
            "higher_is_better": self.higher_is_better,
        }


def ratio(
    task: str,
    metric: str,
    totals: Sequence[float],
    weights: Sequence[float],
    *,
    higher_is_better: bool,
    scale: float = 1.0,
    of: str = "mean",
) -> Measure:
    """Return a ratio of sums over units, or a function of it, with its standard error.

    If a total is NaN or infinite, or if the exponential overflows, the value is NaN or infinite,
    and its error and influences are None.

    Args:
        task: name of the task or text.
        metric: name of the metric.
        totals: (units,) terms of the numerator.
        weights: (units,) terms of the denominator.
        higher_is_better: whether larger values are better.
        scale: factor of the ratio.
        of: `"mean"` returns the ratio `scale * Σ totals / Σ weights`, `"exponential"` the
            exponential of the ratio, and `"root"` its square root.
    """
    weight = math.fsum(weights)
    mean = math.fsum(totals) / weight
    if of == "exponential":
        value = slope = exponential(scale * mean)
    elif of == "root":
        value = math.sqrt(scale * mean)
        slope = 0.5 / value if value else 0.0
    else:
        value, slope = scale * mean, 1.0
    if not math.isfinite(value):
        return Measure(task, metric, value, None, len(totals), higher_is_better)
    slope *= scale / weight
    influence = tuple(
        slope * (total - mean * one) for total, one in zip(totals, weights, strict=True)
    )
    return Measure(
        task, metric, value, _error(influence), len(influence), higher_is_better, influence
    )


def difference_error(one: Measure, other: Measure) -> float | None:
    """Return the standard error of `one.value - other.value`, or None if it is not known.

    If both measures contain influences of the same number of units, the influences are paired.
    Otherwise the two errors are added in quadrature.
    """
    if one.influence is not None and other.influence is not None and one.units == other.units:
        pairs = zip(one.influence, other.influence, strict=True)
        return _error([first - second for first, second in pairs])
    if one.error is None or other.error is None:
        return None
    return math.hypot(one.error, other.error)


def exponential(value: float) -> float:
    """Return the exponential of `value`, or infinity if it overflows."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _error(influence: Sequence[float]) -> float | None:
    count = len(influence)
    if count < 2:
        return None
    return math.sqrt(count / (count - 1) * math.fsum(value * value for value in influence))
