"""Check that a model computes the same map in every way of running it."""

from gramian.checking._check import check
from gramian.checking._report import MODES, CheckReport, CheckRow

__all__ = ["MODES", "CheckReport", "CheckRow", "check"]
