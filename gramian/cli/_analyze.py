"""Define the command `analyze`, which measures effective state-sizes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gramian.cli._app import UserError, command, one_line
from gramian.cli._console import Bar, console_for, finish, running
from gramian.cli._inputs import (
    SAVE_TOKENIZER,
    check_new,
    find_tasks,
    move_model,
    quiet_transformers,
    read_texts,
)
from gramian.cli._options import Device, Json, Settings, Split, TaskConfig, TaskSeed

if TYPE_CHECKING:
    from gramian.analysis import StateReport
    from gramian.tasks import Document, Task

_Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="Folder of a saved model, of Gramian or of transformers; or a GGUF file.",
    ),
]
_Text = Annotated[
    Path | None, typer.Option(help="Text or FASTA file whose first document is read.")
]
_Prompt = Annotated[str | None, typer.Option(help="Text to read; replaces --text.")]
_Task = Annotated[
    str | None, typer.Option(help="Task of gramian.tasks whose row is read; replaces --text.")
]
_Row = Annotated[int, typer.Option(min=0, help="Row of the split, counted from 0.")]
_Horizon = Annotated[int, typer.Option(min=1, help="Largest number of tokens to read.")]
_Every = Annotated[int, typer.Option(min=1, help="Measure at every N-th position only.")]
_Measure = Annotated[
    str, typer.Option(help="Measure of the effective state-size: entropy or tolerance.")
]
_Tol = Annotated[
    float | None,
    typer.Option(help="With --measure tolerance: count singular values above this."),
]
_Rtol = Annotated[
    float | None,
    typer.Option(help="The same, but with a threshold relative to the largest singular value."),
]
_MaxChannels = Annotated[
    int,
    typer.Option(min=0, help="Largest number of channels to measure in a layer; 0 measures all."),
]
_Include = Annotated[
    str,
    typer.Option(
        help="core: short convolutions are layers of their own; mixer: they are parts of the scans "
        "that they feed."
    ),
]
_Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="New folder for the report and figures.")
]
_Picture = Annotated[str, typer.Option("--format", help="Image format: png or svg.")]
_Page = Annotated[
    Path | None,
    typer.Option(help="File for an interactive page, which opens without a network."),
]


@dataclass(frozen=True)
class _Source:
    """The input that all models read: a document, or a row of a task."""

    name: str
    document: Document | None = None
    task: Task | None = None
    split: str | None = None
    seed: int = 0
    row: int = 0

    def read(self, model: str, tokenizer: Any) -> tuple[Any, Any, str]:
        """Return the input of a model, the tokenizer for its tokens, and a name of the input."""
        from gramian.evaluation import read_row
        from gramian.tasks import Encoder

        if self.task is not None:
            found = read_row(self.task, self.name, tokenizer, self.split, self.seed, self.row)
            return found.inputs, found.tokenizer, found.place
        if tokenizer is None:
            raise UserError(
                f"{model} has no tokenizer, so it cannot read a text; {SAVE_TOKENIZER}. --task and "
                "--config read a row of a task."
            )
        assert self.document is not None
        return Encoder(tokenizer)(self.document).tolist(), tokenizer, self.name


@command
def analyze(
    models: _Models,
    text: _Text = None,
    prompt: _Prompt = None,
    task: _Task = None,
    settings: Settings = None,
    config: TaskConfig = None,
    split: Split = None,
    row: _Row = 0,
    horizon: _Horizon = 256,
    every: _Every = 1,
    measure: _Measure = "entropy",
    tol: _Tol = None,
    rtol: _Rtol = None,
    max_channels: _MaxChannels = 64,
    include: _Include = "core",
    output: _Output = None,
    picture: _Picture = "png",
    html: _Page = None,
    seed: TaskSeed = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure how much of its memory MODEL uses on a text or task, for every layer, head and token.

    Several models are compared on the same input. The command exits with status 1 if a model has no
    layer that can be read.
    """
    _check(text, prompt, task, settings, config, picture)
    if output is not None:
        check_new(output)
    source = _document(text, prompt)
    if source is None:
        name, chosen, of_seed = _one_task(task, settings or [], config, seed)
        source = _Source(name, None, chosen, split, of_seed, row)
    console, reports = console_for(as_json), []
    options = {"every": every, "measure": measure, "tol": tol, "rtol": rtol}
    options |= {"max_channels": max_channels or None, "include": include}
    quiet_transformers()
    for one in models:
        with running(console, f"Reading with {one}", about=one) as bar:
            reports.append(_analyze(one, source, horizon, options, device, bar))
        if not as_json:
            console.print(reports[-1])
    if output is not None:
        _save(reports, output, picture)
    if html is not None:
        from gramian.reports import save_state_page

        save_state_page(reports, html)
    found = [report.to_dict() for report in reports]
    values = found[0] if len(found) == 1 else {"models": found}
    finish(console, as_json, values, None, output, html, indent=None)


