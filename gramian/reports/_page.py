"""Make an interactive HTML page of state-size reports. It works offline and loads no other file.

The page is the template beside this file, with the reports embedded as JSON. The page draws on two
canvases and uses no library.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gramian._json import to_json
from gramian._staging import staged_file

if TYPE_CHECKING:
    from gramian.analysis import StateReport

__all__ = ["save_state_page", "state_page"]


def state_page(reports: StateReport | Sequence[StateReport]) -> str:
    """Return a self-contained HTML page of reports on effective state-size.

    The page shows heat maps of all layers and of one layer's heads, curves with the largest
    possible rank (the cap), and the text. The page also shows the token, layer, head and values
    under the pointer.

    Args:
        reports: one report, or several reports. The reader of the page can choose one of them.

    Raises:
        ValueError: if there are no reports, or a report has no measured layer.
    """
    several = list(reports) if isinstance(reports, Sequence) else [reports]
    if not several:
        raise ValueError("state_page was given no reports; give at least one.")
    for report in several:
        if not report.layers:
            raise ValueError(f"there is nothing to show: no layer of {report.model} was read.")
    data = to_json([_data(report) for report in several], ensure_ascii=True)
    # A script element ends at the first "</", even within a string.
    data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    title = html.escape(", ".join(report.model for report in several))
    template = files("gramian.reports").joinpath("state_page.html").read_text(encoding="utf-8")
    return template.replace("@@TITLE@@", title).replace("@@DATA@@", data)


def save_state_page(reports: StateReport | Sequence[StateReport], path: str | Path) -> Path:
    """Write the page of `state_page` to a file, completely or not at all, and return its path."""
    path = Path(path)
    page = state_page(reports)
    with staged_file(path) as stage:
        stage.write_text(page, encoding="utf-8")
    return path


def _data(report: StateReport) -> dict[str, Any]:
    order = sorted(range(len(report.positions)), key=lambda c: report.positions[c])
    return {
        "model": report.model,
        "measure": report.measure,
        "horizon": report.horizon,
        "positions": [report.positions[c] for c in order],
        "tokens": list(report.tokens),
        "unread": [list(pair) for pair in report.unread],
        "layers": [
            {
                "name": layer.name,
                "mixer": layer.mixer,
                "channels": list(layer.channels),
                "count": layer.count,
                "ess": _rounded(layer.ess[:, order]),
                "tss": _rounded(layer.tss[:, order]),
            }
            for layer in report.layers
        ],
    }


def _rounded(values: Any) -> list[list[float]]:
    return [[round(value, 3) for value in row] for row in values.tolist()]
