"""Write the tables of reports, as lines of text or for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["rich_table", "text_table"]


def text_table(columns: Sequence[str], rows: Iterable[Sequence[str]], summary: str) -> str:
    """Return columns that are aligned to the right, and a summary below them."""
    table = [columns, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in table]
    return "\n".join([*lines, summary])


def rich_table(columns: Sequence[str], rows: Iterable[Sequence[str]], summary: str) -> Table:
    """Return the same as a table of rich, whose caption is the summary."""
    from rich.table import Table

    table = Table(caption=summary, caption_justify="left", caption_style="")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    return table
