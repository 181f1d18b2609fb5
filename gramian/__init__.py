"""Train, measure and shrink the memory of causal sequence models.

Every causal mixer applies a lower-triangular operator `y = T u`. The rank of the operator's Hankel
blocks is the memory that the mixer needs. Gramian parametrizes this operator (filters, mixers),
measures it (`effective_state_size`), shrinks it (`reduce`, `realize`, `distill`) and applies it
(convolution and recurrence).

`import gramian` imports none of its packages until a name is used. `import gramian.models` imports
transformers and registers Gramian's classes with transformers' Auto classes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gramian import ess, filters, memory, mixers, ops, reduction, systems
    from gramian.analysis import StateReport, analyze
    from gramian.checking import CheckReport, check
    from gramian.distillation import DistillationReport, distill
    from gramian.ess import effective_state_size, realize
    from gramian.filters import parameter_groups
    from gramian.ops import causal_convolution
    from gramian.reduction import Reduction, reduce
    from gramian.shrinking import ShrinkReport, shrink
    from gramian.systems import (
        FIR,
        DenseOperator,
        Modal,
        StateSpace,
        TimeVarying,
        TransferFunction,
    )

__version__ = "0.1.0"

__all__ = [
    "FIR",
    "CheckReport",
    "DenseOperator",
    "DistillationReport",
    "Modal",
    "Reduction",
    "ShrinkReport",
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
    "shrink",
    "systems",
]

_PACKAGES = ("ess", "filters", "memory", "mixers", "ops", "reduction", "systems")
_HOMES = {
    "FIR": "systems",
    "CheckReport": "checking",
    "DenseOperator": "systems",
    "DistillationReport": "distillation",
    "Modal": "systems",
    "Reduction": "reduction",
    "ShrinkReport": "shrinking",
    "StateReport": "analysis",
    "StateSpace": "systems",
    "TimeVarying": "systems",
    "TransferFunction": "systems",
    "analyze": "analysis",
    "causal_convolution": "ops",
    "check": "checking",
    "distill": "distillation",
    "effective_state_size": "ess",
    "parameter_groups": "filters",
    "realize": "ess",
    "reduce": "reduction",
    "shrink": "shrinking",
}
"""The package of each public name. It is imported when the name is first used."""


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"gramian.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"gramian.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'gramian' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
