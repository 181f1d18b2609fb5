"""Write the tables of docs/results/published.md from published.yaml and the results beside it.

python benchmarks/_published_page.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._pages import fill_marks, table

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs/results/published.md"


def tables() -> dict[str, list[dict[str, Any]]]:
    """Return the tables of every paper, as published.yaml describes them."""
    found: dict[str, list[dict[str, Any]]] = yaml.safe_load(
        (HERE / "published.yaml").read_text(encoding="utf-8")
    )
    return found


def measured(cell: dict[str, Any] | None) -> str:
    """Return a value of Gramian, as the mean over seeds, and nothing where none was measured."""
    if cell is None:
        return ""
    value = json.loads((HERE / f"results/{cell['file']}.json").read_text(encoding="utf-8"))
    for key in cell["path"]:
        value = value[key]
    values = value if isinstance(value, list) else [value]
    text: str = format(cell.get("scale", 1) * sum(values) / len(values), cell["form"])
    return text


def blocks() -> dict[str, str]:
    """Return the Markdown of every table by its name."""
    found = {}
    for each in (each for paper in tables().values() for each in paper):
        rows = [["" if cell is None else str(cell) for cell in row] for row in each["rows"]]
        rows += [[f"**{name}**", *map(measured, cells)] for name, *cells in each["ours"]]
        text = table(["", *each["columns"]], rows)
        found[each["name"]] = f"{each['source']}: {each['measure']}.\n\n{text}"
    return found


def main() -> None:
    PAGE.write_text(fill_marks(PAGE.read_text(encoding="utf-8"), blocks()), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
