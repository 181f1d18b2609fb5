"""Commands that train: train, sweep."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from gramian._json import to_json
from gramian.cli._app import (
    Debug,
    Json,
    UserError,
    app,
    one_line,
    quiet_transformers,
)


def _show_keys(wanted: bool) -> None:
    if not wanted:
        return
    from rich.table import Column, Table

    from gramian.training.configuration import keys

    listed = [
        (
            key.name,
            "needed" if key.default is None else key.default,
            key.meaning.replace("`", "").replace("None", "null"),
        )
        for key in keys()
    ]
    if "--json" in sys.argv:
        names = ("key", "default", "meaning")
        print(to_json([dict(zip(names, one, strict=True)) for one in listed], indent=2))
        raise typer.Exit
    table = Table(
        Column("key", no_wrap=True),
        Column("default", overflow="fold", max_width=16),
        Column("meaning", overflow="fold"),
        box=None,
    )
    for name, default, meaning in listed:
        table.add_row(name, default, Text(meaning))
    console = Console()
    console.print(table, highlight=False)
    console.print(
        "\nSettings of a task, in Python: gramian.tasks.settings(NAME); arguments of a filter and "
        "of a linear recurrence: the classes in gramian.filters and gramian.mixers.",
        highlight=False,
    )
    raise typer.Exit


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="What to train, on what, and how.")
    ],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as optimization.steps=100."),
    ] = None,
    show_keys: Annotated[
        bool,
        typer.Option(
            "--keys",
            callback=_show_keys,
            is_eager=True,
            help="Show every key of CONFIG.yaml with its default and exit.",
        ),
    ] = False,
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
    except (training.ConfigError, training.DivergedError) as error:
        raise UserError(one_line(error)) from error
    if not first:
        return
    if as_json:
        print(to_json(report.to_dict(), indent=2))
        return
    console = Console()
    console.print(
        f"{report.parameters:,} parameters, {report.steps:,} steps, {report.seconds:.0f} s",
        highlight=False,
    )
    measured = ", ".join(f"{name} {value:.4g}" for name, value in report.metrics.items())
    console.print(f"Held out, at the end: {measured}", highlight=False)
    console.print(f"Written to {report.output}", highlight=False)


@app.command()
def sweep(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG.yaml", help="A training configuration with a section `sweep`."
        ),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as sweep.seed=[0,1]."),
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="Runs at once on this machine.")
    ] = 1,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to run on in place of this machine, or auto.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train at every point of a grid of settings; a sweep that was killed goes on where it was.

    One table, one figure. Exits with status 1 if a run failed; the same command tries it again.
    """
    quiet_transformers()

    from rich.progress import Progress

    from gramian import training

    errors = Console(stderr=True)
    bar = Progress(console=errors, transient=True, disable=not errors.is_terminal)
    with bar as progress:
        task = progress.add_task("Checking", total=None)

        def show(done: float, total: int) -> None:
            progress.update(task, description="Training", completed=done, total=total)

        try:
            settings = training.load_sweep(config, changes or [])
            report = training.sweep(settings, jobs=jobs, address=address, progress=show)
        except training.ConfigError as error:
            raise UserError(one_line(error)) from error
    if as_json:
        print(to_json(report.to_dict(), indent=2))
    else:
        console = Console()
        console.print(report)
        console.print(f"Written to {report.output}", highlight=False)
    for point in report.failed:
        print(f"gramian: {point.name}: {point.error}", file=sys.stderr)
    if report.failed:
        raise typer.Exit(1)
