"""Define the command `convert`, which reads published checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gramian.cli._app import command
from gramian.cli._console import console_for, finish, running
from gramian.cli._inputs import check_new, quiet_transformers
from gramian.cli._options import Json, MaxShardSize, NewFolder


@command
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="File or folder of a published model.")
    ],
    out: NewFolder,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME",
            help="Configuration to use if none is beside the checkpoint: a JSON or YAML file, or "
            "the name of a published Evo 2, such as evo2_7b.",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="Format of the checkpoint: safari, hyenadna, hyena_rtf, striped_hyena or "
            "striped_hyena_2 (default: recognized from its tensors and configuration)."
        ),
    ] = None,
    fp8: Annotated[
        bool | None,
        typer.Option(
            "--fp8/--no-fp8",
            help="Compute the projections of Evo 2 in 8-bit floating point, as the models of 1, 20 "
            "and 40 billion parameters were trained (default: where the model needs it).",
        ),
    ] = None,
    max_shard_size: MaxShardSize = "5GB",
    as_json: Json = False,
) -> None:
    """Convert a CHECKPOINT of Hyena, HyenaDNA, Hyena-RTF, StripedHyena or Evo to a model in OUT.

    A fine-tuned HyenaDNA becomes a classifier. A file that was split into NAME.part0, NAME.part1
    and so on is read as one. Files are read as tensors only: no code from a checkpoint runs. The
    layers are converted one by one, so that a checkpoint may be larger than the memory. OUT also
    contains conversion.json, which lists the files of the weights with the SHA-256 of each file,
    and the model card README.md.
    """
    check_new(out)
    quiet_transformers()
    console = console_for(as_json)

    from gramian import checkpoints

    with running(console, "Converting") as bar:
        report = checkpoints.convert(
            checkpoint,
            out,
            config=config,
            format=format,
            fp8=fp8,
            max_shard_size=max_shard_size,
            progress=bar,
        )
    finish(console, as_json, report.to_dict(), report.summary, out)
