"""What every command shows: progress while it works, its report when it is done."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from gramian._json import to_json
from gramian.cli._app import UserError, one_line

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Bar", "console_for", "finish", "running"]


def console_for(as_json: bool) -> Console:
    """Return a console on standard error if standard output is to hold JSON, else on the latter."""
    return Console(stderr=as_json)


class Bar:
    """A progress bar that knows its total once it is told."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def __call__(self, done: float, total: float) -> None:
        """Show that `done` of `total` steps are done."""
        self._progress.update(self._task, completed=done, total=total)

    def describe(self, title: str) -> None:
        """Replace the title."""
        self._progress.update(self._task, description=title)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Take the bar away while something else shows its own."""
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.start()


@contextmanager
def running(
    console: Console,
    title: str,
    *,
    about: str | None = None,
    errors: tuple[type[Exception], ...] = (OSError, ValueError),
) -> Iterator[Bar]:
    """Show a progress bar on a terminal, and turn what the library refuses into one sentence.

    Args:
        console: where the bar is shown.
        title: text in front of the bar.
        about: what the sentence begins with, such as the name of a model.
        errors: exceptions whose messages are meant for users.
    """
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        try:
            yield Bar(progress, progress.add_task(title, total=None))
        except errors as error:
            message = one_line(error)
            raise UserError(message if about is None else f"{about}: {message}") from error


def finish(
    console: Console,
    as_json: bool,
    values: Any,
    shown: Any,
    *written: str | os.PathLike[str] | None,
    indent: int | None = 2,
) -> None:
    """Print the outcome of a command, once, as JSON or as text.

    Args:
        console: where text goes.
        as_json: whether to print JSON on standard output instead.
        values: plain values for JSON.
        shown: what the console prints: a report or text; None if that is done already.
        written: files and folders that hold the outcome; None is left out.
        indent: of JSON.
    """
    if as_json:
        print(to_json(values, indent=indent))
        return
    if shown is not None:
        console.print(shown, highlight=False if isinstance(shown, str) else None)
    for path in written:
        if path is not None:
            console.print(f"Written to {path}", highlight=False)
