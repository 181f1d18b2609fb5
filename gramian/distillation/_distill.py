"""Every filter of a model reduced, and the model rebuilt around what it was reduced to."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from gramian.distillation._report import DistillationReport, LayerReport
from gramian.filters import ModalFilter
from gramian.reduction import Reduction, reduce

if TYPE_CHECKING:
    from gramian.models import GramianPreTrainedModel

__all__ = ["distill"]

_Model = TypeVar("_Model", bound="GramianPreTrainedModel")

# A filter is held in float32: its error may exceed what float64 reached by this much, relatively.
_ROUNDING = 1e-3


def distill(
    model: _Model,
    tol: float = 1e-3,
    order: int | None = None,
    *,
    max_order: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[_Model, DistillationReport]:
    """Replace every long filter of a model by a small recurrence (arXiv 2310.18780).

    Each filter's kernel, over the model's `max_position_embeddings` taps, is reduced with
    `gramian.reduce`; the `ModalFilter`s that hold the results take the filters' places in a copy of
    the model. The copy is of the same class, with `config.filter` one configuration per layer, and
    is saved, loaded, trained and generated from like any other. Filters that are modal already, and
    layers of attention, stay as they are. The given model is left untouched.

    Args:
        model: any Gramian model that is not bidirectional.
        tol: relative l2 error `‖h − ĥ‖₂ / ‖h‖₂` asked of every filter; each gets the smallest order
            that reaches it. Between 0 and 1, both excluded. Ignored when `order` is given.
        order: real state dimension of every filter, from 1 to the number of taps less one.
        max_order: where the search for `tol` ends; by default at 256 or the number of taps. One
            filter of high order makes the state of its whole layer large.
        progress: called as `progress(layers done, layers)` before the first and after each layer.

    Returns:
        The distilled model and a report. Filters that stay above `tol` are named in the report,
        never silently accepted: see `DistillationReport.converged`.

    Raises:
        TypeError: `model` is not a Gramian model.
        ValueError: `tol`, `order` or `max_order` out of range, no filter left to distil, a
            bidirectional model, or a kernel that is not finite.
    """
    filters = [mixer.filter for mixer in _mixers(model)]
    if model.config.bidirectional:
        raise ValueError("A bidirectional model cannot be distilled: it has no recurrence.")
    long = [i for i, f in enumerate(filters) if not (f is None or isinstance(f, ModalFilter))]
    wanted = {"order": order} if order is not None else {"tol": tol, "max_order": max_order}
    if order is None:
        _check_tolerance(tol)
    if not long:
        raise ValueError("Nothing to distil: every filter of this model is modal already.")
    if order is not None:
        _check_order(order, min(filters[layer].max_length for layer in long))

    started = time.perf_counter()
    distilled = copy.deepcopy(model)
    configs = [model.config.filter_of(layer) for layer in range(len(filters))]
    reports = []
    if progress is not None:
        progress(0, len(long))
    for done, layer in enumerate(long, start=1):
        mixer, taps = _mixers(distilled)[layer], filters[layer].max_length
        kernel = _kernel(filters[layer], taps)
        try:
            # In float32, as a ModalFilter holds it: poles and residues that need more digits, or
            # lie closer to the unit circle, would not survive it.
            reduction = reduce(kernel.float(), **wanted)
        except ValueError as error:
            raise ValueError(f"Layer {layer} cannot be distilled: {error}") from error
        parameter = next(mixer.parameters())
        modal = ModalFilter.from_system(reduction.system, max_length=taps, kernel=kernel)
        modal = modal.to(parameter.device)
        mixer.filter = modal.train(mixer.training)
        configs[layer] = modal.config()
        reports.append(
            _layer_report(
                layer,
                type(mixer).__name__,
                kernel,
                modal,
                reduction,
                tol if order is None else None,
            )
        )
        if progress is not None:
            progress(done, len(long))
    distilled.config.filter = configs
    context = max(filters[layer].max_length for layer in long)
    return distilled, DistillationReport(
        tol=tol if order is None else None,
        order=order,
        layers=tuple(reports),
        context=context,
        original_state_bytes=model.state_bytes(1, context),
        distilled_state_bytes=distilled.state_bytes(1, context),
        seconds=time.perf_counter() - started,
    )


def _mixers(model: Any) -> list[Any]:
    from gramian.models import GramianPreTrainedModel

    if not isinstance(model, GramianPreTrainedModel):
        raise TypeError(
            f"distill takes a Gramian model; it was given an object of type {type(model).__name__}."
        )
    return [block.mixer for block in model.base_model.layers]


def _check_tolerance(tol: Any) -> None:
    number = isinstance(tol, int | float) and not isinstance(tol, bool)
    if not (number and math.isfinite(tol) and 0 < tol < 1):
        raise ValueError(f"The tolerance must lie between 0 and 1, both excluded; got {tol!r}.")


def _check_order(order: Any, taps: int) -> None:
    if not isinstance(order, int) or isinstance(order, bool) or not 1 <= order < taps:
        raise ValueError(
            f"The order must be an integer from 1 to {taps - 1}, one less than the {taps} taps of "
            f"the filters; got {order!r}."
        )


@torch.no_grad()
def _kernel(filter: Any, taps: int) -> Tensor:
    return filter(taps).impulse_response(taps).double()  # (channels, taps)


@torch.no_grad()
def _layer_report(
    layer: int, mixer: str, kernel: Tensor, modal: Any, reduction: Reduction, tol: float | None
) -> LayerReport:
    taps = kernel.shape[-1]
    error = kernel - _kernel(modal, taps)
    norm = kernel.norm(dim=-1)
    relative = torch.where(norm > 0, error.norm(dim=-1) / norm.clamp(min=1e-300), 0.0).tolist()
    return LayerReport(
        layer=layer,
        mixer=mixer,
        taps=taps,
        orders=tuple(int(n) for n in reduction.order.tolist()),
        relative_errors=tuple(relative),
        lower_bounds=tuple(reduction.lower_bound.tolist()),
        l1_errors=tuple(error.abs().sum(-1).tolist()),
        tail_energies=tuple(reduction.tail_energy.tolist()),
        unconverged=tuple(
            i for i, e in enumerate(relative) if tol is not None and e > tol * (1 + _ROUNDING)
        ),
    )
