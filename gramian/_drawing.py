"""Provide the colors and the style of all figures, and write figures to files."""

from __future__ import annotations

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
]

# Colors that people with any kind of color vision can distinguish (Okabe and Ito).
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
CYCLE = (BLUE, ORANGE, GREEN, GREY)

_LONGEST_TITLE = 70


def new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'figures need matplotlib: pip install "gramian[plots]".', name="matplotlib"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def finish(axes: Any, *, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, alpha=0.25, linewidth=0.5)


def head(figure: Figure, title: str) -> None:
    """Put a title over a whole figure. The beginning of a long title is cut off."""
    shown = title if len(title) <= _LONGEST_TITLE else f"…{title[1 - _LONGEST_TITLE :]}"
    figure.suptitle(shown, fontsize=9, color=GREY, x=0.01, ha="left", parse_math=False)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write `figure` in the format that the suffix of `path` names, completely or not at all."""
    path = Path(path)
    with staged_file(path) as stage:
        figure.savefig(stage, dpi=150)
    return path
