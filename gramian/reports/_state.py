"""Plot the effective state-size (ESS) of every layer at each position of a text.

The rank of `T[i:L, :i]` is at most `min(i, L - i)`. This bound is called the cap. It rises and
falls over the text, and ESS with it. So maps show changes against neighboring positions by default.
The cap binds at a position if it is below the size of the state, so that the measure could not show
a full state. Figures of ESS mark the positions where the cap binds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gramian._drawing import CYCLE, GREY, ORANGE, finish, head, new_figure, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gramian.analysis import StateComparison, StateReport

__all__ = [
    "plot_depth_comparison",
    "plot_state_comparison",
    "plot_state_curves",
    "plot_state_map",
    "plot_utilization",
]

_TICKS = 40
_REACH = 8  # positions on each side with which a position is compared
_EDGE = 8  # usable states below which a share says little: they do not set the scale of colors
_STYLES = ("-", "--", ":")


def plot_state_map(report: StateReport, value: str | None = None) -> Figure:
    """Plot every layer at every position as a map, layer × token, with means over heads.

    Args:
        report: The report.
        value: "change" for ESS divided by its mean at the 8 nearest measured positions on each
            side, whose colors show the text; fewer near the ends, but as many on either side.
            "in_use" for the share of the usable state, min(TSS, i, L - i), on a logarithmic scale.
            Shares of less than 8 states are near 1 for any text, so they do not set the scale.
            "ess" for ESS itself, with pale cells where the cap binds. By default "change", or
            "in_use" if fewer than 8 positions were measured.

    Raises:
        ValueError: if the report has no measured layer, or the value is none of these.
    """
    if value not in (None, *_MAPS):
        raise ValueError(f"value must be one of {', '.join(_MAPS)} or None; got {value!r}.")
    report = _main(report)
    value = value or ("change" if len(report.positions) >= _REACH else "in_use")
    order = np.argsort(report.positions)
    layers, count = len(report.layers), len(order)
    figure = new_figure(min(16.0, max(6.0, 2.5 + 0.14 * count)), 2.6 + 0.17 * layers)
    axes = figure.subplots()
    title = _MAPS[value](figure, axes, report, order)
    _token_ticks(axes, report, order)
    every = max(1, layers // 24)
    axes.set_yticks(np.arange(0, layers, every), report.labels[::every], fontsize=7)
    head(figure, report.model)
    finish(axes, title=title, x="token", y="layer")
    axes.grid(False)
    return figure


def _map_of_changes(figure: Figure, axes: Any, report: StateReport, order: np.ndarray) -> str:
    """Draw ESS relative to its neighbors, and return the title."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    ratios = _changes(_curves(report)[:, order])
    sizes = np.abs(np.log(ratios[np.isfinite(ratios) & (ratios > 0)]))
    most = float(np.exp(max(np.quantile(sizes, 0.98) if sizes.size else 0.0, np.log(1.05))))
    norm = LogNorm(1 / most, most)
    image = axes.imshow(ratios, norm=norm, cmap="RdBu_r", **_CELLS)
    bar = figure.colorbar(image, ax=axes, label="ESS / ESS nearby", extend="both")
    bar.set_ticks([1 / most, most**-0.5, 1, most**0.5, most])
    bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:.2f}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return f"effective state-size before each token, relative to {_REACH} positions on each side"


