"""Provide the colors and the style of all figures, and write figures to files."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gramian._staging import staged_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "CYCLE",
    "GREEN",
    "GREY",
    "ORANGE",
    "finish",
    "head",
    "new_figure",
    "save_figure",
    "wrapped",
]

# Colors that people with any kind of color vision can distinguish (Okabe and Ito).
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
CYCLE = (BLUE, ORANGE, GREEN, GREY)

_MARGIN = 0.35  # inches of a figure or panel that a title leaves free
_HINTING = 1.05  # how much wider letters may be where they are moved to whole pixels
_LABELS = 0.6  # inches of a panel beside its axes, for the labels of ticks


def new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'figures need matplotlib: pip install "gramian[plots]".', name="matplotlib"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def finish(axes: Any, *, title: str, x: str, y: str) -> None:
    """Label a panel. A long title is wrapped at the width of the panel."""
    figure = axes.get_figure()
    width = figure.get_figwidth() / axes.get_subplotspec().get_gridspec().ncols
    shown = wrapped(title, 10, width - _LABELS - _MARGIN)
    axes.set_title(shown, fontsize=10, loc="left", parse_math=False)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, alpha=0.25, linewidth=0.5)


def head(figure: Figure, title: str) -> None:
    """Put a title over a whole figure. A long title, such as a path, is wrapped and never cut.

    The figure grows by the height of the second and later lines.
    """
    shown = wrapped(title, 9, figure.get_figwidth() - _MARGIN)
    figure.set_figheight(figure.get_figheight() + 9 * 1.2 / 72 * shown.count("\n"))
    figure.suptitle(shown, fontsize=9, color=GREY, x=0.01, ha="left", parse_math=False)


def wrapped(text: str, size: float, width: float) -> str:
    """Break a text into lines, after spaces or the signs of a path if possible.

    Args:
        text: The text. Its own line breaks count as spaces.
        size: Size of the font in points.
        width: Largest width of a line in inches.
    """
    lines, line = [], ""
    for piece in re.findall(r"\s+|[^\s/\\._:,-]*[/\\._:,-]+|[^\s/\\._:,-]+", text):
        if piece.isspace():
            piece = " "
        if line.strip() and _inches(line + piece.rstrip(), size) > width:
            lines.append(line.rstrip())
            line = ""
        for letter in [piece] if _inches(piece, size) <= width else piece:
            if line and _inches(line + letter, size) > width:
                lines.append(line)
                line = ""
            line += letter
    return "\n".join([*lines, line.rstrip()])


def _inches(text: str, size: float) -> float:
    """Return the largest width of a line of text in the font of figures."""
    return _HINTING * sum(_advance(letter) for letter in text) * size / 72


@functools.cache
def _advance(letter: str) -> float:
    """Return the width of a letter in points, in a font of one point."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    properties = FontProperties(size=100)
    width, _, _ = text_to_path.get_text_width_height_descent(letter, properties, ismath=False)
    return float(width) / 100


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write `figure` in the format that the suffix of `path` names, completely or not at all."""
    path = Path(path)
    with staged_file(path) as stage:
        figure.savefig(stage, dpi=150)
    return path
