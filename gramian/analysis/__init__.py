"""Measure how much of its memory each layer of a model uses while the model reads a text."""

from gramian.analysis._analyze import analyze
from gramian.analysis._collection import LayerSummary, Spread, StateReports, analyze_texts
from gramian.analysis._modulation import (
    DelimiterModulation,
    ModulationReport,
    find_delimiters,
    measure_modulation,
    special_tokens,
)
from gramian.analysis._opening import open_model
from gramian.analysis._report import LayerState, StateReport

__all__ = [
    "DelimiterModulation",
    "LayerState",
    "LayerSummary",
    "ModulationReport",
    "Spread",
    "StateReport",
    "StateReports",
    "analyze",
    "analyze_texts",
    "find_delimiters",
    "measure_modulation",
    "open_model",
    "special_tokens",
]
