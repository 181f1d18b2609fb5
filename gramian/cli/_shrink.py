"""Define the command `shrink`, which makes the states of recurrences smaller."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gramian.cli._app import UserError, command, one_line
from gramian.cli._console import console_for, finish, running
from gramian.cli._inputs import (
    SAVE_TOKENIZER,
    check_new,
    fraction,
    move_model,
    quiet_transformers,
    read_texts,
)
from gramian.cli._options import Device, Json, NewFolder, Seed

if TYPE_CHECKING:
    from torch import Tensor

    from gramian.shrinking import Recovery, ShrinkReport

_Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", help="Folder of a saved language model, of Gramian or of transformers."
    ),
]
_Text = Annotated[
    Path | None,
    typer.Option(help="Text or FASTA file by which states are chosen; losses use a quarter of it."),
]
_Labels = Annotated[
    Path | None,
    typer.Option(
        help="JSON lines with input_ids and labels, which alone count; -100 where nothing is to be "
        "predicted; replaces --text."
    ),
]
_Keep = Annotated[
    str | None,
    typer.Option(help="Share of the states to keep, such as 0.5 or 50%, or their number."),
]
_MaxIncrease = Annotated[
    str | None,
    typer.Option(
        help="Largest relative increase of the loss, such as 1%; replaces --keep. The command then "
        "looks for the smallest size within it."
    ),
]
_PerLayer = Annotated[
    bool,
    typer.Option("--per-layer", help="Let layers have different sizes (Gramian models only)."),
]
_Projection = Annotated[
    bool,
    typer.Option(
        "--projection",
        help="Project the states, by maps of keys and queries (Gramian models with one gate per "
        "head and step only).",
    ),
]
_Multiple = Annotated[
    int | None,
    typer.Option(min=1, help="Number of which sizes are multiples (default: what kernels need)."),
]
_Context = Annotated[
    int | None,
    typer.Option(min=2, help="Number of tokens of a window (default: 1024 or the model's)."),
]
_MaxTokens = Annotated[int, typer.Option(min=1, help="Largest number of tokens to read.")]
_RecoverSteps = Annotated[
    int,
    typer.Option(
        min=0,
        help="Number of training steps in which the smaller model learns the predictions of the "
        "original on what states are chosen by.",
    ),
]
_Recover = Annotated[
    str,
    typer.Option(
        metavar="full|lora",
        help="What these steps train: all weights, or low-rank changes that are merged (needs "
        "peft).",
    ),
]
_RecoverCandidates = Annotated[
    int,
    typer.Option(
        min=1,
        help="Number of criteria, the best first, whose models are all trained; the one that is "
        "best afterwards is kept.",
    ),
]
_ChooseBy = Annotated[
    str,
    typer.Option(
        metavar="loss|accuracy",
        help="What criteria are compared by: the loss, or the share of right tokens.",
    ),
]
_RecoverRate = Annotated[
    float | None,
    typer.Option(help="Peak of their learning rate (default: 3e-4, or 1e-3 for lora)."),
]


@command
def shrink(
    model: _Model,
    out: NewFolder,
    text: _Text = None,
    labels: _Labels = None,
    keep: _Keep = None,
    max_increase: _MaxIncrease = None,
    per_layer: _PerLayer = False,
    projection: _Projection = False,
    multiple: _Multiple = None,
    context: _Context = None,
    max_tokens: _MaxTokens = 32_768,
    recover_steps: _RecoverSteps = 0,
    recover: _Recover = "full",
    recover_rate: _RecoverRate = None,
    recover_candidates: _RecoverCandidates = 1,
    choose_by: _ChooseBy = "loss",
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Make the states of MODEL's recurrences smaller, and save the new model in OUT.

    OUT also contains shrinkage.json and shrinkage.png, which show the states, errors and losses,
    and the model card README.md.
    """
    if (text is None) == (labels is None):
        raise typer.BadParameter("give one of --text and --labels.")
    if (keep is None) == (max_increase is None):
        raise typer.BadParameter("give one of --keep and --max-increase.")
    share = None if keep is None else _kept(keep)
    budget = None if max_increase is None else fraction("--max-increase", max_increase)
    recovery = _recovery(recover_steps, recover, recover_rate, recover_candidates)
    check_new(out)
    if not model.is_dir():
        raise UserError(f"there is no model folder {model}.")
    console = console_for(as_json)
    quiet_transformers()

    from gramian import analysis, shrinking
    from gramian._staging import staged_directory
    from gramian.models import write_card

    with running(console, "Reading the model", about=str(model)):
        loaded, tokenizer = analysis.open_model(model)
    if not loaded.can_generate():
        raise UserError(f"{model} is a {type(loaded).__name__}; shrink needs a language model.")
    move_model(loaded, device)
    texts: list[Any]
    if labels is not None:
        texts = _labelled(labels)
    else:
        assert text is not None
        texts = _token_ids(model, tokenizer, text)
    with staged_directory(out) as stage:
        with running(console, "Shrinking") as bar:
            small, report = shrinking.shrink(
                loaded,
                texts,
                keep=share,
                max_increase=budget,
                per_layer=per_layer,
                projection=projection,
                multiple=multiple,
                context=context,
                max_tokens=max_tokens,
                seed=seed,
                recover=recovery,
                choose_by=choose_by,
                progress=bar,
            )
        small.save_pretrained(stage)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        write_card(
            stage,
            small,
            f"A `{type(small).__name__}` made from `{model.resolve().name}`: the states of its "
            "recurrences have fewer coordinates (`gramian shrink`).",
            report,
            base=model,
            name=out.name,
        )
        (stage / "shrinkage.json").write_text(report.to_json() + "\n", encoding="utf-8")
        _draw(report, f"{model}, shrunk to {out}", stage / "shrinkage.png")
    finish(console, as_json, report.to_dict(), report, out)