def _map_of_shares(figure: Figure, axes: Any, report: StateReport, order: np.ndarray) -> str:
    """Draw the share in use, and return the title."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    shares = 100 * report.utilization_curves().numpy()[:, order]
    usable = np.stack([layer.usable.numpy().mean(0) for layer in report.layers])[:, order]
    known = shares > 0
    chosen = shares[known & (usable >= _EDGE)]
    chosen = chosen if chosen.size else shares[known]
    low, high = (chosen.min(), chosen.max()) if chosen.size else (1.0, 100.0)
    if high < 1.02 * low:  # a scale needs two ends
        low, high = low / 1.02, high * 1.02
    image = axes.imshow(shares, norm=LogNorm(low, high, clip=True), **_CELLS)
    bar = figure.colorbar(image, ax=axes, label="mean share in use (%)", extend="both")
    bar.set_ticks(list(np.geomspace(low, high, 5)))
    bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:.1f}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return "share of the usable state in use, before each token"


def _map_of_sizes(figure: Figure, axes: Any, report: StateReport, order: np.ndarray) -> str:
    """Draw ESS with a veil where the cap binds, and return the title."""
    curves = _curves(report)[:, order]
    image = axes.imshow(curves, **_CELLS)
    veil = np.zeros((*curves.shape, 4))
    veil[..., :3] = 1.0
    veil[..., 3] = 0.45 * _bound(report)[:, order]
    axes.imshow(veil, **_CELLS)
    figure.colorbar(image, ax=axes, label=f"mean {report.measure} ESS")
    return "effective state-size before each token; pale where the cap binds"


_CELLS: dict[str, Any] = {"aspect": "auto", "origin": "lower", "interpolation": "nearest"}
_MAPS: dict[str, Callable[..., str]] = {
    "change": _map_of_changes,
    "in_use": _map_of_shares,
    "ess": _map_of_sizes,
}


def plot_state_curves(report: StateReport) -> Figure:
    """Plot the mean ESS of each layer against position, with the average over layers and the cap.

    The curve of the first layer is the darkest, and the curve of the last layer is the brightest.
    Curves are hollow where the cap binds.

    Raises:
        ValueError: if the report has no measured layer.
    """
    report = _main(report)
    curves, positions, bound = _curves(report), np.array(report.positions), _bound(report)
    order = np.argsort(positions)
    figure = new_figure(9.4, 4.0)
    from matplotlib import colormaps  # after `new_figure`, which says what is missing

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
    axes.legend(
        [handles[i] for i in kept],
        [wrapped(labels[i], 8, 1.6).replace("$", r"\$") for i in kept],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),  # beside the panel, where it lies over no line
        frameon=False,
        fontsize=8,
    )
    head(figure, report.model)
    finish(
        axes,
        title="each layer; hollow where the cap binds",
        x=f"position i of {report.horizon:,}",
        y=f"mean {report.measure} ESS",
    )
    return figure


def plot_utilization(report: StateReport) -> Figure:
    """Plot the share of each layer's usable state that is in use, as horizontal bars.

    A bar is `LayerState.in_use`: the mean of ESS / min(TSS, i, L - i) over heads or channels and
    positions. A line goes from the head or channel with the smallest mean to the one with the
    largest.

    Raises:
        ValueError: if the report has no measured layer.
    """
    report = _main(report)
    figure = new_figure(6.4, 1.2 + 0.22 * len(report.layers))
    axes = figure.subplots()
    for row, layer in enumerate(report.layers):
        axes.barh(row, 100 * (layer.in_use or 0.0), color=CYCLE[0], height=0.7)
        usable = layer.usable.numpy() > 0
        shares = np.where(usable, layer.utilization.numpy(), 0).sum(1)[usable.any(1)]
        heads = 100 * shares / usable.sum(1)[usable.any(1)]
        if len(heads):
            axes.plot([heads.min(), heads.max()], [row, row], color=ORANGE, lw=1.4)
    axes.set_yticks(np.arange(len(report.layers)), report.labels, fontsize=7)
    axes.invert_yaxis()
    head(figure, report.model)
    finish(
        axes,
        title="state in use; line: least to most of a layer's heads or channels",
        x="ESS / min(TSS, i, L − i), mean (%)",
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
    figure = new_figure(10.0, 3.6 + 0.2 * len(reports))
    panels = figure.subplots(1, 2)
    for index, (name, report) in enumerate(reports.items()):
        _main(report)
        positions = np.array(report.positions, dtype=float)
        order = np.argsort(positions)
        x = positions[order] / (report.horizon if shares else 1)
        for axes, sizes in zip(
            panels,
            (report.average(over_positions=False), report.total(over_positions=False)),
            strict=True,
        ):
            axes.plot(x, sizes.numpy()[order], **_line(index, name))
    _legend(figure, *panels[0].get_legend_handles_labels())
    for axes, title in zip(
        panels, ("average of a head or channel", "total of all that were measured"), strict=True
    ):
        finish(axes, title=title, x="share of the text" if shares else "position i", y="ESS")
    return figure


def plot_depth_comparison(comparison: StateComparison) -> Figure:
    """Plot the average ESS and the share in use of each layer against relative depth.

    Layer l of n covers the depths from l / n to (l + 1) / n, so that models of different depths
    have the same axis. A layer that was not measured is a gap.

    Args:
        comparison: a comparison from `gramian.analysis.compare_reports`.
    """
    figure = new_figure(10.0, 3.6 + 0.2 * len(comparison.names))
    panels = figure.subplots(1, 2)
    for index, name in enumerate(comparison.names):
        for axes, values, scale in (
            (panels[0], comparison.ess[index], 1),
            (panels[1], comparison.in_use[index], 100),
        ):
            heights = scale * values.numpy()
            edges = np.linspace(0, 100, len(heights) + 1)
            axes.step(edges, np.append(heights, heights[-1]), where="post", **_line(index, name))
    _legend(figure, *panels[0].get_legend_handles_labels())
    for axes, title, label in (
        (panels[0], "average ESS of a head or channel", f"mean {comparison.measure} ESS"),
        (panels[1], "share of the usable state in use", "in use (%)"),
    ):
        axes.set_xlim(0, 100)
        axes.set_ylim(bottom=0)
        finish(axes, title=title, x="relative depth (%)", y=label)
    return figure


def _line(index: int, name: str) -> dict[str, Any]:
    """Return the style of a model's line."""
    style = _STYLES[index // len(CYCLE) % len(_STYLES)]
    return {"color": CYCLE[index % len(CYCLE)], "ls": style, "lw": 1.6, "label": name}


def _legend(figure: Figure, handles: Any, labels: Any) -> None:
    """Put a legend of models below the panels, where it lies over no line."""
    room = figure.get_figwidth() - 0.8
    shown = [wrapped(label, 8, room).replace("$", r"\$") for label in labels]
    figure.legend(handles, shown, loc="outside lower left", frameon=False, fontsize=8)


def _main(report: StateReport) -> StateReport:
    """Return the report without auxiliary layers. Raise an error if no layer was read."""
    if not report.layers:
        raise ValueError(f"there is nothing to draw: no layer of {report.model} was read.")
    return report.main


def _curves(report: StateReport) -> np.ndarray:
    return report.layer_curves().numpy()


def _changes(curves: np.ndarray) -> np.ndarray:
    """Return sizes (layers, P) divided by their means nearby; NaN at the first and last position.

    Both sides have equally many positions, so that a linear trend gives 1.
    """
    count = curves.shape[1]
    found = np.full_like(curves, np.nan)
    for p in range(1, count - 1):
        reach = min(_REACH, p, count - 1 - p)
        around = np.concatenate(
            [curves[:, p - reach : p], curves[:, p + 1 : p + 1 + reach]], axis=1
        ).mean(1)
        found[:, p] = np.divide(
            curves[:, p], around, out=np.full_like(around, np.nan), where=around > 0
        )
    return found


def _bound(report: StateReport) -> np.ndarray:
    """Return for every layer and position whether the cap binds, (layers, positions)."""
    cap = report.cap.numpy()
    return np.stack([cap < layer.tss.numpy().mean(0) for layer in report.layers])


def _token_ticks(axes: Any, report: StateReport, order: np.ndarray) -> None:
    every = max(1, -(-len(order) // _TICKS))
    shown = range(0, len(order), every)
    labels = []
    for column in shown:
        position = report.positions[order[column]]
        token = " ".join(report.tokens[position].split()) or repr(report.tokens[position])[1:-1]
        labels.append(token[:12].replace("$", r"\$"))
    axes.set_xticks(list(shown), labels, rotation=90, fontsize=6)
