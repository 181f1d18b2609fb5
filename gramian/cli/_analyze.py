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
    check_models,
    check_new,
    find_tasks,
    move_model,
    quiet_transformers,
    read_texts,
)
from gramian.cli._options import (
    Device,
    Include,
    Json,
    MaxChannels,
    Settings,
    Split,
    TaskConfig,
    TaskSeed,
)
from gramian.cli._texts import SeveralTexts, analyze_several

if TYPE_CHECKING:
    from rich.console import Console

    from gramian.analysis import StateComparison, StateReport
    from gramian.tasks import Document, Task

_Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL...",
        help="Folder of a saved model, of Gramian or of transformers; or a GGUF file.",
    ),
]
_Text = Annotated[
    list[Path] | None,
    typer.Option(
        help="Text, FASTA or JSON-lines file whose first document is read; repeatable, for means "
        "and spreads over several texts."
    ),
]
_Texts = Annotated[
    int, typer.Option(min=1, help="Number of documents to read from each --text file.")
]
_Prompt = Annotated[str | None, typer.Option(help="Text to read; replaces --text.")]
_Task = Annotated[
    str | None, typer.Option(help="Task of gramian.tasks whose row is read; replaces --text.")
]
_RowNumber = Annotated[int, typer.Option(min=0, help="Row of the split, counted from 0.")]
_Horizon = Annotated[int, typer.Option(min=1, help="Largest number of tokens to read.")]
_Every = Annotated[int, typer.Option(min=1, help="Measure at every N-th position only.")]
_Positions = Annotated[
    int | None,
    typer.Option(min=1, help="Measure at this many evenly spread positions; replaces --every."),
]
_Tolerance = Annotated[
    float | None,
    typer.Option(
        help="Estimate the mean of each layer up to this relative error, for long contexts; "
        "0.001 or more."
    ),
]
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
_Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="New folder for the report and figures.")
]
_Picture = Annotated[str, typer.Option("--format", help="Image format: png or svg.")]
_Page = Annotated[
    Path | None,
    typer.Option(help="File for an interactive page, which opens without a network."),
]
_Table = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="File with a row for each layer, head and position, of all models: .csv or .parquet.",
    ),
]
_Compare = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="REPORT",
        help="Saved report (JSON) to compare with, over relative depth; repeatable. Differences "
        "are from the first. Without MODEL, reports are compared with each other.",
    ),
]
_Ranks = Annotated[
    bool,
    typer.Option("--ranks", help="Measure stable and effective rank of recurrences' states, too."),
]
_Rank = Annotated[
    bool,
    typer.Option(
        "--rank", help="List the layers by the share of their state in use, and what to do."
    ),
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
    models: _Models = None,
    text: _Text = None,
    texts: _Texts = 1,
    prompt: _Prompt = None,
    task: _Task = None,
    settings: Settings = None,
    config: TaskConfig = None,
    split: Split = None,
    row: _RowNumber = 0,
    horizon: _Horizon = 256,
    every: _Every = 1,
    positions: _Positions = None,
    measure: _Measure = "entropy",
    tol: _Tol = None,
    rtol: _Rtol = None,
    tolerance: _Tolerance = None,
    max_channels: MaxChannels = 64,
    include: Include = "core",
    ranks: _Ranks = False,
    compare: _Compare = None,
    rank: _Rank = False,
    output: _Output = None,
    picture: _Picture = "png",
    html: _Page = None,
    table: _Table = None,
    seed: TaskSeed = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure how much of its memory MODEL uses on a text or task, for every layer, head and token.

    Several models are compared on the same input, over relative depth. Of several texts, means and
    spreads are shown. The command exits with status 1 if a model has no layer that can be read.
    """
    models, saved = models or [], [_load(path) for path in compare or []]
    _check(models, saved, (text or None, prompt, task, config), settings, picture)
    _check_texts(text or [], texts, bool(saved), rank)
    _check_outputs(output, table)
    options = {"measure": measure, "tol": tol, "rtol": rtol, "tolerance": tolerance}
    options |= {"every": every} if positions is None else {"positions": positions}
    _check_measure(saved if models else [], options)
    options |= {"max_channels": max_channels or None, "include": include, "ranks": ranks}
    if len(text or []) > 1 or texts > 1:
        files = (output, picture, html, table)
        wanted = SeveralTexts(text or [], texts, horizon, options, device, *files)
        analyze_several(models, wanted, as_json)
        return
    source = None
    if models:
        source = _document(text or [], prompt)
        source = source or _row(task, settings or [], config, seed, split, row)
    console = console_for(as_json)
    reports: list[StateReport] = []
    check_models(models)
    quiet_transformers()
    for one in models:
        assert source is not None
        with running(console, f"Reading with {one}", about=one) as bar:
            reports.append(_analyze(one, source, horizon, options, device, bar))
            if saved:
                _compared([*saved, *reports])  # refuse before the next model runs
        if not as_json:
            console.print(*([reports[-1], reports[-1].ranking()] if rank else [reports[-1]]))
    found = [*saved, *reports]
    comparison = _comparison(found, bool(saved), console)
    if comparison is not None and not as_json:
        console.print(comparison)
    _write(reports, found, comparison, _Outputs(output, picture, html, table))
    values = _values(reports, comparison, len(found))
    finish(console, as_json, values, None, output, html, table, indent=None)


@dataclass(frozen=True)
class _Outputs:
    """The files that are written."""

    output: Path | None
    picture: str
    html: Path | None
    table: Path | None


def _values(
    reports: list[StateReport], comparison: StateComparison | None, count: int
) -> dict[str, Any]:
    """Return the reports as JSON: a report alone, or several of `count` with their comparison."""
    if count == 1:
        return reports[0].to_dict()
    return {
        "models": [report.to_dict() for report in reports],
        "comparison": None if comparison is None else comparison.to_dict(),
    }


def _comparison(found: list[StateReport], wanted: bool, console: Console) -> StateComparison | None:
    """Compare several reports. If they cannot be compared, say so, or fail if it was asked for."""
    if len(found) < 2:
        return None
    try:
        return _compared(found)
    except ValueError as error:
        if wanted:
            raise UserError(one_line(error)) from error
        console.print(f"Not compared: {error}", highlight=False)
        return None


def _write(
    reports: list[StateReport],
    found: list[StateReport],
    comparison: StateComparison | None,
    outputs: _Outputs,
) -> None:
    """Write what was asked for. The arguments are those of `_save`."""
    if outputs.output is not None:
        _save(reports, found, comparison, outputs.output, outputs.picture)
    if outputs.html is not None:
        from gramian.reports import save_state_page

        save_state_page(found, outputs.html)
    if outputs.table is not None:
        from gramian._frames import save_frame
        from gramian.analysis import state_frame

        save_frame(state_frame(reports or found), outputs.table)


def _check(
    models: list[str],
    saved: list[StateReport],
    sources: tuple[Any, ...],
    settings: list[str] | None,
    picture: str,
) -> None:
    """Check the options. The sources are --text, --prompt, --task and --config."""
    given = sum(source is not None for source in sources)
    if not models and len(saved) < 2:
        raise typer.BadParameter("give a MODEL, or at least two reports with --compare.")
    if given != bool(models):
        kinds = "--text FILE, --prompt TEXT, --task NAME and --config FILE"
        raise typer.BadParameter(
            f"give one of {kinds}." if models else f"{kinds} need a MODEL that reads them."
        )
    if settings and sources[2:] == (None, None):
        raise typer.BadParameter("--set needs --task NAME or --config FILE.")
    if picture not in ("png", "svg"):
        raise typer.BadParameter(f"--format must be png or svg; got {picture!r}.")


def _check_texts(text: list[Path], texts: int, compares: bool, rank: bool) -> None:
    """Check the options that go with several texts."""
    if texts > 1 and not text:
        raise typer.BadParameter("--texts needs --text FILE.")
    if (texts > 1 or len(text) > 1) and (compares or rank):
        raise typer.BadParameter("--compare and --rank take one text.")


def _check_outputs(output: Path | None, table: Path | None) -> None:
    """Raise an error if the outputs could not be written, before anything is computed."""
    from gramian._frames import check_frame_file

    if output is not None:
        check_new(output)
    if table is not None:
        try:
            check_frame_file(table)
        except ValueError as error:
            raise typer.BadParameter(f"--table: {error}") from error


def _check_measure(saved: list[StateReport], options: dict[str, Any]) -> None:
    """Refuse to compare with reports of another measure, before a model is opened."""
    wanted = (options["measure"], options["tol"], options["rtol"])
    for report in saved:
        if (report.measure, report.tol, report.rtol) != wanted:
            raise UserError(
                f"the report of {report.model} has the measure {report.measure} (tol {report.tol}, "
                f"rtol {report.rtol}); give the same --measure, --tol and --rtol."
            )


def _load(path: Path) -> StateReport:
    """Return a saved report, whose model is named with the file."""
    from gramian.analysis import StateReport

    try:
        report = StateReport.load(path)
    except ValueError as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    return dataclasses.replace(report, model=f"{report.model} ({path})")


def _compared(reports: list[StateReport]) -> StateComparison:
    from gramian.analysis import compare_reports

    return compare_reports(reports)


def _document(text: list[Path], prompt: str | None) -> _Source | None:
    """Read the first document of a file or a prompt, or return None if neither is given."""
    from gramian.tasks import documents_in

    if text:
        documents, source = read_texts(text[0]), str(text[0])
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


def _row(
    name: str | None,
    settings: list[str],
    config: Path | None,
    seed: int | None,
    split: str | None,
    row: int,
) -> _Source:
    """Build the task that is named or configured, and return its row as a source."""
    from gramian import tasks
    from gramian._nearest import unknown

    if name is not None and name not in tasks.names():
        raise UserError(unknown("task", name, tasks.names()))
    found, seed = find_tasks([] if name is None else [name], settings, config, seed)
    [(name, task)] = found.items()
    return _Source(name, None, task, split, seed, row)


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


def _save(
    reports: list[StateReport],
    found: list[StateReport],
    comparison: StateComparison | None,
    output: Path,
    suffix: str,
) -> None:
    """Write a folder with JSON, figures and an interactive page.

    Args:
        reports: The reports of models that were analyzed now, which are saved and drawn.
        found: These and the ones that they are compared with.
        comparison: The comparison of `found`, or None.
        output: New folder.
        suffix: Format of the figures.
    """
    from gramian import reports as drawing
    from gramian._json import to_json
    from gramian._staging import staged_directory

    with staged_directory(output) as stage:
        drawing.save_state_page(found, stage / "page.html")
        for index, report in enumerate(reports):
            number = f"-{index + 1}" if len(reports) > 1 else ""
            report.save(stage / f"report{number}.json")
            for name, plot in (
                ("map", drawing.plot_state_map),
                ("curves", drawing.plot_state_curves),
                ("utilization", drawing.plot_utilization),
            ):
                drawing.save_figure(plot(report), stage / f"{name}{number}.{suffix}")
        if len(found) > 1:
            named = {f"{i + 1}: {report.model}": report for i, report in enumerate(found)}
            figure = drawing.plot_state_comparison(named)
            drawing.save_figure(figure, stage / f"comparison.{suffix}")
        if comparison is not None:
            (stage / "comparison.json").write_text(to_json(comparison.to_dict()) + "\n", "utf-8")
            figure = drawing.plot_depth_comparison(comparison)
            drawing.save_figure(figure, stage / f"depth.{suffix}")