def _kept(text: str) -> float | int:
    """Return the number of states that a text such as "32" means, or the share of "0.5"."""
    if text.isdecimal():
        return int(text)
    return fraction("--keep", text)


def _recovery(steps: int, method: str, rate: float | None, candidates: int) -> Recovery | None:
    """Return the recovery that the options mean, or None if there are no steps."""
    from gramian.shrinking import Recovery

    try:
        found = Recovery(max(1, steps), method, rate, candidates=candidates)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    if not steps and (method, rate, candidates) != ("full", None, 1):
        raise typer.BadParameter("options of a recovery need --recover-steps.")
    return found if steps else None


def _token_ids(model: Path, tokenizer: Any, text: Path) -> list[Tensor]:
    """Encode each document of a file as token ids (count,)."""
    from torch import from_numpy

    from gramian.tasks import Encoder

    if tokenizer is None:
        raise UserError(f"{model} has no tokenizer, so it cannot read a text; {SAVE_TOKENIZER}.")
    encode = Encoder(tokenizer)
    try:
        return [from_numpy(encode(document)) for document in read_texts(text)]
    except ValueError as error:
        raise UserError(one_line(error)) from error


def _labelled(file: Path) -> list[dict[str, Any]]:
    """Read rows of token ids and labels from JSON lines."""
    from gramian.tasks.documents import read_objects

    try:
        rows = list(read_objects(file))
    except ValueError as error:
        raise UserError(one_line(error)) from error
    except OSError as error:
        raise UserError(f"the labels {file} cannot be read: {error.strerror}.") from error
    if not rows or not rows[0].keys() & {"labels", "shift_labels"}:
        found = ", ".join(rows[0]) if rows else "no line"
        raise UserError(f"{file} must hold JSON lines with input_ids and labels; got {found}.")
    return rows


def _draw(report: ShrinkReport, title: str, path: Path) -> None:
    from gramian.reports import plot_shrinkage, save_figure

    try:
        save_figure(plot_shrinkage(report, title), path)
    except ImportError as error:  # the result is kept even if no figure can be drawn
        print(f"gramian: no figure: {one_line(error)}", file=sys.stderr)
