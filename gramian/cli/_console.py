"""Print the output of all commands: progress while they work, and a report at the end."""

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
    """Return a console on standard output, or on standard error if standard output is for JSON."""
    return Console(stderr=as_json)


class Bar:
    """A progress bar. It is called with the amount of work done and the total amount."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def __call__(self, done: float, total: float) -> None:
        """Show that `done` of `total` steps are done."""
        self._progress.update(self._task, completed=done, total=total)

    def describe(self, title: str) -> None:
        """Replace the text in front of the bar."""
        self._progress.update(self._task, description=title)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Hide the bar while another one is shown."""
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
    """Show a progress bar on a terminal, and turn errors of the library into one sentence.

    Args:
        console: console that shows the bar.
        title: text in front of the bar.
        about: beginning of the sentence, such as the name of a model. None adds no beginning.
        errors: classes of exceptions whose messages are written for users.

    Raises:
        UserError: if one of `errors` is raised in the block.
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
    """Print the outcome of a command as JSON or as text.

    Args:
        console: console for text.
        as_json: whether to print JSON on standard output instead.
        values: plain values for JSON.
        shown: report or text for the console; None if it was printed already.
        written: files and folders whose paths are printed as text; None is skipped.
        indent: indentation of JSON; None prints one line.
    """
    if as_json:
        print(to_json(values, indent=indent))
        return
    if shown is not None:
        console.print(shown, highlight=False if isinstance(shown, str) else None)
    for path in written:
        if path is not None:
            console.print(f"Written to {path}", highlight=False)
