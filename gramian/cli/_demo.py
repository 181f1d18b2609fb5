"""Define the command `demo`, which shows the whole library on one text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from gramian._json import to_json
from gramian.cli._app import command
from gramian.cli._console import console_for
from gramian.cli._inputs import check_tolerance, quiet_transformers
from gramian.cli._options import Json, Seed


@command
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for models, figures and numbers.")
    ] = Path("demo-output"),
    steps: Annotated[
        int | None, typer.Option(min=1, help="Number of training steps (default: 600).")
    ] = None,
    tol: Annotated[
        float | None,
        typer.Option(help="Largest relative l2 error of a distilled filter (default: 0.02)."),
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a language model on real English, distil it, generate from both models, and measure.

    The demo takes a few minutes on two cores. It exits with status 1 if one of its checks fails.
    """
    if tol is not None:
        check_tolerance(tol)
    quiet_transformers()
    from gramian.demo import DemoSettings, run_demo

    settings = DemoSettings(seed=seed)
    if steps is not None:
        settings = replace(settings, training=replace(settings.training, steps=steps))
    if tol is not None:
        settings = replace(settings, tol=tol)
    report = run_demo(output, settings, console_for(as_json))
    if as_json:
        print(to_json(report.to_dict(), indent=2))
    if not report.passed:
        raise typer.Exit(1)
