"""Define the command `evaluate`, which scores a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gramian._processes import require_one_process
from gramian.cli._app import UserError, command, one_line
from gramian.cli._console import Bar, console_for, finish, running
from gramian.cli._inputs import (
    SAVE_TOKENIZER,
    check_new,
    find_tasks,
    move_model,
    quiet_transformers,
    read_texts,
    read_training_texts,
    recall_options,
)
from gramian.cli._options import (
    Device,
    Json,
    Rare,
    Settings,
    Split,
    TaskConfig,
    TaskSeed,
    TrainingText,
)

if TYPE_CHECKING:
    from gramian.evaluation import EvaluationReport, Measure
    from gramian.tasks import Document, Task

_Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Folder of a saved model, of Gramian or of transformers."),
]
_Against = Annotated[
    str | None, typer.Option(help="Model to compare MODEL with, such as the original.")
]
_Task = Annotated[
    list[str] | None,
    typer.Option(help="Task of gramian.tasks or of lm-evaluation-harness; repeatable."),
]
_Text = Annotated[
    list[Path] | None,
    typer.Option(help="Text or FASTA file to measure perplexity on; repeatable."),
]
_Window = Annotated[
    int | None, typer.Option(min=1, help="Number of tokens of a text that the model reads at once.")
]
_Stride = Annotated[
    int | None,
    typer.Option(
        min=1, help="Number of tokens from one window to the next (default: half of --window)."
    ),
]
_IncludePath = Annotated[
    Path | None, typer.Option(help="Folder of further task files for lm-evaluation-harness.")
]
_Shots = Annotated[
    int | None,
    typer.Option(min=0, help="Solved examples before each question of lm-evaluation-harness."),
]
_Limit = Annotated[
    int | None, typer.Option(min=1, help="Largest number of rows or documents of a task.")
]
_BatchSize = Annotated[int, typer.Option(min=1, help="Number of rows or windows in a batch.")]
_Output = Annotated[Path | None, typer.Option("--output", "-o", help="New folder for the results.")]


@dataclass(frozen=True)
class _Wanted:
    """The requested evaluations: tasks of gramian.tasks, names of harness tasks, and texts."""

    tasks: dict[str, Task]
    harness: list[str]
    texts: dict[str, list[Document]]
    split: str | None
    seed: int
    window: int | None
    stride: int | None
    limit: int | None
    shots: int | None
    batch_size: int
    include_path: Path | None
    training: list[Document]
    rare: int | None


@command
def evaluate(
    model: _Model,
    against: _Against = None,
    task: _Task = None,
    settings: Settings = None,
    config: TaskConfig = None,
    text: _Text = None,
    window: _Window = None,
    stride: _Stride = None,
    training_text: TrainingText = None,
    rare: Rare = None,
    include_path: _IncludePath = None,
    shots: _Shots = None,
    split: Split = None,
    limit: _Limit = None,
    batch_size: _BatchSize = 8,
    device: Device = "cpu",
    output: _Output = None,
    seed: TaskSeed = None,
    as_json: Json = False,
) -> None:
    """Score MODEL on tasks and texts in one table, alone or in comparison with another model.

    Tasks are named as in gramian.tasks or as in lm-evaluation-harness.
    """
    if not task and not text and config is None:
        raise typer.BadParameter("give at least one of --task, --config and --text.")
    if window is not None and stride is not None and stride > window:
        raise typer.BadParameter(f"--stride must be at most --window, {window}; got {stride}.")
    if training_text and not text:
        raise typer.BadParameter("--training-text needs --text, whose perplexity it refines.")
    _require_one_process()
    for name in [model] if against is None else [against, model]:
        if not Path(name).exists():
            raise UserError(f"there is no model {name}.")
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"there is no folder {include_path} of task files.")
    if output is not None:
        check_new(output)
    quiet_transformers()
    found, seed = find_tasks(task or [], settings or [], config, seed)
    texts = {str(path): read_texts(path) for path in text or []}
    training = read_training_texts(training_text, rare)
    harness = _of_the_harness(task or [])
    options = (split, seed, window, stride, limit, shots, batch_size, include_path, training, rare)
    report = _compare(model, against, _Wanted(found, harness, texts, *options), device, as_json)
    if output is not None:
        _save(report, output)
    finish(console_for(as_json), as_json, report.to_dict(), report, output)
    if report.unusable:
        one = report.unusable[0]
        raise UserError(
            f"{one.metric} on {one.task} is {one.value}: the model's weights or outputs hold NaN "
            "or infinity."
        )


def _require_one_process() -> None:
    try:
        require_one_process("evaluate runs in one process")
    except ValueError as error:
        raise UserError(one_line(error)) from error


def _of_the_harness(names: list[str]) -> list[str]:
    """Return the names of tasks that only the harness can have, and check that it is installed."""
    import importlib.util

    from gramian import tasks
    from gramian._nearest import unknown

    others = [name for name in names if name not in tasks.names()]
    if others and importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"{unknown('task', others[0], tasks.names())} Those of "
            'lm-evaluation-harness need: pip install "gramian[evaluate]".'
        )
    return others


def _compare(
    model: str, against: str | None, wanted: _Wanted, device: str, as_json: bool
) -> EvaluationReport:
    """Measure the reference model, if there is one, and then the model."""
    from gramian.evaluation import EvaluationReport

    measured = {}
    for name in [model] if against is None else [against, model]:
        with running(console_for(as_json), f"Loading {name}", about=name) as bar:
            measured[name] = tuple(_measure(name, wanted, device, bar))
    before = () if against is None else measured[against]
    return EvaluationReport(model, measured[model], against, before, _conditions(wanted))


def _conditions(wanted: _Wanted) -> dict[str, Any]:
    """Return everything that results depend on, such as the seed, the window and the splits."""
    from dataclasses import asdict

    from gramian.evaluation import RARE
    from gramian.tasks import choose_split

    conditions: dict[str, Any] = {"seed": wanted.seed}
    for key in ("limit", "window", "stride", "shots"):
        if (value := getattr(wanted, key)) is not None:
            conditions[key] = value
    if wanted.training:
        conditions["rare"] = RARE if wanted.rare is None else wanted.rare
    if wanted.tasks:
        conditions["tasks"] = {
            name: {"split": choose_split(task, name, wanted.split), **asdict(task)}
            for name, task in wanted.tasks.items()
        }
    return conditions


def _save(report: EvaluationReport, output: Path) -> None:
    from gramian._staging import staged_directory

    with staged_directory(output) as stage:
        (stage / "evaluation.json").write_text(report.to_json() + "\n", encoding="utf-8")
        (stage / "evaluation.md").write_text(report.to_markdown(), encoding="utf-8")


def _measure(name: str, wanted: _Wanted, device: str, bar: Bar) -> list[Measure]:
    """Run all requested evaluations of one model."""
    from gramian import evaluation

    model, tokenizer = _open(name, wanted, device, bar)

    def shown(key: str) -> Callable[[int, int], None]:
        bar.describe(f"{name}: {key}")
        return bar

    measures = []
    for key, task in wanted.tasks.items():
        measures += evaluation.evaluate_task(
            model,
            task,
            name=key,
            split=wanted.split,
            seed=wanted.seed,
            examples=wanted.limit,
            batch_size=wanted.batch_size,
            tokenizer=tokenizer,
            progress=shown(key),
        )
    recall = recall_options(wanted.training, wanted.rare, tokenizer)
    for key, text in wanted.texts.items():
        measures += evaluation.perplexity(
            model,
            tokenizer,
            text,
            window=wanted.window,
            stride=wanted.stride,
            batch_size=wanted.batch_size,
            progress=shown(key),
            **recall,
        ).measures(key)
    if wanted.harness:
        with bar.hidden():  # the harness has bars of its own
            measures += evaluation.evaluate_harness(
                model,
                tokenizer,
                wanted.harness,
                include_path=wanted.include_path,
                limit=wanted.limit,
                shots=wanted.shots,
                batch_size=wanted.batch_size,
                seed=wanted.seed,
            )
    return measures


def _open(name: str, wanted: _Wanted, device: str, bar: Bar) -> tuple[Any, Any]:
    """Load a model that supports the requested evaluations, and its tokenizer."""
    from gramian.analysis import open_model
    from gramian.models import GramianForCausalLM, GramianPreTrainedModel

    model, tokenizer = open_model(name, progress=bar)
    move_model(model, device)
    if not (wanted.texts or wanted.harness):
        return model, tokenizer
    if isinstance(model, GramianPreTrainedModel) and not isinstance(model, GramianForCausalLM):
        raise UserError(f"{name} is a {type(model).__name__}; texts need a causal language model.")
    if tokenizer is None:
        reason = f"{name} has no tokenizer, so it cannot read a text; {SAVE_TOKENIZER}."
        if wanted.harness:
            from gramian import tasks
            from gramian._nearest import unknown

            reason = (
                f"{name} has no tokenizer, which every task needs that is not ours: "
                f"{unknown('task of ours', wanted.harness[0], tasks.names())}"
            )
        raise UserError(reason)
    return model, tokenizer
