"""Define the command `plan`: which attention a window or a fitted recurrence can replace."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gramian.cli._app import UserError, command
from gramian.cli._console import console_for, finish, running
from gramian.cli._inputs import (
    SAVE_TOKENIZER,
    check_models,
    move_model,
    quiet_transformers,
    read_texts,
)
from gramian.cli._options import Device, Json, Seed

if TYPE_CHECKING:
    from rich.console import Group

    from gramian.hybrids import HybridPlan, HybridTrial
    from gramian.tasks import Document

_Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Folder of a saved language model, of Gramian or of transformers; or a GGUF file.",
    ),
]
_Text = Annotated[
    Path | None,
    typer.Option(help="Text, FASTA or JSON-lines file by which heads are measured and chosen."),
]
_Plan = Annotated[
    Path | None,
    typer.Option(
        "--plan", help="YAML or JSON file of a plan, perhaps edited, to try; replaces --text."
    ),
]
_Replace = Annotated[
    str | None,
    typer.Option(
        metavar="COUNT|SHARE",
        help="Number of layers (or groups of heads) to replace, such as 6; or the share of the "
        "bytes of keys and values that they store, such as 0.25 or 25%.",
    ),
]
_By = Annotated[
    str,
    typer.Option(
        metavar="layer|head",
        help="What is replaced: whole layers, or heads with the others that share their keys.",
    ),
]
_Kind = Annotated[
    str,
    typer.Option(
        metavar="window|recurrence",
        help="What replaces it: a window, or a recurrence of --state states, fitted on the text, "
        "beside the window.",
    ),
]
_Criterion = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What is replaced first, by its smallest value: output or window (error of a window), "
        "recurrence (error of the fitted recurrence), realization (error of the best recurrence), "
        "state (effective state-size), loss (of each alone; noisy unless there are many "
        "--sequences), magnitude, or random (default: output, or recurrence).",
    ),
]
_Window = Annotated[int, typer.Option(min=1, help="Number of last tokens that a window holds.")]
_Sinks = Annotated[int, typer.Option(min=0, help="Number of first tokens that it holds, too.")]
_State = Annotated[
    int, typer.Option(min=1, help="Number of states of the recurrences, measured or fitted.")
]
_FitSequences = Annotated[
    int,
    typer.Option(
        min=2,
        help="Largest number of sequences to fit recurrences on; a quarter of them is kept for "
        "their errors.",
    ),
]
_Length = Annotated[int, typer.Option(min=2, help="Number of tokens of a sequence.")]
_Sequences = Annotated[int, typer.Option(min=1, help="Largest number of sequences to measure on.")]
_Try = Annotated[
    Path | None,
    typer.Option(
        "--try",
        help="Other text on which the loss of the plan is measured, and that of choices by "
        "magnitude and at random that replace as much.",
    ),
]
_Seeds = Annotated[int, typer.Option(min=1, help="Number of random choices that are tried.")]
_TrySequences = Annotated[
    int, typer.Option(min=1, help="Largest number of sequences to measure losses on.")
]
_Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="YAML file for the plan, or JSON if it ends in .json; a new file."
    ),
]


@command
def plan(
    model: _Model,
    text: _Text = None,
    replace: _Replace = None,
    by: _By = "layer",
    kind: _Kind = "window",
    criterion: _Criterion = None,
    window: _Window = 64,
    sinks: _Sinks = 4,
    state: _State = 16,
    length: _Length = 512,
    sequences: _Sequences = 4,
    fit_sequences: _FitSequences = 16,
    plan_file: _Plan = None,
    try_text: _Try = None,
    try_sequences: _TrySequences = 16,
    seeds: _Seeds = 3,
    output: _Output = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Plan which attention of MODEL a window or a recurrence can replace, and try the plan.

    For every head, the effective state-size on a text, the error of a recurrence in its place and
    that of a window are measured. The plan names the layers and heads to keep and to replace. With
    --kind recurrence, recurrences are fitted on the text, and saved beside the plan.
    """
    _check(text, plan_file, replace, try_text, output)
    budget = None if replace is None else _budget(replace)
    documents = None if text is None else _read(text)
    others = None if try_text is None else _read(try_text)
    check_models([model])
    console = console_for(as_json)
    quiet_transformers()

    from gramian import analysis, hybrids

    with running(console, "Reading the model", about=model) as bar:
        given = None if plan_file is None else hybrids.HybridPlan.load(plan_file)
        loaded, tokenizer = analysis.open_model(model, progress=bar)
    if not loaded.can_generate():
        raise UserError(f"{model} is a {type(loaded).__name__}; a plan needs a language model.")
    if tokenizer is None:
        raise UserError(f"{model} has no tokenizer, so it cannot read a text; {SAVE_TOKENIZER}.")
    move_model(loaded, device)
    trial = None
    with running(console, "Measuring", about=model) as bar:
        if given is None:
            assert budget is not None
            given = hybrids.plan_hybrid(
                loaded,
                documents,  # type: ignore[arg-type]
                tokenizer,
                replace=budget,
                by=by,
                kind=kind,
                criterion=criterion,
                window=window,
                sinks=sinks,
                orders=sorted({1, 4, 16, state}),
                state=state,
                length=length,
                sequences=sequences,
                fit_sequences=fit_sequences,
                seed=seed,
                progress=bar,
            )
            given = dataclasses.replace(given, model=model.rstrip("/"))
        if output is not None:
            given.save(output)
        if others is not None:
            bar.describe("Trying")
            trial = hybrids.try_hybrid(
                loaded,
                given,
                others,
                tokenizer,
                seeds=seeds,
                sequences=try_sequences,
                progress=bar,
            )
    values: dict[str, Any] = {"plan": given.to_dict()}
    if trial is not None:
        values["trial"] = trial.to_dict()
    finish(console, as_json, values, _shown(given, trial), output)


