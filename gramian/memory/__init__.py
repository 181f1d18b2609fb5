"""Measure and shape the memory of models, by losses, observers and the initialization of gates.

The package also measures the state-sizes of filters, and of models in training.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gramian._extras import require
from gramian.memory.filters import filter_state_sizes
from gramian.memory.hankel import hankel_penalty
from gramian.memory.initialization import GateInitialization, InitializedGates, initialize_gates
from gramian.memory.losses import MemoryLosses
from gramian.memory.observation import Observer
from gramian.memory.penalties import ess_penalty, gate_regularizer
from gramian.memory.truncation import DroppedModes, restore_modes, truncate_modes

if TYPE_CHECKING:
    from gramian.memory.callbacks import StateSizeCallback

__all__ = [
    "DroppedModes",
    "GateInitialization",
    "InitializedGates",
    "MemoryLosses",
    "Observer",
    "StateSizeCallback",
    "ess_penalty",
    "filter_state_sizes",
    "gate_regularizer",
    "hankel_penalty",
    "initialize_gates",
    "restore_modes",
    "truncate_modes",
]


def __getattr__(name: str) -> Any:
    if name == "StateSizeCallback":
        require("gramian.memory.StateSizeCallback", "train", "transformers", "accelerate")
        return importlib.import_module("gramian.memory.callbacks").StateSizeCallback
    raise AttributeError(f"module 'gramian.memory' has no attribute {name!r}")
