"""Plot the curves of one run, and the metric of a sweep along one axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gramian._drawing import BLUE, CYCLE, ORANGE, finish, head, new_figure
from gramian._json import to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gramian.training.sweep_report import SweepReport, SweepRow

__all__ = ["plot_sweep", "plot_training"]

_MARKERS = "osD^vP*X"


def plot_training(
    lines: Sequence[Mapping[str, Any]], metric: str = "loss", title: str = ""
) -> Figure:
    """Plot losses against steps and, in a second panel, another metric if one was measured.

    The other metric is the first of these that was measured: the accuracy, the relative error,
    `metric`.

    Args:
        lines: entries of a run's `metrics.jsonl`: dictionaries with a `step` and with `loss`,
            `eval_loss` or another metric with the prefix `eval_`.
        metric: the run's `evaluation.metric`, by which it chose its best model.
        title: title of the whole figure, such as the run's folder.

    Raises:
        ValueError: if no line has a loss.
    """
    if not any("loss" in line or "eval_loss" in line for line in lines):
        raise ValueError("plot_training was given no line with a loss; give at least one.")
    shown = ("eval_accuracy", "eval_relative_error", f"eval_{metric}")
    curves = {
        key: [(line["step"], line[key]) for line in lines if key in line]
        for key in ("loss", "eval_loss", *shown)
    }
    others = [key for key in shown if curves[key] and key not in ("eval_loss", "eval_mse")]
    unit = "mean square" if any("eval_mse" in line for line in lines) else "nats"
    figure = new_figure(8.4 if others else 4.4, 3.3)
    panels = figure.subplots(1, 2 if others else 1, squeeze=False)[0]
    for key, name, color in (("loss", "training", BLUE), ("eval_loss", "held out", ORANGE)):
        if curves[key]:
            marker = "o" if key != "loss" or len(curves[key]) == 1 else None
            panels[0].plot(
                *zip(*curves[key], strict=True), color=color, label=name, marker=marker, ms=3
            )
    panels[0].legend(frameon=False, fontsize=8)
    finish(panels[0], title="loss", x="step", y=unit)
    if others:
        name = others[0].removeprefix("eval_").replace("_", " ")
        panels[1].plot(*zip(*curves[others[0]], strict=True), color=ORANGE, marker="o", ms=3)
        label = ""
        if name == "accuracy":
            panels[1].set_ylim(-0.02, 1.02)
            label = "share of right answers"
        elif name == "relative error":
            panels[1].set_ylim(bottom=0)
            label = "1: as zeros"
        finish(panels[1], title=f"held-out {name}", x="step", y=label)
    if title:
        head(figure, title)
    return figure


def plot_sweep(report: SweepReport) -> Figure:
    """Plot the best metric of the runs: means over the seeds with their standard deviations.

    The figure's title is the sweep's folder. The horizontal axis is the sweep's first numeric axis
    other than the seed, with one line for every combination of the other axes' values. If there is
    no such axis, the figure has one bar for every combination.

    Args:
        report: report of a sweep with at least one finished run.

    Raises:
        ValueError: if no run finished.
    """
    rows = [row for row in report.rows if row.best is not None]
    if not rows:
        raise ValueError("plot_sweep was given no run that finished.")
    along = next(
        (
            name
            for name, values in report.axes.items()
            if name != "seed" and len(values) > 1 and all(_is_number(value) for value in values)
        ),
        None,
    )
    label = f"best {report.metric}"
    if along is None:
        return _bars(rows, label, report.output)
    lines: dict[str, list[SweepRow]] = {}
    for row in rows:
        others = {name: value for name, value in row.values.items() if name != along}
        lines.setdefault(_name(others), []).append(row)
    figure = new_figure(6.4, 3.8)
    axes = figure.subplots()
    for index, (name, line) in enumerate(lines.items()):
        line = sorted(line, key=lambda row: row.values[along])
        axes.errorbar(
            [row.values[along] for row in line],
            [row.best.mean for row in line if row.best is not None],
            yerr=[_deviation(row) for row in line],
            color=CYCLE[index % len(CYCLE)],
            marker=_MARKERS[index // len(CYCLE) % len(_MARKERS)],
            ms=4,
            lw=1.4,
            capsize=2,
            label=name,
        )
    places = sorted(report.axes[along])
    if places[0] > 0 and places[-1] >= 8 * places[0]:
        axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=7)
    finish(axes, title="", x=along, y=label)
    head(figure, report.output)
    return figure


def _bars(rows: list[SweepRow], label: str, title: str) -> Figure:
    names = [_name(row.values) or f"{row.runs} runs" for row in rows]
    figure = new_figure(6.4, 0.8 + 0.42 * len(rows))
    axes = figure.subplots()
    means = [row.best.mean for row in rows if row.best is not None]
    bars = axes.barh(
        names, means, xerr=[_deviation(row) for row in rows], color=CYCLE[0], height=0.62
    )
    axes.bar_label(bars, labels=[str(row.best) for row in rows], padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    finish(axes, title="", x=label, y="")
    axes.grid(False)
    head(figure, title)
    return figure


def _deviation(row: SweepRow) -> float:
    return 0.0 if row.best is None or row.best.deviation is None else row.best.deviation


def _name(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name.rsplit('.', 1)[-1]} {value if isinstance(value, str) else to_json(value)}"
        for name, value in values.items()
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