def _check(
    text: Path | None,
    plan_file: Path | None,
    replace: str | None,
    try_text: Path | None,
    output: Path | None,
) -> None:
    """Check that the options go together, and the files that are not read at once."""
    if (text is None) == (plan_file is None):
        raise typer.BadParameter("give exactly one of --text and --plan.")
    if text is not None and replace is None:
        raise typer.BadParameter("--text needs --replace, which says how much to replace.")
    if text is None and replace is not None:
        raise typer.BadParameter("--replace goes with --text; a plan says what it replaces.")
    if plan_file is not None and try_text is None:
        raise typer.BadParameter("--plan needs --try, the text to try it on.")
    for file in () if output is None else (output, output.with_suffix(".safetensors")):
        if file.exists() or file.is_symlink():
            raise UserError(f"{file} exists already; name a file that does not.")
    if output is not None and not output.parent.is_dir():
        raise UserError(f"{output}: there is no folder {output.parent}.")
    if plan_file is not None and not plan_file.is_file():
        raise UserError(f"there is no plan {plan_file}.")


def _budget(text: str) -> int | float:
    """Return the number that a text such as "6" means, or the share of "0.25" or "25%"."""
    try:
        number = int(text) if text.isdecimal() else 0
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        number, share = 0, 0.0
    if number > 0:
        return number
    if 0 < share < 1:
        return share
    raise UserError(
        "--replace takes a number of layers or groups of heads, such as 6, or a share of the bytes "
        f"above 0 and below 1, such as 0.25 or 25%; got {text!r}."
    )


def _read(path: Path) -> list[Document]:
    documents = read_texts(path)
    if not documents:
        raise UserError(f"{path}: there is no text.")
    return documents


def _shown(plan: HybridPlan, trial: HybridTrial | None) -> Group:
    from rich.console import Group

    return Group(plan) if trial is None else Group(plan, "", trial)
