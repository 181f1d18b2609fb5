"""Write pages about results: tables in Markdown, and the marks between which they stand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["fill_marks", "plain", "table"]


def fill_marks(text: str, blocks: Mapping[str, str]) -> str:
    """Return a page with each block put between its marks, `<!-- name -->` and `<!-- /name -->`.

    Raises:
        ValueError: if the page lacks a mark.
    """
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, _, rest = text.partition(begin)
        _, found, tail = rest.partition(end)
        if not found:
            raise ValueError(f"the page has no marks for {name}.")
        text = f"{head}{begin}{block}\n{end}{tail}"
    return text


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plain(text: str) -> str:
    """Return a text without what Markdown would take for markup."""
    text = re.sub(r"\s+", " ", text)
    return re.sub(r"([*_<`|\[\]])", r"\\\1", text)
