"""Define the command `embed`, which embeds genomes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gramian.cli._app import UserError, command
from gramian.cli._console import console_for, finish, running
from gramian.cli._inputs import open_genome_model
from gramian.cli._options import Device, Genome, Intervals, Json, ModelFolder


@command
def embed(
    model: ModelFolder,
    file: Genome,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="New file of the embeddings: .safetensors, .npy (with a .tsv beside it) or "
            ".parquet.",
        ),
    ],
    layer: Annotated[
        str,
        typer.Option(
            help="Number of a layer (0 is the embeddings, -1 the output of the last norm), or the "
            "name of a module such as model.layers.3.mlp."
        ),
    ] = "-1",
    pool: Annotated[
        str,
        typer.Option(
            help="Pooling over a record: mean, last (its last base), or none (one vector for every "
            "base)."
        ),
    ] = "mean",
    intervals: Intervals = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Number of records that are read together.")
    ] = 8,
    chunk_size: Annotated[
        int, typer.Option(min=1, help="Largest number of tokens of a record that are read at once.")
    ] = 16_384,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Write hidden states of MODEL for the records of a FASTA FILE, pooled or one for every base.

    Records of any length are read in chunks with the model's state, and hidden states are written
    as soon as they are computed. So memory does not grow with the length.
    """
    if pool not in ("mean", "last", "none"):
        raise typer.BadParameter(f"--pool must be mean, last or none; got {pool!r}.")
    if output.suffix not in (".safetensors", ".npy", ".parquet"):
        raise typer.BadParameter(
            f"--output must end in .safetensors, .npy or .parquet; got {output.name!r}."
        )
    if output.exists():
        raise UserError(f"{output} exists already; name a file that does not.")
    console = console_for(as_json)
    loaded, tokenizer = open_genome_model(model, device, file, intervals)

    from gramian import genomics
    from gramian.genomics import read_layer

    with running(console, "Embedding", errors=(OSError, TypeError, ValueError)) as bar:
        rows, width = genomics.write_embeddings(
            output,
            loaded,
            file,
            tokenizer=tokenizer,
            layer=read_layer(layer),
            pool=pool,
            intervals=intervals,
            batch_size=batch_size,
            chunk_size=chunk_size,
            progress=bar,
        )
    shown = f"{rows:,} vector{'s' if rows != 1 else ''} of {width:,} numbers."
    finish(console, as_json, {"vectors": rows, "width": width}, shown, output)
