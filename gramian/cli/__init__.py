"""Define the command line: a Typer app with one thin command for each job on a whole model.

The exit status is 0 on success and 2 on wrong usage. It is 1 on a failed check, and on an error
that the user can correct. One line on standard error explains the error. `--debug` shows
tracebacks. With `--json`, standard output holds one JSON object and nothing else, and progress goes
to standard error. Commands import torch, transformers and other packages only after parsing their
arguments, so `--help` answers at once.

Each command has its own module, and importing the module registers the command. `--help` lists the
commands in the order of the imports.
"""

from gramian.cli._app import app, main  # isort: skip (it says what is missing)
from gramian.cli import (  # noqa: F401, I001 (this is the order of the commands in the help)
    _demo,
    _distill,
    _shrink,
    _convert,
    _generate,
    _check,
    _analyze,
    _modulation,
    _plan,
    _export,
    _train,
    _sweep,
    _map,
    _evaluate,
    _score,
    _embed,
)

__all__ = ["app", "main"]
