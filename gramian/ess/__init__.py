"""Effective state-size: how much of its memory a causal operator uses, losses that change it, and
the smallest recurrence that computes it."""

from gramian.ess._effective_state_size import (
    effective_state_size,
    hankel_singular_values,
    sketched_state_size,
)
from gramian.ess._realize import realize
from gramian.ess.aggregation import aggregate, theoretical_state_size, utilization
from gramian.ess.penalties import ess_penalty, gate_regularizer

__all__ = [
    "aggregate",
    "effective_state_size",
    "ess_penalty",
    "gate_regularizer",
    "hankel_singular_values",
    "realize",
    "sketched_state_size",
    "theoretical_state_size",
    "utilization",
]
