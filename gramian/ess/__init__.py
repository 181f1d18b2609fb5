"""Measure effective state-size, and find the smallest recurrence of a causal operator.

The effective state-size says how much of its memory a causal operator uses. `gramian.memory` has
losses that change it.
"""

from __future__ import annotations

import importlib
from typing import Any

from gramian.ess._effective_state_size import (
    effective_state_size,
    hankel_singular_values,
    sketched_state_size,
)
from gramian.ess._estimated import (
    MeanStateSize,
    estimated_mean_state_size,
    estimated_state_size,
)
from gramian.ess._realize import realization_errors, realize
from gramian.ess._state_ranks import StateRanks, state_ranks
from gramian.ess.aggregation import (
    aggregate,
    theoretical_state_size,
    usable_state_size,
    utilization,
)
from gramian.ess.rows import RowOperator

__all__ = [
    "MeanStateSize",
    "RowOperator",
    "StateRanks",
    "aggregate",
    "effective_state_size",
    "estimated_mean_state_size",
    "estimated_state_size",
    "hankel_singular_values",
    "realization_errors",
    "realize",
    "sketched_state_size",
    "state_ranks",
    "theoretical_state_size",
    "usable_state_size",
    "utilization",
]


def __getattr__(name: str) -> Any:
    if name in ("ess_penalty", "gate_regularizer"):  # earlier versions had these names here
        return getattr(importlib.import_module("gramian.memory"), name)
    raise AttributeError(f"module 'gramian.ess' has no attribute {name!r}")