def _check(
    text: Path | None,
    prompt: str | None,
    task: str | None,
    settings: list[str] | None,
    config: Path | None,
    picture: str,
) -> None:
    if sum(source is not None for source in (text, prompt, task, config)) != 1:
        raise typer.BadParameter(
            "give one of --text FILE, --prompt TEXT, --task NAME and --config FILE."
        )
    if settings and task is None and config is None:
        raise typer.BadParameter("--set needs --task NAME or --config FILE.")
    if picture not in ("png", "svg"):
        raise typer.BadParameter(f"--format must be png or svg; got {picture!r}.")


def _document(text: Path | None, prompt: str | None) -> _Source | None:
    """Read the first document of a file or a prompt, or return None if neither is given."""
    from gramian.tasks import documents_in

    if text is not None:
        documents, source = read_texts(text), str(text)
    elif prompt is not None:
        source = "the prompt"
        try:
            documents = documents_in(prompt, source)
        except ValueError as error:
            raise UserError(one_line(error)) from error
    else:
        return None
    if not documents:
        raise UserError(f"{source} has no tokens: it is empty.")
    if len(documents) > 1:
        name = f", {documents[0].name}" if documents[0].genome else ""
        source += f", document 1 of {len(documents)}{name}"
    return _Source(source, documents[0])


def _one_task(
    name: str | None, settings: list[str], config: Path | None, seed: int | None
) -> tuple[str, Task, int]:
    """Build the task that is named or configured, and return its name, the task and the seed."""
    from gramian import tasks
    from gramian._nearest import unknown

    if name is not None and name not in tasks.names():
        raise UserError(unknown("task", name, tasks.names()))
    found, seed = find_tasks([] if name is None else [name], settings, config, seed)
    [(name, task)] = found.items()
    return name, task, seed


def _analyze(
    name: str,
    source: _Source,
    horizon: int,
    options: dict[str, Any],
    device: str,
    progress: Bar,
) -> StateReport:
    """Measure one model on the input."""
    from gramian import analysis

    model, tokenizer = analysis.open_model(name, progress=progress)
    move_model(model, device)
    sequence, tokenizer, read = source.read(name, tokenizer)
    report = analysis.analyze(
        model, sequence[:horizon], tokenizer=tokenizer, progress=progress, **options
    )
    if not report.layers:
        raise UserError(
            f"No layer of {name} could be read: "
            + "; ".join(f"{path}: {reason}" for path, reason in report.unread)
        )
    return dataclasses.replace(report, model=name.rstrip("/"), source=read)


def _save(reports: list[StateReport], output: Path, suffix: str) -> None:
    """Write a folder with the reports as JSON, figures and an interactive page."""
    from gramian import reports as drawing
    from gramian._staging import staged_directory

    with staged_directory(output) as stage:
        drawing.save_state_page(reports, stage / "page.html")
        for index, report in enumerate(reports):
            number = f"-{index + 1}" if len(reports) > 1 else ""
            report.save(stage / f"report{number}.json")
            for name, plot in (
                ("map", drawing.plot_state_map),
                ("curves", drawing.plot_state_curves),
                ("utilization", drawing.plot_utilization),
            ):
                drawing.save_figure(plot(report), stage / f"{name}{number}.{suffix}")
        if len(reports) > 1:
            named = {f"{i + 1}: {report.model}": report for i, report in enumerate(reports)}
            figure = drawing.plot_state_comparison(named)
            drawing.save_figure(figure, stage / f"comparison.{suffix}")
