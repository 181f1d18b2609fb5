"""Plot the modulation of models' states at delimiters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gramian._drawing import CYCLE, GREY, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gramian.analysis import ModulationReport

__all__ = ["plot_modulation"]

_MARKS = ("o", "s", "^", "D", "v", "P")


def plot_modulation(reports: Sequence[ModulationReport]) -> Figure:
    """Plot the ratio of ESS after delimiters to ESS nearby, for each kind and model.

    Bars are the bootstrap intervals over texts. The last column is the control: the same ratio at
    positions away from delimiters.

    Args:
        reports: A report for each model, from `gramian.analysis.measure_modulation`.

    Raises:
        ValueError: if there is no report.
    """
    if not reports:
        raise ValueError("plot_modulation was given no reports; give at least one.")
    kinds = list(dict.fromkeys(one.kind for report in reports for one in report.kinds))
    control = reports[0].control.kind
    places = {kind: column for column, kind in enumerate([*kinds, control])}
    figure = new_figure(max(5.0, 1.8 + 1.3 * len(places)), 3.8 + 0.2 * len(reports))
    axes = figure.subplots()
    axes.axhline(1.0, color=GREY, lw=1.0, ls="--")
    step = 0.6 / max(1, len(reports) - 1) if len(reports) > 1 else 0.0
    for number, report in enumerate(reports):
        shown = [one for one in (*report.kinds, report.control) if one.count]
        x = np.array([places[one.kind] for one in shown]) + number * step - 0.3 * (step > 0)
        middle = np.array([one.ratio for one in shown])
        ends = np.array([[one.low, one.high] for one in shown]).T  # (2, kinds)
        axes.errorbar(
            x,
            middle,
            yerr=np.abs(np.nan_to_num(ends - middle)),
            fmt=_MARKS[number % len(_MARKS)],
            ms=5,
            lw=1.4,
            capsize=3,
            color=CYCLE[number % len(CYCLE)],
            label=report.model.replace("$", r"\$"),
        )
    labels = [repr(kind)[1:-1].replace("$", r"\$") for kind in kinds]
    axes.set_xticks(list(places.values()), [*labels, control])
    axes.set_xlim(-0.6, len(places) - 0.4)
    figure.legend(loc="outside lower left", frameon=False, fontsize=8)
    first = reports[0]
    title = f"ESS after a delimiter, over ESS at up to {first.reach} positions on each side"
    finish(axes, title=title, x="kind of delimiters", y="ratio")
    return figure
