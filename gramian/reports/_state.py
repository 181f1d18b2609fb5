"""Plot the effective state-size (ESS) of every layer at each position of a text.

The rank of `T[i:L, :i]` is at most `min(i, L - i)`. This bound is called the cap. The cap binds at
a position if it is below the size of the state, so that the measure could not show a full state.
Figures of one model mark the positions where the cap binds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gramian._drawing import CYCLE, GREY, ORANGE, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gramian.analysis import StateReport

__all__ = [
    "plot_state_comparison",
    "plot_state_curves",
    "plot_state_map",
    "plot_utilization",
]

_TICKS = 40


def plot_state_map(report: StateReport) -> Figure:
    """Plot the mean ESS of every layer at every position as a map, layer × token.

    Cells are pale where the cap binds.

    Raises:
        ValueError: if the report has no measured layer.
    """
    curves = _curves(report)  # (layers, P)
    bound = _bound(report)
    layers, count = curves.shape
    width = min(16.0, max(5.0, 2.5 + 0.14 * count))
    figure = new_figure(width, 2.2 + 0.17 * layers)
    axes = figure.subplots()
    image = axes.imshow(curves, aspect="auto", origin="lower", interpolation="nearest")
    veil = np.zeros((*bound.shape, 4))
    veil[..., :3] = 1.0
    veil[..., 3] = 0.45 * bound
    axes.imshow(veil, aspect="auto", origin="lower", interpolation="nearest")
    figure.colorbar(image, ax=axes, label=f"mean {report.measure} ESS")
    _token_ticks(axes, report)
    every = max(1, layers // 24)
    axes.set_yticks(np.arange(0, layers, every), report.labels[::every], fontsize=7)
    finish(
        axes,
        title=f"{report.model}: effective state-size before each token; pale where the cap binds",
        x="token",
        y="layer",
    )
    axes.grid(False)
    return figure


def plot_state_curves(report: StateReport) -> Figure:
    """Plot the mean ESS of each layer against position, with the average over layers and the cap.

    The curve of the first layer is the darkest, and the curve of the last layer is the brightest.
    Curves are hollow where the cap binds.

    Raises:
        ValueError: if the report has no measured layer.
    """
    from matplotlib import colormaps

    curves, positions, bound = _curves(report), np.array(report.positions), _bound(report)
    order = np.argsort(positions)
    figure = new_figure(8.0, 3.8)
    axes = figure.subplots()
    shades = colormaps["viridis"](np.linspace(0, 0.92, len(curves)))
    for curve, limited, shade, name in zip(curves, bound, shades, report.labels, strict=True):
        axes.plot(
            positions[order], curve[order], color=shade, lw=0.9, alpha=0.8, label=f"layer {name}"
        )
        axes.plot(
            positions[order],
            np.where(limited, curve, np.nan)[order],
            color="white",
            lw=0.5,
        )
    average = report.average(over_positions=False).numpy()
    axes.plot(positions[order], average[order], color=ORANGE, lw=2.2, label="average")
    top = 1.08 * float(max(curves.max(), average.max(), 1e-9))
    cap = report.cap.numpy()[order].astype(float)
    axes.plot(positions[order], cap, color=GREY, lw=1, ls="--", label="cap min(i, L − i)")
    axes.set_ylim(0, top)
    handles, labels = axes.get_legend_handles_labels()
    shown = [0, len(curves) - 1, len(curves), len(curves) + 1]
    kept = list(dict.fromkeys(shown))
    axes.legend([handles[i] for i in kept], [labels[i] for i in kept], frameon=False, fontsize=7)
    finish(
        axes,
        title=f"{report.model}: each layer; hollow where the cap binds",
        x=f"position i of {report.horizon:,}",
        y=f"mean {report.measure} ESS",
    )
    return figure


def plot_utilization(report: StateReport) -> Figure:
    """Plot the share of each layer's state that is in use, ESS / TSS, as horizontal bars.

    A bar shows the mean share over the heads or channels of a layer, and a line goes from their
    minimum to their maximum. A share is a mean over the positions where the cap does not bind. If
    the cap binds at all positions of a layer, the share is a mean over all positions, and the bar
    is pale.

    Raises:
        ValueError: if the report has no measured layer.
    """
    _check(report)
    figure = new_figure(6.4, 1.0 + 0.22 * len(report.layers))
    axes = figure.subplots()
    for row, (layer, bound) in enumerate(zip(report.layers, _bound(report), strict=True)):
        free = ~bound & (layer.tss.numpy() > 0).all(0)
        chosen = free if free.any() else np.array(report.positions) > 0
        shares = layer.utilization.numpy()[:, chosen]
        heads = 100 * (shares.mean(1) if shares.size else np.zeros(len(shares)))
        axes.barh(
            row,
            heads.mean(),
            color=CYCLE[0],
            alpha=1.0 if free.any() else 0.35,
            height=0.7,
        )
        axes.plot([heads.min(), heads.max()], [row, row], color=ORANGE, lw=1.4)
    axes.set_yticks(np.arange(len(report.layers)), report.labels, fontsize=7)
    axes.invert_yaxis()
    finish(
        axes,
        title=f"{report.model}: state in use; line: least to most of a layer's heads",
        x="ESS / TSS (%), where the cap does not bind",
        y="layer",
    )
    return figure


def plot_state_comparison(reports: Mapping[str, StateReport]) -> Figure:
    """Plot the ESS of several models on one text: the average per head or channel, and the total.

    If the models read different numbers of tokens, positions are shown as fractions of the text.

    Args:
        reports: a mapping from the name of each model to its report.

    Raises:
        ValueError: if there are no reports, or a report has no measured layer.
    """
    if not reports:
        raise ValueError("plot_state_comparison was given no reports; give at least one.")
    shares = len({report.horizon for report in reports.values()}) > 1
    figure = new_figure(10.0, 3.6)
    panels = figure.subplots(1, 2)
    for index, (name, report) in enumerate(reports.items()):
        _check(report)
        positions = np.array(report.positions, dtype=float)
        order = np.argsort(positions)
        x = positions[order] / (report.horizon if shares else 1)
        for axes, sizes in zip(
            panels,
            (report.average(over_positions=False), report.total(over_positions=False)),
            strict=True,
        ):
            axes.plot(
                x,
                sizes.numpy()[order],
                color=CYCLE[index % len(CYCLE)],
                ls=("-", "--", ":")[index // len(CYCLE) % 3],
                lw=1.6,
                label=name,
            )
    for axes, title in zip(
        panels, ("average of a head or channel", "total of all that were measured"), strict=True
    ):
        axes.legend(frameon=False, fontsize=8)
        finish(axes, title=title, x="share of the text" if shares else "position i", y="ESS")
    return figure


def _check(report: StateReport) -> None:
    if not report.layers:
        raise ValueError(f"there is nothing to draw: no layer of {report.model} was read.")


def _curves(report: StateReport) -> np.ndarray:
    _check(report)
    return report.layer_curves().numpy()


def _bound(report: StateReport) -> np.ndarray:
    """Return for every layer and position whether the cap binds, (layers, positions)."""
    cap = report.cap.numpy()
    return np.stack([cap < layer.tss.numpy().mean(0) for layer in report.layers])


def _token_ticks(axes: Any, report: StateReport) -> None:
    every = max(1, -(-len(report.positions) // _TICKS))
    shown = range(0, len(report.positions), every)
    labels = []
    for column in shown:
        position = report.positions[column]
        token = " ".join(report.tokens[position].split()) or repr(report.tokens[position])[1:-1]
        labels.append(token[:12].replace("$", r"\$"))
    axes.set_xticks(list(shown), labels, rotation=90, fontsize=6)
