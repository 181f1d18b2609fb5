"""The figure of a sweep: what was measured along one axis of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gramian.reports._figures import _CYCLE, _finish, _new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gramian.training.sweep_report import SweepReport, SweepRow

__all__ = ["plot_sweep"]

_MARKERS = "osD^vP*X"


def plot_sweep(report: SweepReport) -> Figure:
    """The best metric of every run, means over the seeds with their standard deviation.

    Along the first axis of numbers but the seed, with a line for every combination of the others'
    values; bars where there is none, or where it is the seed alone that varies.

    Args:
        report: of a sweep, with at least one run that finished.

    Raises:
        ValueError: if none did.
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
        return _bars(rows, label)
    lines: dict[str, list[SweepRow]] = {}
    for row in rows:
        others = {name: value for name, value in row.values.items() if name != along}
        lines.setdefault(_name(others), []).append(row)
    figure = _new_figure(6.4, 3.8)
    axes = figure.subplots()
    for index, (name, line) in enumerate(lines.items()):
        line = sorted(line, key=lambda row: row.values[along])
        axes.errorbar(
            [row.values[along] for row in line],
            [row.best.mean for row in line if row.best is not None],
            yerr=[_deviation(row) for row in line],
            color=_CYCLE[index % len(_CYCLE)],
            marker=_MARKERS[index // len(_CYCLE) % len(_MARKERS)],
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
    _finish(axes, title="", x=along, y=label)
    return figure


def _bars(rows: list[SweepRow], label: str) -> Figure:
    names = [_name(row.values) or f"{row.runs} runs" for row in rows]
    figure = _new_figure(6.4, 0.8 + 0.42 * len(rows))
    axes = figure.subplots()
    means = [row.best.mean for row in rows if row.best is not None]
    bars = axes.barh(
        names, means, xerr=[_deviation(row) for row in rows], color=_CYCLE[0], height=0.62
    )
    axes.bar_label(bars, labels=[str(row.best) for row in rows], padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    _finish(axes, title="", x=label, y="")
    axes.grid(False)
    return figure


def _deviation(row: SweepRow) -> float:
    return 0.0 if row.best is None or row.best.deviation is None else row.best.deviation


def _name(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name.rsplit('.', 1)[-1]} {value if isinstance(value, str) else json.dumps(value)}"
        for name, value in values.items()
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
