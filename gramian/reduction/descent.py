"""Gradient descent by Adam on the parameters of many fits at once.

The descent is Adam (D. P. Kingma, J. Ba, 2015), with decoupled weight decay if there is one
(AdamW; I. Loshchilov, F. Hutter, 2019). Its learning rate is constant, or annealed to zero by a
half cosine (I. Loshchilov, F. Hutter, 2017). Losses compute their own gradients.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from gramian._checks import check_choice, check_not_negative

__all__ = ["Descent", "Loss", "descended"]

_SCHEDULES = ("cosine", "constant")
_REPORTED = 50
"""The number of progress reports in a run."""

Loss = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A function that takes parameters (P, B, m) and returns the losses (B) of B fits and their
gradients (P, B, m)."""


@dataclasses.dataclass(frozen=True)
class Descent:
    """The options of a gradient descent.

    Args:
        steps: The number of steps, at least 1.
        learning_rate: The learning rate of the first step, above 0.
        schedule: "cosine" anneals the learning rate to 0, and "constant" keeps it.
        weight_decay: The decoupled weight decay of AdamW, at least 0. Every step also multiplies
            the parameters by 1 - learning rate × weight decay.

    Raises:
        ValueError: if an option is out of range.
    """

    steps: int = 20_000
    learning_rate: float = 3e-3
    schedule: str = dataclasses.field(default="cosine", kw_only=True)
    weight_decay: float = dataclasses.field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be an integer, at least 1; got {self.steps!r}.")
        rate = self.learning_rate
        if not (isinstance(rate, int | float) and 0 < rate < math.inf):
            raise ValueError(f"learning_rate must be a finite number above 0; got {rate!r}.")
        check_choice("schedule", self.schedule, _SCHEDULES)
        check_not_negative(weight_decay=self.weight_decay)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def descended(
    parameters: Tensor,
    loss: Loss,
    options: Descent,
    *,
    moving: Tensor | None = None,
    confine: Callable[[Tensor], object] = lambda parameters: None,
    tick: Callable[[float], None] = lambda part: None,
) -> Tensor:
    """Run Adam, and return for every fit the best parameters of the whole descent.

    Args:
        parameters: (P, B, m), float64: the initial parameters of B fits.
        loss: The losses, and their gradients. A gradient that is not finite counts as zero.
        options: The options of the descent.
        moving: (P, B, m): a mask, 1 where parameters may move and 0 elsewhere.
        confine: A function that moves parameters into their bounds, in place.
        tick: A function that is called with the parts of the work that have been finished since
            the last call, which add up to 1.
    """
    parameters = parameters.clone()
    confine(parameters)
    best, least = parameters.clone(), parameters.new_full(parameters.shape[1:2], torch.inf)
    mean, square = torch.zeros_like(parameters), torch.zeros_like(parameters)
    every = max(1, options.steps // _REPORTED)
    for step in range(options.steps + 1):
        value, slope = loss(parameters)
        better = value < least
        least = torch.where(better, value, least)
        best = torch.where(better.unsqueeze(-1), parameters, best)
        if step == options.steps:
            break
        slope = torch.nan_to_num(slope, 0.0, 0.0, 0.0)
        if moving is not None:
            slope.mul_(moving)
        mean.lerp_(slope, 0.1)
        square.mul_(0.999).addcmul_(slope, slope, value=0.001)
        rate = options.rate(step)
        if options.weight_decay:
            parameters.mul_(1 - rate * options.weight_decay)
        rate /= 1 - 0.9 ** (step + 1)
        width = (square / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-12)
        parameters.addcdiv_(mean, width, value=-rate)
        confine(parameters)
        if (step + 1) % every == 0:
            tick(every / options.steps)
    return best
