"""Train a model for a few steps on windows of a text, and undo it unless it helped."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gramian._modules import in_mode

__all__ = ["finetune_briefly", "held_out"]

_HELD_OUT = 10  # one window of so many is held out


def finetune_briefly(
    model: nn.Module,
    windows: Tensor,
    objective: Callable[[Tensor], Tensor],
    groups: list[dict[str, Any]],
    steps: int,
    *,
    batch: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, float]:
    """Train a model in place for a few steps, with AdamW.

    The learning rates rise over a tenth of the steps and fall to zero along a cosine. Every tenth
    window is held out. The others are drawn without replacement: each is trained on once before one
    is trained on again. If the objective on these windows does not improve, the weights are
    restored.

    Args:
        model: the model.
        windows: token ids, (count, length), or more numbers for each token, (count, …, length),
            with a count of at least 2, on the model's device.
        objective: function that maps some windows to the mean of the loss over them. It is called
            with the model in training mode, and in evaluation mode to measure.
        groups: parameter groups of the optimizer, with learning rates.
        steps: number of steps, at least 1.
        batch: number of windows in each step.
        seed: seed of the random choice of windows, and of what the model draws itself.
        progress: a function that is called as `progress(steps done, all steps)` before the first
            step and after every step.

    Returns:
        The objective on the held-out windows before and after. Both are equal if the weights were
        restored.
    """
    held = held_out(len(windows)).to(windows.device)
    kept_out, trained = windows[held], windows[~held]
    before, weights = _mean(model, objective, kept_out, batch), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(groups)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    parameters = [parameter for group in groups for parameter in group["params"]]
    generator = torch.Generator().manual_seed(seed)
    if progress is not None:
        progress(0, steps)
    devices = [windows.device] if windows.device.type != "cpu" else []
    forked = torch.random.fork_rng(devices=devices, device_type=windows.device.type)
    with forked, in_mode(model, training=True), torch.enable_grad():
        torch.manual_seed(seed)
        batches = _batches(len(trained), batch, generator)
        for step, chosen in zip(range(steps), batches, strict=False):
            optimizer.zero_grad()
            objective(trained[chosen.to(trained.device)]).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(step + 1, steps)
    optimizer.zero_grad()
    after = _mean(model, objective, kept_out, batch)
    if not after < before:
        model.load_state_dict(weights)
        after = before
    return before, after


def held_out(count: int) -> Tensor:
    """Return which of some windows are held out, (count), in `finetune_briefly`."""
    return torch.arange(count) % _HELD_OUT == 1


def _batches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield endless batches of indices, (batch), from one random order of all after the other."""
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < batch:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:batch]
        left = left[batch:]


@torch.no_grad()
def _mean(
    model: nn.Module, objective: Callable[[Tensor], Tensor], windows: Tensor, batch: int
) -> float:
    """Return the mean of an objective over windows, with the model in evaluation mode."""
    with in_mode(model, training=False):
        total = sum(objective(part).item() * len(part) for part in windows.split(batch))
    return float(total) / len(windows)
