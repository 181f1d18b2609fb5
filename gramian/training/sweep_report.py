"""Gather the results of a sweep: all points, means over the seeds, and tables."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gramian.training._run import TrainingReport

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["SEED", "PointReport", "Spread", "SweepReport", "SweepRow"]

SEED = "seed"
STATE_SIZES = {"ess": "ESS", "ess_utilization": "in use"}
"""The headings of the columns of metrics of memory. A column appears if its metric was measured."""


@dataclass(frozen=True)
class Spread:
    """A mean and a sample standard deviation. For a single value, the deviation is None."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        mean = math.fsum(values) / len(values)
        if len(values) == 1:
            return cls(mean, None)
        squares = math.fsum((value - mean) ** 2 for value in values)
        return cls(mean, math.sqrt(squares / (len(values) - 1)))

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.deviation is None else f" ± {self.deviation:.4f}")


@dataclass(frozen=True)
class PointReport:
    """One run of a sweep.

    Attributes:
        name: name of the run's folder within the sweep's folder.
        values: the value of each axis at this point.
        report: report of the run, or None if it failed.
        error: one line that says why the run failed, or None.
    """

    name: str
    values: dict[str, Any]
    report: TrainingReport | None = None
    error: str | None = None


@dataclass(frozen=True)
class SweepRow:
    """A group of runs that differ only in their seeds.

    Attributes:
        values: for each axis except the seed, the value that the runs share.
        runs: number of runs that finished.
        failed: number of runs that failed.
        best: mean and deviation, over the finished runs, of the metric at its best evaluation. If
            no run finished, this attribute and the ones below are None.
        last: mean and deviation of the metric at the last evaluation.
        steps: mean number of optimizer steps.
        seconds: mean wall time of a run in seconds, counted from its last resumption.
        ess: mean and deviation of the average effective state-size at the last evaluation; None
            unless `evaluation.ess.rows` is set.
        ess_utilization: mean and deviation of the share of the state in use; None in the same case.
    """

    values: dict[str, Any]
    runs: int
    failed: int
    best: Spread | None
    last: Spread | None
    steps: float | None
    seconds: float | None
    ess: Spread | None = None
    ess_utilization: Spread | None = None


@dataclass(frozen=True)
class SweepReport:
    """The results of a sweep. A report prints as the table of `rows`.

    Attributes:
        output: the sweep's folder.
        metric: `evaluation.metric`, by which the best evaluation of each run was chosen.
        axes: for each axis, a list of all its values.
        points: all runs, in the order of the grid.
    """

    output: str
    metric: str
    axes: dict[str, list[Any]]
    points: tuple[PointReport, ...]

    @property
    def failed(self) -> tuple[PointReport, ...]:
        """Return the runs that failed."""
        return tuple(point for point in self.points if point.error is not None)

    @property
    def rows(self) -> tuple[SweepRow, ...]:
        """Group the runs that differ only in their seeds, in the order of the grid."""
        groups: dict[str, list[PointReport]] = {}
        for point in self.points:
            groups.setdefault(json.dumps(_without_seed(point.values)), []).append(point)
        return tuple(self._row(group) for group in groups.values())

    def _row(self, group: list[PointReport]) -> SweepRow:
        reports = [point.report for point in group if point.report is not None]
        values = _without_seed(group[0].values)
        failed = len(group) - len(reports)
        if not reports:
            return SweepRow(values, 0, failed, None, None, None, None)
        return SweepRow(
            values=values,
            runs=len(reports),
            failed=failed,
            best=Spread.of([report.best[self.metric] for report in reports]),
            last=Spread.of([report.metrics[self.metric] for report in reports]),
            steps=Spread.of([report.steps for report in reports]).mean,
            seconds=Spread.of([report.seconds for report in reports]).mean,
            **{name: _measured(reports, name) for name in STATE_SIZES},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the whole report as values that JSON can represent."""
        return {**asdict(self), "rows": [asdict(row) for row in self.rows]}

    def to_csv(self) -> str:
        """Return CSV with one line for every run: the value of each axis, then the results."""
        columns = [
            self._line(point) | ({} if point.error is None else {"error": point.error})
            for point in self.points
        ]
        names = list(dict.fromkeys(name for line in columns for name in line))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(columns)
        return text.getvalue()

    def _line(self, point: PointReport) -> dict[str, Any]:
        line: dict[str, Any] = {name: _text(value) for name, value in point.values.items()}
        if (report := point.report) is not None:
            line |= {
                f"best_{self.metric}": report.best[self.metric],
                "best_step": report.best["step"],
                **{f"last_{name}": value for name, value in report.metrics.items()},
                "steps": report.steps,
                "parameters": report.parameters,
                "seconds": report.seconds,
            }
        return line

    def to_markdown(self) -> str:
        """Return the table of `rows` in Markdown, followed by the runs that failed."""
        header, *lines = self._cells()
        text = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        text += [
            f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
        ]
        note = f"\n{self.summary}"
        failures = [f"- `{point.name}`: {point.error}" for point in self.failed]
        return "\n".join([*text, note, *([""] if failures else []), *failures]) + "\n"

    @property
    def summary(self) -> str:
        """Return one sentence: the numbers of runs and of failures, and what the table shows."""
        words = f"{len(self.points)} runs"
        if self.failed:
            words += f", {len(self.failed)} failed"
        if len(self.axes.get(SEED, ())) > 1:
            words += "; mean ± standard deviation over the seeds"
        return f"{words}."

    def _cells(self) -> list[list[str]]:
        axes = [name for name in self.axes if name != SEED]
        last = [name.rsplit(".", 1)[-1] for name in axes]
        short = last if len(set(last)) == len(last) else axes
        rows = self.rows
        known = [key for key in STATE_SIZES if any(getattr(row, key) is not None for row in rows)]
        measured = [f"best {self.metric}", f"last {self.metric}", *(STATE_SIZES[k] for k in known)]
        table = [[*short, "runs", *measured, "steps", "seconds"]]
        for row in rows:
            cells = [_text(row.values[name]) for name in axes]
            cells.append(f"{row.runs} of {row.runs + row.failed}" if row.failed else str(row.runs))
            if row.steps is None or row.seconds is None:
                cells += ["failed", *[""] * (len(measured) + 1)]
            else:
                spreads = [row.best, row.last, *(getattr(row, key) for key in known)]
                cells += ["" if spread is None else str(spread) for spread in spreads]
                cells += [f"{row.steps:,.0f}", f"{row.seconds:.0f}"]
            table.append(cells)
        return table

    def __str__(self) -> str:
        return self.to_markdown()

    def __rich__(self) -> Table:
        from rich.markup import escape
        from rich.table import Table

        header, *lines = self._cells()
        table = Table(caption=self.summary, caption_justify="left", caption_style="")
        for name in header:
            table.add_column(escape(name), justify="right", overflow="fold", min_width=5)
        for line in lines:
            table.add_row(*map(escape, line))
        return table


def _measured(reports: Sequence[TrainingReport], metric: str) -> Spread | None:
    """Return the spread of a metric over the runs that measured it, or None if no run did."""
    values = [report.metrics[metric] for report in reports if metric in report.metrics]
    return Spread.of(values) if values else None


def _without_seed(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != SEED}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
