"""Define the command `export`, which writes a model for other runtimes."""

from __future__ import annotations

from typing import Annotated

import typer

from gramian.cli._app import command
from gramian.cli._console import console_for, finish, running
from gramian.cli._inputs import check_new, load_model, load_tokenizer
from gramian.cli._options import Json, ModelFolder, NewFolder, Seed


@command
def export(
    model: ModelFolder,
    out: NewFolder,
    format: Annotated[str, typer.Option(help="Format of the programs: onnx or torch.")] = "onnx",
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Largest number of tokens that attention keeps (default: the model's)."
        ),
    ] = None,
    verify: Annotated[
        int, typer.Option(min=1, help="Number of greedy tokens to compare with those of MODEL.")
    ] = 100,
    threads: Annotated[
        int | None, typer.Option(min=1, help="onnxruntime threads for the comparison.")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Write the recurrence of MODEL as ONNX files or torch.export programs in OUT.

    The programs `step` and `prefill` read token ids and the state, and return logits and the new
    state. export.json describes them. Long convolutions must be distilled first. Weights in half
    precision become float32. The programs and MODEL generate tokens, and the command exits with
    status 1 if the tokens differ.
    """
    check_new(out)
    console = console_for(as_json)
    loaded = load_model(model)
    if loaded.dtype.itemsize < 4:
        loaded = loaded.float()
    tokenizer = load_tokenizer(model)

    from gramian.export import export_model

    with running(console, "Exporting", errors=(RuntimeError, ValueError)):
        report = export_model(
            loaded,
            out,
            format,
            context=context,
            tokenizer=tokenizer,
            verify=verify,
            threads=threads,
            seed=seed,
        )
    finish(console, as_json, report.to_dict(), report, out)
