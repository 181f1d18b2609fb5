"""Gramian: the memory of causal sequence models.

Every causal mixer applies a lower-triangular operator ``y = T u``; the rank of its Hankel blocks is
the memory that it needs. Parametrise that operator (filters, mixers), measure it
(`effective_state_size`), shrink it (`reduce`, `realize`, `distill`) and run
it (convolution and recurrence).

``import gramian`` does not import transformers; ``import gramian.models`` does, and registers its
classes with transformers' Auto classes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gramian import ess, filters, memory, mixers, ops, reduction, systems
from gramian.ess import effective_state_size, realize
from gramian.filters import parameter_groups
from gramian.ops import causal_convolution
from gramian.reduction import Reduction, reduce
from gramian.systems import (
    FIR,
    DenseOperator,
    Modal,
    StateSpace,
    TimeVarying,
    TransferFunction,
)

if TYPE_CHECKING:
    from gramian.analysis import StateReport, analyze
    from gramian.checking import CheckReport, check
    from gramian.distillation import DistillationReport, distill

__version__ = "0.1.0"

__all__ = [
    "FIR",
    "CheckReport",
    "DenseOperator",
    "DistillationReport",
    "Modal",
    "Reduction",
    "StateReport",
    "StateSpace",
    "TimeVarying",
    "TransferFunction",
    "analyze",
    "causal_convolution",
    "check",
    "distill",
    "effective_state_size",
    "ess",
    "filters",
    "memory",
    "mixers",
    "ops",
    "parameter_groups",
    "realize",
    "reduce",
    "reduction",
    "systems",
]


_WHOLE_MODEL = {  # these jobs need transformers
    "StateReport": "analysis",
    "analyze": "analysis",
    "CheckReport": "checking",
    "check": "checking",
    "DistillationReport": "distillation",
    "distill": "distillation",
}


def __getattr__(name: str) -> Any:
    if name in _WHOLE_MODEL:
        return getattr(importlib.import_module(f"gramian.{_WHOLE_MODEL[name]}"), name)
    raise AttributeError(f"module 'gramian' has no attribute {name!r}")
