"""Make an interactive HTML page of state-size reports. It works offline and loads no other file.

The page is the template beside this file, with the reports embedded as JSON. The page draws on
canvases and uses no library. State-sizes are embedded as 16-bit integers in base64, in units of
their own for each head: an ESS is within 1 / 131070 of the largest ESS of its head. So a page of 30
layers with 9 heads at 1,024 positions takes about 1 MB.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gramian._json import to_json
from gramian._staging import staged_file

if TYPE_CHECKING:
    from torch import Tensor

    from gramian.analysis import LayerState, StateReport

__all__ = ["save_state_page", "state_page"]

_STEPS = 65535  # the largest 16-bit integer


def state_page(reports: StateReport | Sequence[StateReport]) -> str:
    """Return a self-contained HTML page of reports on effective state-size.

    The page shows heat maps of all layers and of one layer's heads with their scales of colors,
    curves with the largest possible rank (the cap), the text, and the layers by the share of their
    state in use with suggestions. Colors show ESS relative to the positions nearby, the share in
    use, or ESS. The page also shows the token, layer, head and values under the pointer.

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
    data = to_json([_data(report) for report in several], ensure_ascii=True, separators=(",", ":"))
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
    place = {layer.name: index for index, layer in enumerate(report.layers)}
    return {
        "model": report.model,
        "source": report.source,
        "measure": report.measure,
        "include": report.include,
        "horizon": report.horizon,
        "in_use": report.in_use,
        "positions": [report.positions[c] for c in order],
        "tokens": list(report.tokens),
        "unread": [list(pair) for pair in report.unread],
        "layers": [
            _layer(layer, label, order)
            for layer, label in zip(report.layers, report.labels, strict=True)
        ],
        "ranking": [
            {"layer": place[one.name], "in_use": one.in_use, "suggestion": one.suggestion}
            for one in report.ranking()
        ],
    }


def _layer(layer: LayerState, label: str, order: list[int]) -> dict[str, Any]:
    tss = layer.tss[:, order]
    rows, index = tss.unique(dim=0, return_inverse=True)
    return {
        "name": layer.name,
        "label": label,
        "mixer": layer.mixer,
        "channels": list(layer.channels),
        "count": layer.count,
        "in_use": layer.in_use,
        "ess": _packed(layer.ess[:, order]),
        "tss": _packed(rows),
        "tss_row": index.tolist(),
        "error": None if layer.error is None else _packed(layer.error[:, order]),
    }


def _packed(values: Tensor) -> dict[str, Any]:
    """Return rows as 16-bit integers in base64, with the unit of each row.

    Rows of small whole numbers, such as the sizes of states, are exact.
    """
    rows = values.double().nan_to_num().numpy()
    whole = (rows == rows.round()).all(1) & (rows.max(1) <= _STEPS)
    units = np.where(whole, 1.0, np.maximum(rows.max(1), 1e-30) / _STEPS)
    steps = (rows / units[:, None]).round().clip(0, _STEPS).astype("<u2")
    return {
        "units": [float(f"{unit:.9g}") for unit in units],
        "data": base64.b64encode(steps.tobytes()).decode("ascii"),
    }
