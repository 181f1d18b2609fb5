"""Report the evaluation of one model, or of two models side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gramian._json import to_json
from gramian.evaluation._measure import Measure, difference_error

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Comparison", "EvaluationReport"]


@dataclass(frozen=True)
class Comparison:
    """The values of one metric for two models.

    Attributes:
        before: the measure of the reference model.
        after: the measure of the evaluated model.
        difference: the value of `after` minus the value of `before`.
        error: standard error of the difference, or None if it is not known. The measures are paired
            if both models were measured on the same data.
    """

    before: Measure
    after: Measure

    @property
    def difference(self) -> float:
        return self.after.value - self.before.value

    @property
    def error(self) -> float | None:
        return difference_error(self.after, self.before)


@dataclass(frozen=True)
class EvaluationReport:
    """The measures of a model. A report prints as a table.

    Attributes:
        model: name of the model.
        measures: measures of the model, in the order of the tasks.
        against: name of the reference model, or None.
        before: measures of the reference model, if there is one.
        conditions: the settings that the values depend on: the seed and, if they apply, the limit,
            the window, the stride, the number of shots, and the splits and settings of the tasks.
    """

    model: str
    measures: tuple[Measure, ...]
    against: str | None = None
    before: tuple[Measure, ...] = ()
    conditions: dict[str, Any] = field(default_factory=dict)

    @property
    def unusable(self) -> tuple[Measure, ...]:
        """Return the measures of both models that are NaN or infinite. JSON shows them as null."""
        return tuple(one for one in (*self.before, *self.measures) if not math.isfinite(one.value))

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Return a comparison for every metric that was measured for both models."""
        others = {(one.task, one.metric): one for one in self.before}
        pairs = ((others.get((one.task, one.metric)), one) for one in self.measures)
        return tuple(Comparison(before, after) for before, after in pairs if before is not None)

    def to_dict(self) -> dict[str, Any]:
        """Return the whole report as values that JSON can represent."""
        values: dict[str, Any] = {
            "model": self.model,
            "measures": [one.to_dict() for one in self.measures],
            "conditions": self.conditions,
        }
        if self.against is not None:
            values["against"] = self.against
            values["before"] = [one.to_dict() for one in self.before]
            values["comparisons"] = [
                {
                    "task": one.after.task,
                    "metric": one.after.metric,
                    "before": one.before.value,
                    "after": one.after.value,
                    "difference": one.difference,
                    "error": one.error,
                    "higher_is_better": one.after.higher_is_better,
                }
                for one in self.comparisons
            ]
        return values

    def to_json(self) -> str:
        """Return the values of `to_dict` as indented JSON text."""
        return to_json(self.to_dict(), indent=2)

    def to_markdown(self) -> str:
        """Return the table in Markdown, followed by the summary."""
        header, *lines = self._cells()
        rule = f"|{'---|' * len(header)}"
        text = [f"| {' | '.join(header)} |", rule]
        text += [f"| {' | '.join(line)} |" for line in lines]
        return "\n".join([*text, "", self.summary]) + "\n"

    @property
    def summary(self) -> str:
        """Return one line that explains the table and names the splits."""
        compared = "" if self.against is None else f" against {self.against}"
        differences = "" if self.against is None else ", differences over the same data"
        splits = [
            f" {name}: {task['split']} split, seed {self.conditions['seed']}."
            for name, task in self.conditions.get("tasks", {}).items()
        ]
        return (
            f"{self.model}{compared}: values ± standard errors{differences}; ↑ more is better, ↓ "
            f"less is.{''.join(splits)}"
        )

    def _cells(self) -> list[list[str]]:
        if self.against is None:
            table = [["task", "metric", "", "value", "units", "tokens"]]
            for one in self.measures:
                known = _known(one.value, one.error)
                tokens = "" if one.tokens is None else f"{one.tokens:,}"
                table.append([one.task, one.metric, _arrow(one), known, f"{one.units:,}", tokens])
            counted = any(one.tokens is not None for one in self.measures)
            return table if counted else [row[:-1] for row in table]
        table = [["task", "metric", "", "before", "after", "difference"]]
        for pair in self.comparisons:
            after, before = pair.after, pair.before
            table.append(
                [
                    after.task,
                    after.metric,
                    _arrow(after),
                    _known(before.value, before.error),
                    _known(after.value, after.error),
                    _known(pair.difference, pair.error, signed=True),
                ]
            )
        return table

    def __str__(self) -> str:
        return self.to_markdown()

    def __rich__(self) -> Table:
        from rich.markup import escape
        from rich.table import Table

        header, *lines = self._cells()
        table = Table(caption=escape(self.summary), caption_justify="left", caption_style="")
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index < 2 else "right")
        for line in lines:
            table.add_row(*map(escape, line))
        return table


def _arrow(measure: Measure) -> str:
    return {True: "↑", False: "↓", None: ""}[measure.higher_is_better]


def _known(value: float, error: float | None, signed: bool = False) -> str:
    sign = "+" if signed else ""
    large = abs(value) >= 1e5
    text = f"{value:{sign}.4g}" if large else f"{value:{sign}.4f}"
    if error is None:
        return text
    return f"{text} ± {error:.2g}" if large or 0 < error < 1e-4 else f"{text} ± {error:.4f}"
