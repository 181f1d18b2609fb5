"""Plot what `gramian.shrink` did to the states of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gramian._drawing import BLUE, GREEN, GREY, ORANGE, finish, head, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gramian.shrinking import ShrinkReport

__all__ = ["plot_shrinkage"]


def plot_shrinkage(report: ShrinkReport, title: str = "") -> Figure:
    """Plot the outcome of shrinking in three panels.

    The first panel shows the predicted error of each layer against the share of its states that is
    kept. The second panel shows the errors of each layer in the smaller model, and the third its
    numbers of states before and after.

    Args:
        report: a report from `gramian.shrink`.
        title: title of the whole figure, such as the model's folder.
    """
    figure = new_figure(11.4, 3.5)
    panels = figure.subplots(1, 3)
    layers = report.layers
    for layer, shade in zip(layers, np.linspace(0.25, 1.0, len(layers)), strict=True):
        spectrum = np.asarray(layer.spectrum, dtype=float)
        share = np.arange(1, len(spectrum) + 1) / len(spectrum)
        seen = spectrum > 0  # the error of all states is 0, which a logarithmic axis cannot show
        panels[0].semilogy(share[seen], spectrum[seen], color=BLUE, alpha=shade, lw=1.2)
        if layer.states_after < layer.states_before and layer.predicted_error > 0:
            at = layer.states_after / layer.states_before
            panels[0].plot(at, layer.predicted_error, "o", ms=4, color=ORANGE, alpha=shade)
    positions = np.arange(len(layers))
    for values, color, label in (
        ([layer.predicted_error for layer in layers], BLUE, "scan, predicted"),
        ([layer.measured_error for layer in layers], ORANGE, "scan, measured"),
        ([layer.output_error for layer in layers], GREEN, "layer's output"),
    ):
        panels[1].plot(positions, values, "o-", ms=4, lw=1.4, color=color, label=label)
    for states, color, label in (
        ([layer.states_before for layer in layers], GREY, "before"),
        ([layer.states_after for layer in layers], GREEN, "after"),
    ):
        panels[2].plot(positions, states, "o-", ms=4, lw=1.4, color=color, label=label)
    panels[2].set_ylim(bottom=0)
    for axes in panels[1:]:
        every = max(1, len(layers) // 12)
        axes.set_xticks(positions[::every], positions[::every])
        axes.legend(frameon=False, fontsize=7)
    finish(panels[0], title="predicted error", x="share of the states kept", y="relative error")
    finish(panels[1], title="relative errors", x="recurrence", y="")
    finish(panels[2], title="states of a group", x="recurrence", y="")
    if title:
        head(figure, title)
    return figure
