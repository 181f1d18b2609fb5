"""Messages of errors have one form."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import gramian

PACKAGE = Path(gramian.__file__).parent
NAMES = re.compile(r"(?:GGUF|WORLD_SIZE)\b")
"""What begins with a capital letter because it is a name."""


def raised() -> Iterator[tuple[str, str]]:
    """Yield the place and the text of every message, with `{}` for what is filled in."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                continue
            called = node.exc.func
            if getattr(called, "id", "") in ("AssertionError", "SystemExit") or not node.exc.args:
                continue
            if isinstance(called, ast.Attribute):  # a method that ends the sentence
                continue
            text = node.exc.args[0]
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            if not all(isinstance(part, ast.Constant | ast.FormattedValue) for part in parts):
                continue
            filled = (str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
            yield f"{file.relative_to(PACKAGE)}:{node.lineno}", "".join(filled)


def test_messages_are_sentences_of_one_form() -> None:
    messages = list(raised())
    assert len(messages) > 500
    odd = [
        f"{place}: {text}"
        for place, text in messages
        if (text[0].isupper() and not NAMES.match(text))
        or not text.endswith((".", "?", "{}", "…"))
        or ", got " in text
    ]
    assert not odd, "\n".join(odd)
