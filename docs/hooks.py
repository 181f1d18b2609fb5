"""Hooks that mkdocs calls while it builds the documentation site.

They insert the references of the command line and of a configuration's keys, and remove
reStructuredText's roles from docstrings.
"""

from __future__ import annotations

import re
from typing import Any

import typer.main

MARK = "<!-- the commands of gramian -->"
PAGE = "reference/command-line.md"
KEYS_MARK = "<!-- the keys of a configuration -->"
KEYS_PAGE = "reference/training.md"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Replace the marks in two pages by the commands and the keys; mkdocs calls this function."""
    for place, mark, text in ((PAGE, MARK, commands), (KEYS_PAGE, KEYS_MARK, training_keys)):
        if page.file.src_uri == place:
            if mark not in markdown:
                raise ValueError(f"{place} lacks the line {mark}.")
            return markdown.replace(mark, text())
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """Remove `:func:` and similar roles before names, which Markdown would show."""
    return re.sub(r":(?:attr|class|data|func|meth|mod|obj):(?=<code>)", "", html)


def commands() -> str:
    """Return Markdown of every command with its arguments and options, read from the Typer app."""
    from gramian.cli import app

    group: Any = typer.main.get_command(app)
    return "\n\n".join(_command(name, command) for name, command in group.commands.items())


def training_keys() -> str:
    """Return Markdown of every key of a training configuration, read from the dataclasses."""
    from gramian.training.configuration import keys as listed

    rows = [
        f"| `{key.name}` | {key.meaning.replace('|', chr(92) + '|')} | "
        f"{'needed' if key.default is None else f'`{key.default}`'} |"
        for key in listed()
    ]
    return "\n".join(["| key | meaning | default |", "|---|---|---|", *rows])


def _command(name: str, command: Any) -> str:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option"]
    usage = " ".join(["gramian", name, "[OPTIONS]", *map(_metavar, arguments)])
    parts = [f"## gramian {name}", f"```\n{usage}\n```", _prose(command.help)]
    rows = [(_metavar(one), one) for one in arguments]
    rows += [(", ".join([*one.opts, *one.secondary_opts]), one) for one in options]
    rows = [(label, one) for label, one in rows if not getattr(one, "hidden", False)]
    if rows:
        lines = [f"| `{label}` | {_help(one)} | {_default(one)} |" for label, one in rows]
        parts.append("\n".join(["| | | default |", "|---|---|---|", *lines]))
    return "\n\n".join(parts)


def _metavar(argument: Any) -> str:
    label = str(argument.metavar or argument.name.upper()).rstrip(".")
    return f"{label} …" if argument.nargs == -1 else label


def _prose(text: str | None) -> str:
    return re.sub(r"\s*\x08\s*", "\n\n", (text or "").strip())


def _help(one: Any) -> str:
    return " ".join((one.help or "").split()).replace("|", r"\|")


def _default(one: Any) -> str:
    value = one.default
    if one.required:
        return "required"
    if value is None or value is False or value in ((), []) or callable(value):
        return ""
    return f"`{value}`"
