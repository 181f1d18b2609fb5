"""The command line: a thin Typer app over whole-model jobs.

The exit status is 0 on success, 1 for what a user can get wrong (one line on standard error) and
for a check that fails, and 2 for wrong usage. `--debug` shows tracebacks. With `--json` standard
output holds one JSON object and nothing else; progress goes to standard error. Each command imports
torch, transformers and the rest once its arguments are read, so `--help` answers at once.

Each command has a module of its own and registers itself with the app, in this order.
"""

from gramian.cli import (  # noqa: F401, I001 (the order of the commands in the help)
    _demo,
    _distill,
    _convert,
    _generate,
    _check,
    _analyze,
    _export,
    _train,
    _sweep,
    _evaluate,
)
from gramian.cli._app import app, main

__all__ = ["app", "main"]
