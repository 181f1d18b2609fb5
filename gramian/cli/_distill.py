"""Define the command `distill`, which turns long filters into small recurrences."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gramian.cli._app import UserError, command, one_line
from gramian.cli._console import Bar, console_for, finish, running
from gramian.cli._inputs import (
    check_new,
    check_shard_size,
    check_tolerance,
    fraction,
    load_any_model,
    load_tokenizer,
    spread_windows,
)
from gramian.cli._options import Device, Json, MaxShardSize, ModelFolder, NewFolder

if TYPE_CHECKING:
    from torch import Tensor

    from gramian.distillation import DistillationReport, Trial

_Tol = Annotated[
    float | None,
    typer.Option(help="Largest relative l2 error of a filter (default: 0.001)."),
]
_Order = Annotated[
    int | None, typer.Option(help="State dimension of every filter; replaces --tol.")
]
_MaxIncrease = Annotated[
    str | None,
    typer.Option(
        help="Largest relative increase of the loss on --text, such as 0.1%. The command then "
        "looks for the largest tolerance, up to 0.3, that stays within it."
    ),
]
_Text = Annotated[
    Path | None,
    typer.Option(help="Text or FASTA file on which losses are measured; --finetune trains on it."),
]
_MaxTokens = Annotated[
    int, typer.Option(help="Number of tokens of --text on which losses are measured.")
]
_Finetune = Annotated[
    int, typer.Option(help="Number of training steps on --text after the filters are replaced.")
]
_MaxOrder = Annotated[
    int | None,
    typer.Option(help="Largest state dimension to try for a tolerance (default: 256)."),
]
_Tail = Annotated[
    str,
    typer.Option(
        help="Response of a filter past its last tap: zero makes it fade; auto and free leave it "
        "unconstrained, which needs the smallest state."
    ),
]


@dataclass(frozen=True)
class _Wanted:
    """The requested sizes or errors of the reduced filters."""

    tol: float
    order: int | None
    budget: float | None
    finetune: int
    max_order: int | None
    tail: str


@command
def distill(
    model: ModelFolder,
    out: NewFolder,
    tol: _Tol = None,
    order: _Order = None,
    max_increase: _MaxIncrease = None,
    text: _Text = None,
    max_tokens: _MaxTokens = 65_536,
    finetune: _Finetune = 0,
    max_order: _MaxOrder = None,
    tail: _Tail = "auto",
    max_shard_size: MaxShardSize = "5GB",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Replace the long filters of MODEL by small recurrences, and save the new model in OUT.

    OUT also contains distillation.json and distillation.png, which show the orders, errors and
    bounds of every layer, and the model card README.md.
    """
    given = [name for name in (tol, order, max_increase) if name is not None]
    if len(given) > 1:
        raise typer.BadParameter("give one of --tol, --order and --max-increase.")
    if (max_increase is not None or finetune) and text is None:
        raise typer.BadParameter("--max-increase and --finetune need --text FILE.")
    budget = None if max_increase is None else fraction("--max-increase", max_increase)
    wanted = _Wanted(1e-3 if tol is None else tol, order, budget, finetune, max_order, tail)
    _check(wanted)
    check_new(out)
    console = console_for(as_json)
    loaded = load_any_model(model, device)
    if text is not None and not loaded.can_generate():
        raise UserError(f"{model} is a {type(loaded).__name__}; --text needs a language model.")
    check_shard_size(max_shard_size)
    tokenizer = load_tokenizer(model)
    windows = None if text is None else spread_windows(model, loaded, text, max_tokens)

    from gramian._staging import staged_directory
    from gramian.models import write_card

    with staged_directory(out) as stage:
        with running(console, "Distilling") as bar:
            distilled, report = _distill(loaded, wanted, windows, bar)
        distilled.save_pretrained(stage, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        write_card(
            stage,
            distilled,
            f"A `{type(distilled).__name__}` made from `{model.resolve().name}`. Small recurrences "
            "replace its long filters (`gramian distill`), so that it generates in constant time "
            "and memory per token.",
            report,
            base=model,
            name=out.name,
        )
        (stage / "distillation.json").write_text(report.to_json() + "\n", encoding="utf-8")
        _draw(report, f"{model}, distilled to {out}", stage / "distillation.png")
    finish(console, as_json, report.to_dict(), report, out)


def _check(wanted: _Wanted) -> None:
    check_tolerance(wanted.tol)
    for name, number in (("order", wanted.order), ("largest order", wanted.max_order)):
        if number is not None and number < 1:
            raise UserError(f"the {name} must be at least 1; got {number}.")
    if wanted.finetune < 0:
        raise UserError(f"--finetune takes a number of steps; got {wanted.finetune}.")


def _distill(
    model: Any, wanted: _Wanted, windows: Tensor | None, bar: Bar
) -> tuple[Any, DistillationReport]:
    """Distil a model in place, so that its other weights are in memory once."""
    from gramian import distillation

    def tell(trial: Trial) -> None:
        bar.describe(f"Distilling; at {trial.tol:.1e}: {trial.increase:+.3%}")

    options: dict[str, Any] = {"max_order": wanted.max_order, "tail": wanted.tail}
    if wanted.budget is not None:
        assert windows is not None
        distilled, report = distillation.distill_to_budget(
            model, windows, wanted.budget, inplace=True, progress=tell, **options
        )
    else:
        loss = None if windows is None else distillation.mean_loss(model, windows)
        distilled, report = distillation.distill(
            model, wanted.tol, wanted.order, inplace=True, progress=bar, **options
        )
        if loss is not None and windows is not None:
            quality = distillation.measure_quality(loss, distilled, report, windows)
            report = dataclasses.replace(report, quality=quality)
    if wanted.finetune:
        assert windows is not None and report.quality is not None
        bar.describe("Fine-tuning")
        losses = distillation.finetune(distilled, windows, wanted.finetune, progress=bar)
        quality = dataclasses.replace(report.quality, finetuned=losses)
        report = dataclasses.replace(report, quality=quality)
    return distilled, report


def _draw(report: DistillationReport, title: str, path: Path) -> None:
    from gramian.reports import plot_distillation, save_figure

    try:
        save_figure(plot_distillation(report, title), path)
    except ImportError as error:  # the result is kept even if no figure can be drawn
        print(f"gramian: no figure: {one_line(error)}", file=sys.stderr)
