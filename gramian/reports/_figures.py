"""Plot Hankel spectra, the outcome of distillation, bits per byte and the cost of decoding."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gramian._drawing import BLUE, CYCLE, GREEN, GREY, ORANGE, finish, head, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gramian.distillation import DistillationReport

__all__ = [
    "plot_bits_per_byte",
    "plot_decoding_cost",
    "plot_distillation",
    "plot_hankel_spectra",
]


def plot_hankel_spectra(
    spectra: Mapping[str, Any], orders: Mapping[str, Sequence[int]] | None = None
) -> Figure:
    """Plot the Hankel singular values of groups of filters, with one panel for each group.

    The values of a filter are shown relative to its largest value.

    Args:
        spectra: a mapping from the names of the groups, such as layers, to the singular values of
            their filters, (filters, values), in descending order in each row.
        orders: a mapping from the names of the groups to the orders of their reduced filters. The
            mean order is marked. If it is None, nothing is marked.

    Raises:
        ValueError: if there is no group.
    """
    if not spectra:
        raise ValueError("plot_hankel_spectra was given no spectra; give at least one group.")
    figure = new_figure(3.1 * len(spectra) + 0.6, 3.2)
    panels = figure.subplots(1, len(spectra), sharey=True, squeeze=False)[0]
    for axes, (name, values) in zip(panels, spectra.items(), strict=True):
        rows = np.asarray(values, dtype=float)  # (filters, values)
        largest = rows[:, :1]
        relative = np.divide(rows, largest, out=np.zeros_like(rows), where=largest > 0)
        visible = np.where(relative > 1e-9, relative, np.nan)
        axes.semilogy(np.arange(1, rows.shape[1] + 1), visible.T, color=BLUE, alpha=0.45, lw=0.9)
        if orders is not None and len(orders[name]):
            mean = float(np.mean(orders[name]))
            axes.axvline(mean, color=ORANGE, lw=1.2)
            axes.annotate(
                f"mean order {mean:.1f}",
                (mean, 1.0),
                xytext=(4, -2),
                textcoords="offset points",
                color=ORANGE,
                fontsize=8,
            )
        finish(axes, title=name, x="index k", y=r"$\sigma_k / \sigma_1$")
        axes.label_outer()
    return figure


def plot_distillation(report: DistillationReport, title: str = "") -> Figure:
    """Plot the outcome of distillation in three panels.

    The first panel shows the median Hankel spectrum of each layer. The second panel shows the
    relative l2 errors of each layer's filters, with the lower bounds for recurrences of the same
    orders. The third panel shows the orders.

    Args:
        report: a report from `gramian.distill`.
        title: title of the whole figure, such as the model's folder.
    """
    figure = new_figure(11.4, 3.5)
    panels = figure.subplots(1, 3)
    layers = report.layers
    shades = np.linspace(0.25, 1.0, len(layers))
    for layer, shade in zip(layers, shades, strict=True):
        count = max((len(row) for row in layer.hankel_singular_values), default=0)
        rows = np.full((len(layer.hankel_singular_values), count), np.nan)
        for row, values in zip(rows, layer.hankel_singular_values, strict=True):
            if values and values[0] > 0:
                row[: len(values)] = np.maximum(values, 0) / values[0]
        known = ~np.isnan(rows).all(0)
        rows = np.where(rows > 1e-9, rows, np.nan)[:, known]
        if rows.size and not np.isnan(rows).all():
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                median = np.nanmedian(rows, axis=0)
            panels[0].semilogy(np.arange(1, len(median) + 1), median, color=BLUE, alpha=shade)
    positions = np.arange(len(layers))
    errors = [np.asarray(layer.relative_errors) for layer in layers]
    bounds = [np.asarray(layer.lower_bounds) for layer in layers]
    orders = [np.asarray(layer.orders) for layer in layers]
    for axes, series, color, label in (
        (panels[1], errors, BLUE, "error"),
        (panels[1], bounds, GREY, "lower bound"),
        (panels[2], orders, GREEN, "order"),
    ):
        middle = np.array([values.mean() for values in series], dtype=float)
        low = np.array([values.min() for values in series], dtype=float)
        high = np.array([values.max() for values in series], dtype=float)
        axes.plot(positions, middle, "o-", ms=4, lw=1.4, color=color, label=f"{label}, mean")
        axes.fill_between(positions, low, high, color=color, alpha=0.18, lw=0, label="least, most")
    if any(values.max() > 0 for values in errors):
        panels[1].set_yscale("log")
    if report.tol is not None:
        panels[1].axhline(report.tol, color=ORANGE, lw=1.2, label="tolerance")
    names = [str(layer.layer) for layer in layers]
    for axes in panels[1:]:
        every = max(1, len(names) // 12)
        axes.set_xticks(positions[::every], names[::every])
        axes.legend(frameon=False, fontsize=7)
    finish(
        panels[0],
        title="Hankel spectra, median of each layer",
        x="index k",
        y=r"$\sigma_k / \sigma_1$",
    )
    finish(panels[1], title="relative l2 error", x="layer", y="")
    finish(panels[2], title="order of the recurrences", x="layer", y="")
    if title:
        head(figure, title)
    return figure


def plot_bits_per_byte(values: Mapping[str, float]) -> Figure:
    """Plot the bits per byte of models as horizontal bars, in the given order.

    Args:
        values: a mapping from the name of each model to its bits per byte.

    Raises:
        ValueError: if there are no values.
    """
    if not values:
        raise ValueError("plot_bits_per_byte was given no values; give at least one.")
    figure = new_figure(6.4, 0.55 + 0.42 * len(values))
    axes = figure.subplots()
    names = list(values)
    bars = axes.barh(names, [values[name] for name in names], color=BLUE, height=0.62)
    axes.bar_label(bars, labels=[f"{values[name]:.4f}" for name in names], padding=4, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    finish(axes, title="", x="bits per held-out byte (less is better)", y="")
    axes.grid(False)
    return figure


def plot_decoding_cost(
    milliseconds: Mapping[str, Mapping[int, float]], state_bytes: Mapping[str, Mapping[int, float]]
) -> Figure:
    """Plot the time per generated token and the size of the state against the context length.

    Args:
        milliseconds: for each method of generation, a mapping from the context length in tokens to
            the time per token in milliseconds.
        state_bytes: for each method of generation, a mapping from the context length in tokens to
            the size in bytes of the state that is carried from token to token.

    Raises:
        ValueError: if one of the arguments is empty.
    """
    if not milliseconds or not state_bytes:
        raise ValueError("plot_decoding_cost needs at least one curve of times and one of bytes.")
    figure = new_figure(9.2, 3.5)
    names = list(dict.fromkeys([*milliseconds, *state_bytes]))
    colors = {name: CYCLE[i % len(CYCLE)] for i, name in enumerate(names)}
    panels = figure.subplots(1, 2)
    for axes, curves, unit in (
        (panels[0], milliseconds, 1.0),
        (panels[1], state_bytes, 2.0**20),
    ):
        for name, curve in curves.items():
            contexts = sorted(curve)
            axes.loglog(
                contexts,
                [curve[context] / unit for context in contexts],
                marker="o",
                ms=4,
                lw=1.6,
                color=colors[name],
                label=name,
            )
        ticks = sorted({context for curve in curves.values() for context in curve})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8)
    finish(panels[0], title="time per token", x="context (tokens)", y="milliseconds")
    finish(panels[1], title="carried state", x="context (tokens)", y="MiB")
    return figure
