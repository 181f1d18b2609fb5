"""Define the command `score`, which scores genomes and variants."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gramian.cli._app import UserError, command
from gramian.cli._console import console_for, finish, running
from gramian.cli._inputs import open_genome_model
from gramian.cli._options import Device, Genome, Intervals, Json, ModelFolder


@command
def score(
    model: ModelFolder,
    file: Genome,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Tab-separated table to write; it must not exist yet."),
    ],
    variants: Annotated[
        Path | None,
        typer.Option(
            help="VCF file, or table with the columns chrom, pos, ref and alt, whose variants are "
            "scored in place of the records."
        ),
    ] = None,
    intervals: Intervals = None,
    reverse_complement: Annotated[
        str,
        typer.Option(
            help="Score the other strand too: average writes the mean over the strands, both also "
            "writes each strand, no scores one strand only."
        ),
    ] = "no",
    bos: Annotated[
        bool,
        typer.Option(
            "--bos",
            help="Put the tokenizer's BOS token before every sequence, so that the first base is "
            "predicted too.",
        ),
    ] = False,
    skip_unknown: Annotated[
        bool,
        typer.Option(
            "--skip-unknown",
            help="Count only A, C, G and T, and not letters such as N (default: all count).",
        ),
    ] = False,
    window: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of bases around a variant (default: 8192, or the length of the model's "
            "filters if that is less).",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Number of sequences that are read together.")
    ] = 8,
    chunk_size: Annotated[
        int,
        typer.Option(min=1, help="Largest number of tokens of a sequence that are read at once."),
    ] = 16_384,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Score the records of a FASTA FILE, or variants of them, by MODEL's log-likelihood in nats.

    Records of any length are read in chunks with the model's state, so memory does not grow with
    the length. A window with the variant in its middle is scored twice, with the reference and with
    the alternative allele. The difference is the score of the alternative minus that of the
    reference. If the command is interrupted, the same command continues where it stopped.
    """
    if output.exists():
        raise UserError(f"{output} exists already; name a file that does not.")
    if reverse_complement not in ("no", "average", "both"):
        raise typer.BadParameter(
            f"--reverse-complement must be average, both or no; got {reverse_complement!r}."
        )
    if window is not None and variants is None:
        raise typer.BadParameter("--window needs --variants FILE.")
    if variants is not None and intervals is not None:
        raise typer.BadParameter("give --variants or --intervals, not both.")
    console = console_for(as_json)
    loaded, tokenizer = open_genome_model(model, device, file, variants, intervals)

    from gramian import genomics

    with running(console, "Scoring", errors=(OSError, TypeError, ValueError)) as bar:
        before = genomics.write_scores(
            output,
            loaded,
            file,
            tokenizer=tokenizer,
            variants=variants,
            intervals=intervals,
            reverse_complement=reverse_complement,
            bos=bos,
            count_unknown=not skip_unknown,
            window=window,
            batch_size=batch_size,
            chunk_size=chunk_size,
            progress=bar,
        )
    with output.open(encoding="utf-8") as table:
        rows = sum(1 for _ in table) - 1
    what = "variant" if variants is not None else "record" if intervals is None else "interval"
    shown = f"{rows:,} {what}{'s' if rows != 1 else ''}"
    shown += f", {before:,} of them in an earlier call" if before else ""
    finish(console, as_json, {"rows": rows, "rows_before": before}, f"{shown}.", output)
