"""Write the parts of a page that follow from results: Markdown tables between marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def put(text: str, blocks: Mapping[str, str]) -> str:
    """Return a page with each block put between the marks of its name.

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
