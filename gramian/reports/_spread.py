"""Plot the state-sizes of layers over several texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gramian._drawing import BLUE, GREY, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gramian.analysis import StateReports

__all__ = ["plot_state_spread"]

_LABELS = 24  # the largest number of layers whose labels are shown


def plot_state_spread(reports: StateReports) -> Figure:
    """Plot the average ESS of each layer: each text as a point, their mean and standard deviation.

    Args:
        reports: Reports from `gramian.analysis.analyze_texts`.

    Raises:
        ValueError: if no layer was read in every text.
    """
    layers = reports.layers
    if not layers:
        raise ValueError(f"no layer of {reports.model} was read in every text.")
    place = np.arange(len(layers))
    figure = new_figure(min(12.0, max(5.0, 2.0 + 0.3 * len(layers))), 3.8)
    axes = figure.subplots()
    for index, layer in enumerate(layers):
        texts = [part.ess.double().mean() for part in reports.of_layer(layer.name)]
        axes.plot(np.full(len(texts), index), texts, ".", ms=3, color=GREY, alpha=0.6)
    middle = np.array([layer.average.mean for layer in layers])
    deviation = np.nan_to_num([layer.average.deviation for layer in layers])
    axes.errorbar(place, middle, yerr=deviation, fmt="o", ms=4, lw=1.3, capsize=2.5, color=BLUE)
    every = max(1, len(layers) // _LABELS)
    first = reports.reports[0]
    labels = dict(zip((layer.name for layer in first.layers), first.labels, strict=True))
    shown = [labels[layer.name] for layer in layers[::every]]
    axes.set_xticks(place[::every], shown, rotation=90, fontsize=7, parse_math=False)
    title = f"{reports.model}: average ESS over {len(reports)} texts, with standard deviations"
    finish(axes, title=title, x="layer", y=f"mean {first.measure} ESS")
    return figure
