"""Define the command `check`, which compares all ways to run a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gramian.cli._app import UserError, command
from gramian.cli._console import console_for, finish, running
from gramian.cli._inputs import first_windows, load_any_model
from gramian.cli._options import Device, Json, ModelFolder, Seed


@command
def check(
    model: ModelFolder,
    batch: Annotated[int, typer.Option(help="Number of sequences to run, at least 2.")] = 3,
    length: Annotated[
        int, typer.Option(help="Number of tokens in a sequence, which are also run one by one.")
    ] = 200,
    text: Annotated[
        Path | None,
        typer.Option(help="Text or FASTA file to run on (default: random tokens)."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="Precision to check, such as float64 or float16; repeatable (default: float32 "
            "and bfloat16)."
        ),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative difference accepted in a layer.")
    ] = None,
    order: Annotated[
        int,
        typer.Option(
            help="Order of the filters in a distilled copy that is checked too; 0 makes no copy."
        ),
    ] = 16,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Run MODEL in every way that it can be run, and compare the results in tables.

    MODEL is a language model, or a classifier of tokens that does not look ahead. It runs in
    parallel, as a recurrence, in chunks, in batches, reloaded and distilled. Padding is put on the
    left, on the right, between tokens, and into a second part that continues from the state after
    the first. Sequences are packed into one row. A language model also generates with a cache. All
    of this is done in float32 and in bfloat16, or in the types that --dtype names. Every layer and
    the whole model are compared. The command exits with status 1 if a difference is too large.
    """
    if order < 0:
        raise UserError(f"--order must be at least 1, or 0 for no distilled copy; got {order}.")
    console = console_for(as_json)
    loaded: Any = load_any_model(model, device)
    dtypes = [_dtype(name) for name in dtype] if dtype else None
    ids = None if text is None else first_windows(model, loaded, text, batch, length)

    from gramian import checking

    with running(console, "Checking", errors=(TypeError, ValueError)) as bar:
        report = checking.check(
            loaded,
            ids,
            batch=batch,
            length=length,
            dtypes=dtypes,
            tolerance=tolerance,
            distill_order=order or None,
            seed=seed,
            progress=bar,
        )
    finish(console, as_json, report.to_dict(), report)
    if not report.passed:
        raise typer.Exit(1)


def _dtype(name: str) -> Any:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"--dtype must name a floating-point type such as float32; got {name!r}.")
    return found
