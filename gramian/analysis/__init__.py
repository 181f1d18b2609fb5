"""Measure how much of its memory a whole model uses on a text, layer by layer."""

from gramian.analysis._analyze import analyze
from gramian.analysis._opening import open_model
from gramian.analysis._report import LayerState, StateReport

__all__ = ["LayerState", "StateReport", "analyze", "open_model"]
