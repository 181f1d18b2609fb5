"""The command line: a thin Typer app over whole-model jobs.

Exit status 0 on success, 1 for what a user can get wrong (one line on standard error) and for a
demo whose checks fail, 2 for wrong usage. `--debug` shows tracebacks. With `--json` standard output
holds one JSON object and nothing else; progress goes to standard error. torch, transformers and the
rest are imported by the command that needs them, so `--help` answers at once.

Each module of the package holds a group of commands, which register themselves with the app.
"""

from gramian.cli import _app, _evaluation, _models, _training  # noqa: F401
from gramian.cli._app import app, main

__all__ = ["app", "main"]
