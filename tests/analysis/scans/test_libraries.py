"""Readings predict what the kernels of flash-linear-attention and mamba_ssm return."""

from __future__ import annotations

import importlib
import inspect
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from gramian.analysis._scans import read
from tests.analysis.scans import attention, delta_rules, state_spaces

CASES = state_spaces.CASES | delta_rules.CASES | attention.CASES
FILES = (
    "fla.ops",
    "fla.ops.hgrn",
    "fla.ops.rwkv7",
    "mamba_ssm.ops.selective_scan_interface",
    "mamba_ssm.ops.triton.ssd_combined",
    "mamba_ssm.ops.triton.mamba3.mamba3_siso_combined",
)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels that need no GPU, but are slow


def kernel(name: str) -> Any:
    """The function of a library, or a skipped test."""
    if not torch.cuda.is_available() and not INTERPRETED:
        pytest.skip("kernels need a GPU, or TRITON_INTERPRET=1")
    for file in FILES:
        try:
            found = getattr(importlib.import_module(file), name, None)
        except ImportError:
            continue
        if found is not None:
            return found
    pytest.skip(f"no installed library has {name}")


def as_kernels_take(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(as_kernels_take(part) for part in x)
    if not isinstance(x, Tensor):
        return x
    return x.to("cuda" if torch.cuda.is_available() else "cpu", torch.float32)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_kernels(name: str) -> None:
    case = CASES[name]
    function = kernel(case.scan)
    given = {k: as_kernels_take(x) for k, x in case.arguments(63).items()}
    known = inspect.signature(function).parameters
    if given.get("g", 0) is None and "g" not in known:
        del given["g"]
    reading = read(case.scan, (), given)
    assert reading.disagreement(function(**given)) < 1e-4
