"""Define the command `sweep`, which trains at every point of a grid."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gramian.cli._app import UserError, command
from gramian.cli._console import console_for, finish, running
from gramian.cli._inputs import quiet_transformers, require_training
from gramian.cli._options import Changes, Json


@command
def sweep(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG.yaml", help="Training configuration with a section `sweep`."
        ),
    ],
    changes: Changes = None,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="Number of runs at a time on this machine.")
    ] = 1,
    address: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster on which to run; auto is the cluster of this machine."
        ),
    ] = None,
    imports: list[str] | None = None,
    as_json: Json = False,
) -> None:
    """Train at every point of a grid of settings, and gather the results in a table and a figure.

    The same command continues a sweep that was interrupted. If a run fails, the command exits with
    status 1, and the next call tries the run again.
    """
    if not config.is_file():  # checked before imports that take seconds
        raise UserError(f"there is no configuration file {config}.")
    require_training()
    quiet_transformers()
    from gramian import training

    errors = console_for(True)
    with running(errors, "Checking", errors=(training.ConfigError,)) as bar:
        settings = training.load_sweep(config, changes or [], imports or [])

        def show(done: float, total: int) -> None:
            bar.describe("Training")
            bar(done, total)

        report = training.sweep(
            settings, jobs=jobs, address=address, progress=show if errors.is_terminal else True
        )
    finish(console_for(False), as_json, report.to_dict(), report, report.output)
    for point in report.failed:
        print(f"gramian: {point.name}: {point.error}", file=sys.stderr)
    if report.failed:
        raise typer.Exit(1)
