"""Distil modules of other libraries. The user names the submodules that have filters."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gramian.distillation._filters import Goal, reduce_filter
from gramian.distillation._report import DistillationReport
from gramian.filters import ModalFilter
from gramian.mixers import LongConvolution
from gramian.systems import FIR

__all__ = ["FilterReader", "ForeignFilter", "distill_modules"]

FilterReader = Callable[[Any], Tensor]
"""A function that returns the kernel of a submodule, (channels, taps), real."""


def _long_convolution(module: nn.Module, filter: ModalFilter) -> nn.Module:
    return LongConvolution(filter)


@dataclass(frozen=True)
class ForeignFilter:
    """The functions that read the kernel of a submodule and make the submodule's replacement.

    Attributes:
        kernel: function that returns the kernel of the submodule, (channels, taps), real.
        replace: function that is called with the submodule and the `ModalFilter` to which its
            kernel was reduced. It returns the module that replaces the submodule. By default, this
            module is a `LongConvolution` with the filter. If the submodule's output is its kernel,
            the module should return `filter(length).impulse_response(length)`.
    """

    kernel: FilterReader
    replace: Callable[[Any, ModalFilter], nn.Module] = _long_convolution


def distill_modules(
    model: Any,
    filters: Mapping[str, FilterReader | ForeignFilter],
    goal: Goal,
    progress: Callable[[int, int], None] | None,
    inplace: bool,
) -> tuple[Any, DistillationReport]:
    """Distil the submodules that `filters` names, as `gramian.distill` does."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"distill takes a module; it was given a {type(model).__name__}.")
    if not filters:
        raise ValueError("nothing to distil: filters names no submodule.")
    started = time.perf_counter()
    distilled = model if inplace else copy.deepcopy(model)
    # Kernels are read twice, so that those of one submodule at a time are in memory.
    goal.check(min(_kernel(model, path, reader).shape[-1] for path, reader in filters.items()))
    reports, replacements, before, after = [], {}, 0, 0
    if progress is not None:
        progress(0, len(filters))
    for path, reader in filters.items():
        kernel, module = _kernel(distilled, path, reader), distilled.get_submodule(path)
        modal, report = reduce_filter(kernel, goal, path, type(module).__name__)
        replace = reader.replace if isinstance(reader, ForeignFilter) else _long_convolution
        replacements[path] = replace(module, modal.to(kernel.device)).train(module.training)
        reports.append(report)
        before += FIR(kernel).recurrence().initial_state((1, len(kernel))).nbytes
        after += modal().recurrence().initial_state((1, len(kernel))).nbytes
        if progress is not None:
            progress(len(reports), len(filters))
    for path, replacement in replacements.items():
        parent, _, name = path.rpartition(".")
        setattr(distilled.get_submodule(parent), name, replacement)
    return distilled, DistillationReport(
        tol=goal.tol,
        order=goal.order,
        layers=tuple(reports),
        context=max(report.taps for report in reports),
        original_state_bytes=before,
        distilled_state_bytes=after,
        seconds=time.perf_counter() - started,
    )


@torch.no_grad()
def _kernel(model: nn.Module, path: str, reader: FilterReader | ForeignFilter) -> Tensor:
    """Return the kernel of the submodule at `path` after checking its shape and dtype."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        some = ", ".join(name for name, _ in list(model.named_modules())[1:6])
        raise ValueError(f"there is no submodule {path!r} to distil; there are {some}, …") from None
    if not path:
        raise ValueError("filters names submodules of the model, not the model itself.")
    kernel = (reader.kernel if isinstance(reader, ForeignFilter) else reader)(module)
    if not isinstance(kernel, Tensor):
        raise ValueError(f"the kernel of {path!r} must be a tensor; got {type(kernel).__name__}.")
    if kernel.ndim != 2 or min(kernel.shape) < 1 or not kernel.is_floating_point():
        raise ValueError(
            f"the kernel of {path!r} must be (channels, taps), real floating point; got "
            f"{tuple(kernel.shape)} of {kernel.dtype}."
        )
    return kernel.detach()
