"""Does a model compute one map, however it is run? Every way of running it, compared."""

from gramian.checking._check import check
from gramian.checking._report import MODES, CheckReport, CheckRow

__all__ = ["MODES", "CheckReport", "CheckRow", "check"]
