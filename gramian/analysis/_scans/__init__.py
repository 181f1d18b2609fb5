"""Read the recurrences of scans from their arguments, one file a family of scans.

A file registers functions by the names of the scans that they read. To add a scan, add a file or a
function: every file of this package is loaded.
"""

from __future__ import annotations

import importlib
import pkgutil

from gramian.analysis._scans._places import Place, places
from gramian.analysis._scans._reading import SCANS, ScanReading, read

__all__ = ["SCANS", "Place", "ScanReading", "places", "read"]

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
