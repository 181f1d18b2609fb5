"""Define the arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Changes",
    "Device",
    "Genome",
    "Include",
    "Intervals",
    "Json",
    "MaxChannels",
    "MaxShardSize",
    "ModelFolder",
    "NewFolder",
    "Rare",
    "Seed",
    "Settings",
    "Split",
    "TaskConfig",
    "TaskSeed",
    "TrainingText",
]

ModelFolder = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a saved model.")]
NewFolder = Annotated[
    Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist yet.")
]

MaxShardSize = Annotated[
    str, typer.Option(metavar="SIZE", help="Largest size of a file of weights, such as 5GB.")
]
Changes = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Values that replace those in the file, such as optimization.steps=100.",
    ),
]
Device = Annotated[str, typer.Option(help="Device to compute on: cpu, cuda, cuda:1 and so on.")]
Genome = Annotated[Path, typer.Argument(metavar="FILE", help="FASTA file, plain or compressed.")]
Include = Annotated[
    str,
    typer.Option(
        help="core: short convolutions are layers of their own; mixer: they are parts of the scans "
        "that they feed."
    ),
]
Intervals = Annotated[
    Path | None,
    typer.Option(help="BED file of intervals that are read in place of the records."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
MaxChannels = Annotated[
    int,
    typer.Option(min=0, help="Largest number of channels to measure in a layer; 0 measures all."),
]
Rare = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Largest number of occurrences in --training-text of a pair of tokens that counts as "
        "recalled (default: 1250).",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the random numbers.")]
TaskConfig = Annotated[
    Path | None,
    typer.Option("--config", help="Read the task from this training configuration (YAML)."),
]
TaskSeed = Annotated[
    int | None,
    typer.Option(help="Seed of the task's rows (default: that of --config, otherwise 0)."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the task; repeatable."),
]
Split = Annotated[
    str | None,
    typer.Option(help="Split of the task to read (default: test if there is one)."),
]
TrainingText = Annotated[
    list[Path] | None,
    typer.Option(
        help="Text on which the models were trained: pairs of tokens that are frequent there do "
        "not count for the bigram-recall perplexity; repeatable."
    ),
]
