"""Check that a model computes the same map in every way in which it can run."""

from gramian.checking._check import check
from gramian.checking._report import MODES, CheckReport, CheckRow

__all__ = ["MODES", "CheckReport", "CheckRow", "check"]
