"""Reduce every long filter of a model, and build the distilled model."""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from gramian.distillation._filters import Goal, reduce_filter, report_kept
from gramian.distillation._foreign import FilterReader, ForeignFilter, distill_modules
from gramian.distillation._report import DistillationReport, LayerReport
from gramian.filters import ExplicitFilter, ModalFilter
from gramian.ops.precision import full_precision
from gramian.systems import FIR

__all__ = ["Replacements", "distill", "reduce_layers", "report_of"]

_Model = TypeVar("_Model", bound=nn.Module)


@full_precision()
def distill(
    model: _Model,
    tol: float = 1e-3,
    order: int | None = None,
    *,
    max_order: int | None = None,
    tail: str = "auto",
    filters: Mapping[str, FilterReader | ForeignFilter] | None = None,
    inplace: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[_Model, DistillationReport]:
    """Replace every long filter of a model by a small recurrence (arXiv 2310.18780).

    `gramian.reduce` reduces the kernel of each filter. It uses the first `max_position_embeddings`
    taps of the kernel. If the kernel ends before that, it uses twice as many taps as the kernel
    has, so that errors include the response that should be zero. The result is a `ModalFilter`,
    which replaces the filter in a copy of the model. The given model stays unchanged. The copy has
    the same class, with one configuration per layer in `config.filter`. It can be saved, loaded,
    trained and used for generation like any other model. Filters that are already modal, and
    attention layers, are not changed. The state of an explicit filter of few taps is a window of
    its last inputs. Such a filter is not changed if the state of the reduced filter would not be
    smaller than this window.

    Args:
        model: a Gramian model that is not bidirectional; if `filters` are given, any module.
        tol: tolerance of the relative l2 error `‖h − ĥ‖₂ / ‖h‖₂` of every filter, between 0 and 1,
            both excluded. Each filter gets the smallest order that reaches the tolerance. Ignored
            if `order` is given.
        order: real state dimension of every filter, from 1 to the number of taps minus one.
        max_order: largest order in the search for `tol`; by default 256, or one less than the
            number of taps if that is smaller. One filter of high order makes the state of its whole
            layer large.
        tail: behavior of a filter past its last tap. It matters for inputs that are longer than the
            number of taps. With "free", the fit is not constrained there, which gives the smallest
            orders. With "zero", the fit assumes that the filter is zero there, so that the fitted
            filter fades. With "auto", filters that end before the model's
            `max_position_embeddings` are fitted with "zero", and `gramian.reduce` chooses for the
            other filters. In all cases, `tol` holds over the taps that `gramian.reduce` uses, and
            the report states the energy of the fitted filter past them.
        filters: a mapping from the path of a submodule, as in `model.named_modules()`, to a
            function that returns the kernel of the submodule, or to a `ForeignFilter`. By default,
            all long filters of a Gramian model are reduced.
        inplace: whether to replace the filters in the given model, and to return it. This takes
            half the memory, because the other weights are not copied. If an error is raised, the
            model is unchanged.
        progress: a function that is called as `progress(layers done, all layers)` before the first
            layer and after every layer.

    Returns:
        The distilled model and a report. The report names the filters whose errors stay above
        `tol`; see `DistillationReport.converged`.

    Raises:
        TypeError: if `model` is not a Gramian model and no `filters` are given.
        ValueError: if `tol`, `order`, `max_order` or `tail` is out of range; if the model has no
            filter to distil, or is bidirectional; if a path names no submodule; or if a kernel is
            not (channels, taps), real and finite.
    """
    goal = Goal(None if order is not None else tol, order, max_order, tail)
    if filters is not None:
        return distill_modules(model, filters, goal, progress, inplace)
    started = time.perf_counter()
    found = reduce_layers(model, goal, progress)
    whole: Any = model
    before = whole.state_bytes(1, found.context)
    distilled: Any = whole
    if not inplace:
        mixers = _mixers(whole)
        replaced = {id(mixers[layer].filter): filter for layer, filter in found.filters.items()}
        distilled = copy.deepcopy(whole, replaced)
    found.put(distilled)
    return distilled, report_of(goal, found, before, distilled, started)


class Replacements(NamedTuple):
    """The filters that replace the long filters of a model.

    Attributes:
        filters: the new filter of each layer whose filter is replaced.
        config: value of `config.filter`.
        reports: report on every layer that has a long filter.
        context: largest number of taps.
    """

    filters: dict[int, nn.Module]
    config: Any
    reports: tuple[LayerReport, ...]
    context: int

    def put(self, model: Any) -> Replacements:
        """Put the filters into a model, and return what puts the replaced ones back."""
        mixers = _mixers(model)
        old = {layer: mixers[layer].filter for layer in self.filters}
        before = Replacements(old, model.config.filter, (), self.context)
        for layer, filter in self.filters.items():
            mixers[layer].filter = filter
        model.config.filter = self.config
        return before


def reduce_layers(
    model: Any, goal: Goal, progress: Callable[[int, int], None] | None = None
) -> Replacements:
    """Reduce the long filters of a model, one layer after the other. The model stays unchanged.

    The arguments and errors are those of `distill`.
    """
    mixers = _mixers(model)
    filters: list[Any] = [getattr(mixer, "filter", None) for mixer in mixers]
    if model.config.bidirectional:
        raise ValueError("a bidirectional model cannot be distilled: it has no recurrence.")
    long = [i for i, f in enumerate(filters) if not (f is None or isinstance(f, ModalFilter))]
    if not long:
        raise ValueError("nothing to distil: every filter of this model is modal already.")
    lengths = [_length_to_reduce(filters[layer], goal) for layer in long]
    goal.check(min((length for length in lengths if length), default=sys.maxsize))
    configs = [model.config.filter_of(layer) for layer in range(len(filters))]
    found: dict[int, nn.Module] = {}
    reports = []
    if progress is not None:
        progress(0, len(long))
    for done, layer in enumerate(long, start=1):
        modal, report = _reduce_layer(mixers[layer], layer, goal)
        if modal is not None:
            found[layer], configs[layer] = modal, modal.config()
        reports.append(report)
        if progress is not None:
            progress(done, len(long))
    context = max(filters[layer].max_length for layer in long)
    return Replacements(found, configs, tuple(reports), context)


def _length_to_reduce(filter: Any, goal: Goal) -> int | None:
    """Return the number of taps of a filter, or None if it needs no reduction.

    The taps are dropped, so that those of one layer at a time are in memory.
    """
    kernel = _read_kernel(filter)
    return None if kernel.fits(goal) else kernel.length


def _reduce_layer(mixer: Any, layer: int, goal: Goal) -> tuple[ModalFilter | None, LayerReport]:
    """Reduce the filter of a mixer, or return None if its state would not be smaller."""
    kernel, name = _read_kernel(mixer.filter), type(mixer).__name__
    own = kernel.taps[:, : kernel.length]
    if kernel.fits(goal):
        return None, report_kept(own, layer, name)
    modal, report = reduce_filter(kernel.taps, kernel.goal(goal), layer, name, kernel.share)
    modal.max_length = mixer.filter.max_length
    modal = modal.to(kernel.taps.device).train(mixer.training)
    if kernel.is_window:
        with_modal = _copied(mixer, {id(mixer.filter): modal})
        if with_modal.recurrence().state_bytes(1) >= mixer.recurrence().state_bytes(1):
            return None, report_kept(own, layer, name)
    return modal, report


def _copied(mixer: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of a mixer that shares its weights, with the replacements in `memo`."""
    return copy.deepcopy(mixer, memo | {id(weight): weight for weight in mixer.parameters()})


def report_of(
    goal: Goal, found: Replacements, before: int, model: Any, started: float
) -> DistillationReport:
    """Return the report on a model whose state had `before` bytes, and which has its new filters.

    Args:
        goal: the goal of the reduction.
        found: the new filters.
        before: bytes of the state of one sequence before.
        model: the distilled model.
        started: reading of `time.perf_counter` when the reduction began.
    """
    return DistillationReport(
        tol=goal.tol,
        order=goal.order,
        layers=found.reports,
        context=found.context,
        original_state_bytes=before,
        distilled_state_bytes=model.state_bytes(1, found.context),
        seconds=time.perf_counter() - started,
    )


class _Kernel(NamedTuple):
    """The kernels of a layer.

    Attributes:
        taps: (channels, taps). If the filter ends, as many zeros follow its own taps, or as many as
            its `max_length` leaves room for, so that errors include the response that follows.
        length: number of the filter's own taps.
        ends: whether the filter has fewer taps than its `max_length`, and is zero past them.
        is_window: whether the filter is explicit and its recurrence keeps a window of its last
            inputs.
        share: number of consecutive channels whose taps are equal, except for the first tap.
    """

    taps: Tensor
    length: int
    ends: bool
    is_window: bool
    share: int = 1

    def fits(self, goal: Goal) -> bool:
        """Return whether the filters need no reduction, because their order is low enough."""
        order = self.length - 1
        return self.is_window and (order == 0 or (goal.order is not None and order <= goal.order))

    def goal(self, goal: Goal) -> Goal:
        """Return the goal. If the filters end, replace the tail "auto" by "zero"."""
        return dataclasses.replace(goal, tail="zero") if self.ends and goal.tail == "auto" else goal


@torch.no_grad()
def _read_kernel(filter: Any) -> _Kernel:
    system = filter(filter.max_length)
    if not isinstance(system, FIR):
        taps = system.impulse_response(filter.max_length)
        return _Kernel(taps, taps.shape[-1], False, False)
    length = min(system.kernel.shape[-1], filter.max_length)
    taps = system.impulse_response(min(2 * length, filter.max_length))
    ends = length < filter.max_length
    if not isinstance(filter, ExplicitFilter):
        return _Kernel(taps, length, ends, False)
    window = system.recurrence().form == "window"
    return _Kernel(taps, length, ends, window, filter.channels // filter.groups)


def _mixers(model: Any) -> list[Any]:
    from gramian.models import GramianPreTrainedModel

    if not isinstance(model, GramianPreTrainedModel):
        raise TypeError(
            f"distill takes a Gramian model; it was given an object of type {type(model).__name__}."
        )
    return [block.mixer for block in model.base_model.layers]
