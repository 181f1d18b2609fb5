"""The command that reads published checkpoints: convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gramian._json import to_json
from gramian.cli._app import command
from gramian.cli._console import console_for, finish, running
from gramian.cli._inputs import check_new, quiet_transformers
from gramian.cli._options import Json, NewFolder


@command
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="File or folder of a published model.")
    ],
    out: NewFolder,
    config: Annotated[
        Path | None,
        typer.Option(help="Configuration (JSON or YAML) to use if none is beside the checkpoint."),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="Format of the checkpoint: safari, hyenadna, hyena_rtf or striped_hyena "
            "(default: recognized from its tensors and configuration)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a published Hyena, HyenaDNA, Hyena-RTF, StripedHyena or Evo CHECKPOINT a model in OUT.

    A fine-tuned HyenaDNA becomes a classifier. Files are read as tensors only: no code from a
    checkpoint runs. OUT also gets conversion.json, which says where the weights came from, with the
    SHA-256 of each file.
    """
    check_new(out)
    quiet_transformers()
    console = console_for(as_json)

    from gramian import checkpoints
    from gramian._staging import staged_directory
    from gramian.checkpoints.files import hash_weights

    with staged_directory(out) as stage, running(console, "Converting") as bar:
        model, tokenizer, name = checkpoints.load(
            checkpoint, config=config, format=format, progress=bar
        )
        model.save_pretrained(stage)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        settings = model.config
        report = {
            "checkpoint": str(checkpoint.resolve()),
            "sha256": hash_weights(checkpoint),
            "format": name,
            "model": type(model).__name__,
            "layers": settings.num_hidden_layers,
            "width": settings.hidden_size,
            "vocabulary": settings.vocab_size,
            "filter_length": settings.max_position_embeddings,
            "parameters": model.num_parameters(),
            "tokenizer": None if tokenizer is None else type(tokenizer).__name__,
        }
        (stage / "conversion.json").write_text(to_json(report, indent=2) + "\n")
    summary = (
        f"{name}: {report['layers']} layers of width {report['width']:,}, "
        f"{report['parameters']:,} parameters, filters of {report['filter_length']:,} taps; "
        f"{report['tokenizer'] or 'no tokenizer'}."
    )
    finish(console, as_json, report, summary, out)
