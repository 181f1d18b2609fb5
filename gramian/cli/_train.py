"""Define the command `train`, which trains a model."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gramian._json import to_json
from gramian.cli._app import UserError, command, one_line
from gramian.cli._console import console_for, finish
from gramian.cli._inputs import quiet_transformers, require_training
from gramian.cli._options import Changes, Json

if TYPE_CHECKING:
    from gramian.training import TrainingReport


@command
def train(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG.yaml",
            help="Training configuration: the task, the model, and how to train it.",
            show_default=False,
        ),
    ] = None,
    changes: Changes = None,
    keys: Annotated[
        bool,
        typer.Option("--keys", help="List every key of CONFIG.yaml with its default, and exit."),
    ] = False,
    imports: list[str] | None = None,
    as_json: Json = False,
) -> None:
    """Train a model on a task. The same command continues a run that was interrupted.

    To train on several devices: torchrun --nproc-per-node 8 -m gramian train CONFIG.yaml
    """
    if keys:
        _show_keys(as_json)
        return
    if config is None:
        raise typer.BadParameter("give the file CONFIG.yaml, or --keys.")
    if not config.is_file():  # checked before imports that take seconds
        raise UserError(f"there is no configuration file {config}.")
    require_training()
    quiet_transformers()
    from gramian import training

    first = os.environ.get("RANK", "0") == "0"
    try:
        settings = training.load_config(config, changes or [], imports or [])
        report = training.train(settings, progress=first and sys.stderr.isatty())
    except (training.ConfigError, training.DivergedError) as error:
        raise UserError(one_line(error)) from error
    if first:
        text = _summary(report, settings.imports)
        finish(console_for(False), as_json, report.to_dict(), text)


def _summary(report: TrainingReport, imports: list[str]) -> str:
    measured = ", ".join(f"{name} {value:.4g}" for name, value in report.metrics.items())
    lines = [
        f"{report.parameters:,} parameters, {report.steps:,} steps, {report.seconds:.0f} s",
        f"Held out, at the end: {measured}",
        f"Written to {report.output}",
    ]
    if imports:
        lines[-1] += f", with a copy of {', '.join(imports)}"
    return "\n".join(lines)


def _show_keys(as_json: bool) -> None:
    from rich.table import Column, Table
    from rich.text import Text

    from gramian.training.configuration import keys

    listed = [
        (
            key.name,
            "needed" if key.default is None else key.default,
            key.meaning.replace("`", "").replace("None", "null"),
        )
        for key in keys()
    ]
    if as_json:
        names = ("key", "default", "meaning")
        print(to_json([dict(zip(names, one, strict=True)) for one in listed], indent=2))
        return
    table = Table(
        Column("key", no_wrap=True),
        Column("default", overflow="fold", max_width=16),
        Column("meaning", overflow="fold"),
        box=None,
    )
    for name, default, meaning in listed:
        table.add_row(name, default, Text(meaning))
    console = console_for(False)
    console.print(table, highlight=False)
    console.print(
        "\nThe settings of a task are listed in Python by gramian.tasks.settings(NAME); the "
        "arguments of a filter or a linear recurrence are those of its class in gramian.filters or "
        "gramian.mixers.",
        highlight=False,
    )
