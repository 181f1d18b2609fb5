"""Print a report as a table, as text or for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from gramian.analysis._report import LayerState, StateReport

__all__ = ["as_table", "as_text"]

_COLUMNS = ("layer", "mixer", "heads or channels", "ESS mean", "ESS max", "usable mean", "in use")
_RANKS = ("stable rank", "effective rank")  # of states, if they were measured
_TEXTS = 2  # the first columns, whose cells are names


def as_text(report: StateReport) -> str:
    """Return the report as lines with tabs, and its summary."""
    ranked = _ranked(report)
    lines = ["\t".join([*_COLUMNS, *_RANKS[: 2 * ranked]])]
    lines += ["\t".join(_row(layer, layer.name, ranked)) for layer in report.layers]
    return "\n".join([*lines, _summary(report)])


def as_table(report: StateReport) -> Table:
    """Return the report as a table of rich. Long names are wrapped, and nothing is cut."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    ranked = _ranked(report)
    labelled = zip(report.layers, report.labels, strict=True)
    rows = [_row(layer, label, ranked) for layer, label in labelled]
    table = Table(
        title=report.model,
        caption=_summary(report),
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for index, name in enumerate([*_COLUMNS, *_RANKS[: 2 * ranked]]):
        if index < _TEXTS:
            table.add_column(name, overflow="fold")
        else:  # headings may be wrapped, but numbers may not
            width = max([*map(len, name.split()), *(len(row[index]) for row in rows)])
            table.add_column(name, justify="right", width=width)
    for row in rows:
        table.add_row(*row)
    return table


def _summary(report: StateReport) -> str:
    source = f" of {report.source}" if report.source else ""
    lines = [
        f"{report.measure} ESS at {len(report.positions):,} positions of {report.horizon:,} tokens"
        f"{source}, {report.seconds:.1f} s"
    ]
    if report.layers:
        average, total, share = float(report.average()), float(report.total()), report.in_use
        lines[0] += f": average {average:.2f}, total {total:.1f}"
        lines[0] += "" if share is None else f", {100 * share:.1f} % in use"
    if any(layer.mean_error is not None for layer in report.layers):
        lines.append("± is the error of a mean that is estimated; single sizes have larger errors")
    lines += [f"not read: {name}: {reason}" for name, reason in report.unread]
    return "\n".join(lines)


def _ranked(report: StateReport) -> bool:
    """Return whether the rank of a state was measured."""
    return any(layer.stable_rank is not None for layer in report.layers)


def _row(layer: LayerState, label: str, ranked: bool) -> tuple[str, ...]:
    """Return the cells of a layer in the order of `_COLUMNS` and, if wanted, `_RANKS`."""
    ranks = [layer.stable_rank, layer.effective_rank] if ranked else []
    counted = len(layer.channels)
    measured = f"{counted:,}" if counted == layer.count else f"{counted:,} of {layer.count:,}"
    share = layer.in_use
    error = "" if layer.mean_error is None else f" ± {layer.mean_error:.2f}"
    return (
        label,
        layer.mixer,
        measured,
        f"{float(layer.ess.mean()):.2f}{error}",
        f"{float(layer.ess.max()):.2f}",
        f"{float(layer.usable.mean()):.1f}",
        "" if share is None else f"{100 * share:.1f} %",
        *("" if rank is None else f"{float(rank.mean()):.2f}" for rank in ranks),
    )
