"""State-sizes at each evaluation of a model in training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from gramian.analysis import StateReport, analyze
from gramian.ess import utilization

__all__ = ["StateSizeCallback"]


class StateSizeCallback(TrainerCallback):
    """Log effective state-sizes at each evaluation, of any model that `gramian.analyze` can read.

        trainer.add_callback(StateSizeCallback(trainer))

    Logged are `eval_ess`, the average over layers, `eval_ess_utilization`, the share of the state
    in use, and `eval_ess_layer_NAME` for every layer: means over rows and positions. They join the
    metrics that `trainer.evaluate()` returns, and go wherever the trainer's logs go. Training goes
    on where they cannot be measured, with a warning.

    Args:
        trainer: The `transformers.Trainer` that it is added to.
        rows: How many rows of the trainer's evaluation set to read, or the rows: token ids,
            floating-point numbers (length, size), or mappings with `input_ids` or `input_values`,
            and perhaps an `attention_mask`, whose padding is left out.
        every: Positions between those that are measured.
        horizon: At most so many tokens of a row are read; all by default.
        max_channels: Of a layer with more heads or channels, every n-th is measured.

    Raises:
        ValueError: for numbers below 1, or if there are no rows.
    """

    def __init__(
        self,
        trainer: Trainer,
        rows: int | Sequence[Any] = 2,
        *,
        every: int = 16,
        horizon: int | None = None,
        max_channels: int | None = 16,
    ) -> None:
        for name, number in (
            ("every", every),
            ("horizon", horizon),
            ("max_channels", max_channels),
        ):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}.")
        if isinstance(rows, int):
            rows = _first(trainer.eval_dataset, rows)
        if not rows:
            raise ValueError("state-sizes need at least one row to read.")
        self.trainer = trainer
        self.rows = [_sequence(row) for row in rows]
        self.every = every
        self.horizon = horizon
        self.max_channels = max_channels

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        try:
            sizes = self.measure(kwargs["model"])
        except ValueError as error:
            warnings.warn(f"no state-sizes at step {state.global_step}: {error}", stacklevel=2)
            return
        if metrics is not None:
            metrics.update(sizes)
        self.trainer.log(dict(sizes))

    def measure(self, model: nn.Module) -> dict[str, float]:
        """What is logged, of a model as it is."""
        found: dict[str, list[float]] = {}
        for row in self.rows:
            horizon = None if self.horizon is None else min(self.horizon, len(row))
            report = analyze(
                model, row, every=self.every, horizon=horizon, max_channels=self.max_channels
            )
            if not report.layers:
                reasons = "; ".join(dict.fromkeys(reason for _, reason in report.unread))
                raise ValueError(f"no layer can be read: {reasons}")
            for name, value in _summary(report).items():
                found.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in found.items()}


def _summary(report: StateReport) -> dict[str, float]:
    inside = torch.tensor(report.positions) > 0  # there is no past before the first
    if not report.layers or not bool(inside.any()):
        return {}
    sizes = [layer.ess[:, inside] for layer in report.layers]
    shares = [
        utilization(ess, layer.tss[:, inside]).mean()
        for ess, layer in zip(sizes, report.layers, strict=True)
    ]
    means = [float(ess.mean()) for ess in sizes]
    summary = {
        "eval_ess": sum(means) / len(means),
        "eval_ess_utilization": float(torch.stack(shares).mean()),
    }
    names = zip(report.labels, means, strict=True)
    return summary | {f"eval_ess_layer_{name}": mean for name, mean in names}


def _first(dataset: Any, count: int) -> list[Any]:
    """The first rows of an evaluation set, or of the first of several by name."""
    if isinstance(dataset, Mapping):
        dataset = next(iter(dataset.values()), None)
    if dataset is None or count < 1:
        return []
    return [row for row, _ in zip(dataset, range(count), strict=False)]


def _sequence(row: Any) -> Tensor:
    """(length), integers, or (length, size), without padding."""
    if not isinstance(row, Mapping):
        return torch.as_tensor(row)
    sequence = torch.as_tensor(row["input_ids"] if "input_ids" in row else row["input_values"])
    mask = row.get("attention_mask")
    return sequence if mask is None else sequence[torch.as_tensor(mask) != 0]
