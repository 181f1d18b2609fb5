"""Train a small byte-level language model in a few minutes on two cores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gramian.filters import parameter_groups
from gramian.models import GramianForCausalLM

__all__ = ["TrainingSettings", "train"]


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of AdamW and of the schedule of its learning rate.

    After a linear warm-up, a cosine lowers the rate to a twentieth of its peak.

    Attributes:
        steps: number of optimizer steps.
        batch_size: number of windows in a batch.
        length: number of bytes that the model reads in a window.
        learning_rate: learning rate at its peak.
        warmup_fraction: share of the steps that are warm-up.
        weight_decay: weight decay of matrices other than embeddings and the parameters of filters.
        clip_norm: largest norm of the gradient.
    """

    steps: int = 600
    batch_size: int = 4
    length: int = 512
    learning_rate: float = 5e-3
    warmup_fraction: float = 0.05
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def rate_at(self, step: int) -> float:
        """Return the learning rate of step 0, 1, …, `steps` - 1."""
        warmup = max(1, round(self.steps * self.warmup_fraction))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    model: GramianForCausalLM,
    data: Tensor,
    settings: TrainingSettings,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `model` in place on random windows of `data`.

    Torch's global generator draws the windows.

    Args:
        model: the model to train.
        data: (bytes,) uint8, longer than a window.
        settings: settings of training.
        on_step: function that is called after every step with the number of steps done and the loss
            in bits per byte, or None.

    Returns:
        The loss of every step, in bits per byte.
    """
    data = data.long()
    rate = settings.learning_rate
    groups = parameter_groups(model, lr=rate, weight_decay=settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: settings.rate_at(n) / rate)
    offsets = torch.arange(settings.length + 1)
    losses = []
    model.train()
    for step in range(settings.steps):
        starts = torch.randint(len(data) - settings.length, (settings.batch_size, 1))
        windows = data[starts + offsets]  # (batch, length + 1)
        due = windows[:, 1:].contiguous()
        loss = model(windows[:, :-1], labels=due, shift_labels=due, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item() / math.log(2))
        if on_step is not None:
            on_step(step + 1, losses[-1])
    model.eval()
    return losses
