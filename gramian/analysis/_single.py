"""Repeat calls that a model makes in half precision in single precision.

The response to an impulse has the rounding errors of the precision in which it is computed. In half
precision, they would count as state. So these calls are repeated with wider copies of their
arguments and, where needed, of a module's parameters. The model itself keeps its precision.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gramian.analysis._responses import Unreadable
from gramian.analysis._tracing import Call, Frame
from gramian.analysis._values import leaves_of, with_leaves

__all__ = ["in_single", "single_call", "single_frame"]

_HALF = (torch.float16, torch.bfloat16)
_AGREEMENT = 0.1  # the largest relative difference between results in half and single precision


def in_single(value: Any) -> Any:
    """Return nested values with tensors of half precision in single precision."""
    return with_leaves(value, (x.float() if _is_half(x) else x for x in leaves_of(value)))


def single_call(call: Call) -> Call:
    """Return a call with its arguments in single precision, and what it returns for them.

    Raises:
        Unreadable: if it cannot be made in single precision, or returns something else there.
    """
    if not any(map(_is_half, leaves_of(call.inputs))):
        return call
    inputs = in_single(call.inputs)
    try:
        result = call.function(*inputs[0], **inputs[1])
    except (RuntimeError, ValueError, TypeError) as error:
        raise Unreadable("it computes in half precision only.") from error
    pairs = zip(leaves_of(result), leaves_of(call.result), strict=False)
    if not all(_agree(wide, half) for wide, half in pairs if _is_half(half)):
        raise Unreadable("in single precision it returns something else.")
    return Call(call.key, call.function, inputs, result, call.within)


def single_frame(frame: Frame) -> Frame:
    """Return the run of a copy of a module in single precision; the copy has no hooks."""
    tensors = [*frame.module.parameters(), *frame.module.buffers()]
    if not any(map(_is_half, [*tensors, *leaves_of(frame.inputs)])):
        return frame
    known: dict[int, Any] = {}
    for module in frame.module.modules():
        for name, hooks in vars(module).items():
            if "hooks" in name and isinstance(hooks, dict):
                known[id(hooks)] = OrderedDict()
    wide: nn.Module = copy.deepcopy(frame.module, known).float()
    path = {id(module): name for name, module in frame.module.named_modules()}
    modules = dict(wide.named_modules())
    children = [(modules[path[id(child)]], in_single(result)) for child, result in frame.children]
    return replace(
        frame, module=wide, inputs=in_single(frame.inputs), children=children, buffers=None
    )


def _is_half(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in _HALF


def _agree(wide: Any, half: Tensor) -> bool:
    if not isinstance(wide, Tensor) or wide.shape != half.shape:
        return False
    difference = (wide.float() - half.float()).norm()
    return bool(difference <= _AGREEMENT * half.float().norm() + 1e-30)
