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
    "fla.ops.gdn2",
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


def as_kernels_take(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, tuple):
        return tuple(as_kernels_take(part, dtype) for part in x)
    if not isinstance(x, Tensor):
        return x
    return x.to("cuda" if torch.cuda.is_available() else "cpu", dtype)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_kernels(name: str) -> None:
    case = CASES[name]
    function = kernel(case.scan)
    half = case.scan == "chunk_delta_rule"  # takes half precision only
    dtype = torch.bfloat16 if half else torch.float32
    given = {k: as_kernels_take(x, dtype) for k, x in case.arguments(63).items()}
    known = inspect.signature(function).parameters
    if given.get("g", 0) is None and "g" not in known:
        del given["g"]
    try:
        result = function(**given)
    except Exception as error:
        if INTERPRETED and "InterpreterError" in type(error).__name__:
            pytest.skip("the interpreter cannot run this kernel")
        raise
    assert read(case.scan, (), given).disagreement(result) < (3e-2 if half else 1e-4)
