"""Distil a model within a budget for the increase of its loss on a text.

The effect of a filter's error on the loss depends on the model. So several tolerances are tried,
and the loss is measured for each. The tolerance is lowered until the increase of the loss is within
the budget. Then larger tolerances within the last step are tried, too.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gramian._finetuning import finetune_briefly
from gramian._modules import in_mode
from gramian.distillation._distill import Replacements, reduce_layers, report_of
from gramian.distillation._filters import Goal
from gramian.distillation._report import DistillationReport, Quality, Trial
from gramian.filters import parameter_groups
from gramian.ops.precision import full_precision

__all__ = ["distill_to_budget", "finetune", "mean_loss", "measure_quality"]

_COARSEST, _FINEST, _STEP = 0.3, 1e-6, 10**0.5
_HALVINGS = 2

_TOKENS = 2**13
"""The number of tokens in one forward pass when a loss is measured."""


@torch.no_grad()
def mean_loss(model: Any, input_ids: Tensor) -> float:
    """Return the mean cross-entropy of the tokens of a text, in nats.

    The model runs in evaluation mode. The first token of a window is not scored, because no token
    predicts it.

    Args:
        model: a Gramian causal language model.
        input_ids: windows of the text, (count, length).
    """
    total = 0.0
    with in_mode(model, training=False):
        for part in input_ids.to(model.device).split(max(1, _TOKENS // input_ids.shape[1])):
            logits = model(part[:, :-1], use_cache=False).logits.float()
            losses = nn.functional.cross_entropy(
                logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
            )
            total += losses.item()
    return total / input_ids[:, 1:].numel()


def measure_quality(
    original: Any, distilled: Any, report: DistillationReport, input_ids: Tensor
) -> Quality:
    """Measure the loss on a text before and after distilling without a budget.

    Args:
        original: a Gramian causal language model, or its loss on the text if it was distilled in
            place.
        distilled: the distilled model that `gramian.distill` returned.
        report: the report that `gramian.distill` returned.
        input_ids: windows of the text, (count, length), with a length of at least 2.

    Returns:
        The losses. The list of trials has one entry.
    """
    before = original if isinstance(original, float) else mean_loss(original, input_ids)
    after = mean_loss(distilled, input_ids)
    trial = Trial(report.tol, report.mean_order, after, after / before - 1)
    return Quality(input_ids.numel(), None, before, (trial,))


def distill_to_budget(
    model: Any,
    input_ids: Tensor,
    max_increase: float = 1e-3,
    *,
    max_order: int | None = None,
    tail: str = "auto",
    inplace: bool = False,
    progress: Callable[[Trial], None] | None = None,
) -> tuple[Any, DistillationReport]:
    """Distil to small recurrences with which the loss on a text stays within a budget.

    All filters are reduced to the same tolerance. This is the largest tolerance tried with which
    the loss stays within the budget. The tolerance is lowered from 0.3 by factors of √10 until the
    loss is within the budget. Then the last step is halved twice on a logarithmic scale. No
    tolerance above 0.3 is tried, even if the budget is large.

    Args:
        model: a Gramian causal language model. It stays unchanged, unless `inplace` is set.
        input_ids: windows of the text, (count, length), with a length of at least 2.
        max_increase: the budget: the largest increase of the mean cross-entropy, relative to the
            mean cross-entropy of the given model; positive.
        max_order: largest order of a filter, as for `gramian.distill`.
        tail: behavior of a filter past its last tap, as for `gramian.distill`.
        inplace: whether to distil the given model itself, as for `gramian.distill`.
        progress: a function that is called with every trial.

    Returns:
        The distilled model and its report. `quality` in the report has all trials.

    Raises:
        TypeError: if the model is not a `GramianForCausalLM`.
        ValueError: in the same cases as `gramian.distill`; if the shape of `input_ids` is not
            (count, length); or if the budget is not positive, or is exceeded even at a tolerance of
            1e-6.
    """
    check_windows(model, input_ids)
    if not max_increase > 0:
        raise ValueError(f"the increase allowed must be above 0; got {max_increase!r}.")
    input_ids = input_ids.to(model.device)
    loss = mean_loss(model, input_ids)
    small = model if inplace else copy.deepcopy(model)  # the one in which the filters take turns
    trials: list[Trial] = []
    found: tuple[Replacements, DistillationReport] | None = None

    def keeps(tol: float) -> bool:
        nonlocal found
        filters, report, reached = _try(small, Goal(tol, None, max_order, tail), input_ids)
        trials.append(Trial(tol, report.mean_order, reached, reached / loss - 1))
        if progress is not None:
            progress(trials[-1])
        if not trials[-1].increase <= max_increase:  # NaN is not within the budget
            return False
        found = (filters, report)
        return True

    tol, failed = _COARSEST, None
    while not keeps(tol):
        failed, tol = tol, tol / _STEP
        if tol < _FINEST:
            best = min(trials, key=lambda trial: trial.increase)
            raise ValueError(
                f"no tolerance from {_COARSEST:g} to {_FINEST:g} keeps the loss within "
                f"{max_increase:.3%} of the original's; the closest is {best.increase:.3%} at "
                f"{best.tol:.1e}, with filters of mean order {best.mean_order:.1f}."
            )
    for _ in range(_HALVINGS if failed is not None else 0):
        assert failed is not None
        middle = math.sqrt(tol * failed)
        if keeps(middle):
            tol = middle
        else:
            failed = middle
    assert found is not None
    filters, report = found
    filters.put(small)
    quality = Quality(input_ids.numel(), max_increase, loss, tuple(trials))
    return small, dataclasses.replace(report, quality=quality)


def _try(
    model: Any, goal: Goal, input_ids: Tensor
) -> tuple[Replacements, DistillationReport, float]:
    """Return reduced filters, a report, and the loss with them. The model has its own again."""
    with full_precision():
        started = time.perf_counter()
        found = reduce_layers(model, goal)
        before = model.state_bytes(1, found.context)
    own = found.put(model)
    try:
        report = report_of(goal, found, before, model, started)
        return found, report, mean_loss(model, input_ids)
    finally:
        own.put(model)


def finetune(
    model: Any,
    input_ids: Tensor,
    steps: int = 100,
    *,
    lr: float = 3e-4,
    batch: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, float]:
    """Train a distilled model briefly, in place, to recover lost quality.

    AdamW trains all weights without weight decay. The learning rate rises over a tenth of the steps
    and falls to zero along a cosine. For the parameters that determine the filters' dynamics, the
    optimizer uses the hints of the filters. Every tenth window is held out. If the loss on the
    held-out windows does not improve, the weights are restored.

    Args:
        model: a Gramian causal language model.
        input_ids: windows of text, (count, length), with a count and a length of at least 2.
        steps: number of steps, at least 1.
        lr: peak learning rate.
        batch: number of windows in each step.
        seed: seed of the random choice of windows.
        progress: a function that is called as `progress(steps done, all steps)` before the first
            step and after every step.

    Returns:
        The loss on the held-out windows before and after training. Both are equal if the weights
        were restored.

    Raises:
        TypeError: if the model is not a `GramianForCausalLM`.
        ValueError: if the windows have another shape, or `steps` is below 1.
    """
    check_windows(model, input_ids)
    if len(input_ids) < 2:
        raise ValueError("fine-tuning needs at least 2 windows of text, one of them held out.")
    if steps < 1:
        raise ValueError(f"fine-tuning takes at least 1 step; got {steps}.")
    return finetune_briefly(
        model,
        input_ids.to(model.device),
        lambda ids: model(ids, labels=ids, use_cache=False).loss,
        parameter_groups(model, lr=lr, weight_decay=0.0),
        steps,
        batch=batch,
        seed=seed,
        progress=progress,
    )


def check_windows(model: Any, input_ids: Tensor) -> None:
    """Check the arguments of functions that measure a loss on a text.

    Raises:
        TypeError: unless the model is a `GramianForCausalLM`.
        ValueError: unless the shape of `input_ids` is (count, length), with a count of at least 1
            and a length of at least 2.
    """
    from gramian.models import GramianForCausalLM

    if not isinstance(model, GramianForCausalLM):
        raise TypeError(f"a GramianForCausalLM is needed; got a {type(model).__name__}.")
    if input_ids.ndim != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 2:
        raise ValueError(
            "the text must be windows of tokens (count, length) with a length of at least 2; got "
            f"{tuple(input_ids.shape)}."
        )
