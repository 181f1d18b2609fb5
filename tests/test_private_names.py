"""A name or module with a leading underscore is imported from within its own package only.

A package is a folder of `gramian`; modules and names of `gramian` itself belong to all of it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "gramian"


def imports(file: Path) -> Iterator[str]:
    """Full names of the modules and names of `gramian` that a file imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("gramian."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gramian"):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def crossing() -> dict[str, set[str]]:
    """By package, the private names of other packages that it imports."""
    found: dict[str, set[str]] = {}
    for file in PACKAGE.glob("*/*.py"):
        for name in imports(file):
            owner, *rest = name.split(".")[1:]
            private = any(part.startswith("_") and not part.startswith("__") for part in rest)
            if private and owner != file.parent.name:
                found.setdefault(file.parent.name, set()).add(name.removeprefix("gramian."))
    return found


def test_underscores_are_honored() -> None:
    assert not crossing()
