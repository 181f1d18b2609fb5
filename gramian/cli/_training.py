"""Commands that train: train, sweep."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gramian.cli._app import (
    Debug,
    Json,
    UserError,
    app,
    one_line,
    quiet_transformers,
)


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="What to train, on what, and how.")
    ],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as optimization.steps=100."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a model on a task; a run that was killed goes on where it was.

    On many devices: torchrun --nproc-per-node 8 -m gramian train CONFIG.yaml
    """
    import os

    quiet_transformers()
    from gramian import training

    first = os.environ.get("RANK", "0") == "0"
    try:
        settings = training.load_config(config, changes or [])
        report = training.train(settings, progress=first and sys.stderr.isatty())
    except training.ConfigError as error:
        raise UserError(one_line(error)) from error
    if not first:
        return
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
        return
    console = Console()
    console.print(
        f"{report.parameters:,} parameters, {report.steps:,} steps, {report.seconds:.0f} s",
        highlight=False,
    )
    measured = ", ".join(f"{name} {value:.4f}" for name, value in report.metrics.items())
    console.print(f"Held out, at the end: {measured}", highlight=False)
    console.print(f"Written to {report.output}", highlight=False)
