"""Measure how much of its memory each layer of a model uses while the model reads a text."""

from gramian.analysis._analyze import analyze
from gramian.analysis._calls import Attended, AttentionCall, replace_attention
from gramian.analysis._collection import LayerSummary, Spread, StateReports, analyze_texts
from gramian.analysis._comparison import StateComparison, compare_reports
from gramian.analysis._frames import layer_frame, state_frame
from gramian.analysis._modulation import (
    DelimiterModulation,
    ModulationReport,
    find_delimiters,
    measure_modulation,
    special_tokens,
)
from gramian.analysis._opening import open_model
from gramian.analysis._operators import record_operators
from gramian.analysis._ranking import LayerRanking, RankedLayer
from gramian.analysis._recording import RecordedOperator
from gramian.analysis._report import LayerState, StateReport
from gramian.analysis._storage import Storage
from gramian.analysis._windows import window_attention, window_maps, window_mask

__all__ = [
    "Attended",
    "AttentionCall",
    "DelimiterModulation",
    "LayerRanking",
    "LayerState",
    "LayerSummary",
    "ModulationReport",
    "RankedLayer",
    "RecordedOperator",
    "Spread",
    "StateComparison",
    "StateReport",
    "StateReports",
    "Storage",
    "analyze",
    "analyze_texts",
    "compare_reports",
    "find_delimiters",
    "layer_frame",
    "measure_modulation",
    "open_model",
    "record_operators",
    "replace_attention",
    "special_tokens",
    "state_frame",
    "window_attention",
    "window_maps",
    "window_mask",
]
