"""Log state-sizes at each evaluation of a trainer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from gramian.analysis import StateReport, analyze

__all__ = ["StateSizeCallback"]


class StateSizeCallback(TrainerCallback):
    """A callback that logs effective state-sizes at each evaluation.

        trainer.add_callback(StateSizeCallback(trainer))

    The callback works for any model that `gramian.analyze` can read. It logs three kinds of
    numbers. `eval_ess` is the average effective state-size (ESS) of the layers,
    `eval_ess_utilization` is the share of the usable state that is in use (`StateReport.in_use`),
    and `eval_ess_layer_NAME` is the ESS of each layer. All are means over rows and positions. They
    are added to the metrics that `trainer.evaluate()` returns, and they appear in the trainer's
    logs. If they cannot be measured, a warning is given and training continues.

    Args:
        trainer: The `transformers.Trainer` to which the callback is added.
        rows: Number of rows to read from the trainer's evaluation set, or the rows themselves. A
            row is a tensor of token ids (length) or floating-point numbers (length, size), or a
            mapping with `input_ids` or `input_values`. If the mapping has an `attention_mask`,
            padding is left out.
        every: Distance between the positions that are measured.
        horizon: Maximal number of tokens of a row to read. By default, all are read.
        max_channels: Maximal number of heads or channels of a layer to measure. If there are more,
            every n-th is measured. None measures all.

    Raises:
        ValueError: if a number is below 1, or if there are no rows.
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
                raise ValueError(f"{name} must be at least 1; got {number}.")
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
        """Measure a model with its present weights, and return the numbers to log."""
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
    report = report.main
    inside = torch.tensor(report.positions) > 0  # the first position has no past
    if not report.layers or not bool(inside.any()):
        return {}
    means = [float(layer.ess[:, inside].mean()) for layer in report.layers]
    summary = {"eval_ess": sum(means) / len(means), "eval_ess_utilization": report.in_use or 0.0}
    names = zip(report.labels, means, strict=True)
    return summary | {f"eval_ess_layer_{name}": mean for name, mean in names}


def _first(dataset: Any, count: int) -> list[Any]:
    """Return the first rows of an evaluation set, or of the first set in a dictionary of sets."""
    if isinstance(dataset, Mapping):
        dataset = next(iter(dataset.values()), None)
    if dataset is None or count < 1:
        return []
    return [row for row, _ in zip(dataset, range(count), strict=False)]


def _sequence(row: Any) -> Tensor:
    """Return a row without its padding: token ids (length) or numbers (length, size)."""
    if not isinstance(row, Mapping):
        return torch.as_tensor(row)
    sequence = torch.as_tensor(row["input_ids"] if "input_ids" in row else row["input_values"])
    mask = row.get("attention_mask")
    return sequence if mask is None else sequence[torch.as_tensor(mask) != 0]
