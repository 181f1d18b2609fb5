"""Load the published RTF and S4 from their own files."""

import importlib.util
import logging
import sys
import types
from pathlib import Path
from typing import Any

from torch import Tensor, nn


def module_from(folder: Path, name: str) -> Any:
    path = folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"published_{name}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise SystemExit(f"there is no {name}.py in {folder}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published_s4(folder: Path) -> Any:
    """Load the published s4.py.

    The file imports one decorator of pytorch_lightning. A decorator that does nothing replaces it.
    """
    stand_in = types.ModuleType("pytorch_lightning.utilities")
    stand_in.rank_zero_only = lambda function: function  # type: ignore[attr-defined]
    sys.modules.setdefault("pytorch_lightning", types.ModuleType("pytorch_lightning"))
    sys.modules.setdefault("pytorch_lightning.utilities", stand_in)
    logging.disable(logging.ERROR)  # it would warn that its compiled extensions are missing
    return module_from(folder, "s4")


class First(nn.Module):
    """A wrapper that returns only the first output of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, u: Tensor) -> Tensor:
        return self.layer(u)[0]
