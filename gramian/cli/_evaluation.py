"""The command that scores a model: evaluate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from gramian._processes import world_size
from gramian.cli._app import (
    Debug,
    Json,
    Settings,
    TaskConfig,
    TaskSeed,
    UserError,
    app,
    check_new,
    find_tasks,
    one_line,
    quiet_transformers,
    read_texts,
)

if TYPE_CHECKING:
    from rich.progress import Progress

    from gramian.evaluation import Measure
    from gramian.tasks import Document, Task


@dataclass(frozen=True)
class _Wanted:
    """What is asked of a model: tasks of ours, names that the harness knows, texts."""

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


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a saved model, ours or not.")
    ],
    against: Annotated[
        str | None, typer.Option(help="Another model to compare with, such as the original.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Task of ours or of lm-evaluation-harness; may be repeated."),
    ] = None,
    settings: Settings = None,
    config: TaskConfig = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text or FASTA file for perplexity; may be repeated.")
    ] = None,
    window: Annotated[int | None, typer.Option(min=1, help="Tokens of a text at once.")] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between windows; half of one if not given.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of task files for lm-evaluation-harness.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question of the harness.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Of a task of ours; the test split if there is one.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Rows or documents of a task at most.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows or windows at once.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder for the numbers.")
    ] = None,
    seed: TaskSeed = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score MODEL on tasks and texts, perhaps beside another model: one table.

    Tasks are those of gramian.tasks and, by their own names, those of lm-evaluation-harness.
    """
    if not task and not text and config is None:
        raise typer.BadParameter("give at least one of --task, --config and --text.")
    if window is not None and stride is not None and stride > window:
        raise typer.BadParameter(f"--stride must be at most --window, {window}; got {stride}.")
    if output is not None:
        check_new(output)
    _require_one_process()
    quiet_transformers()
    found, seed = find_tasks(task or [], settings or [], config, seed)
    wanted = _wanted(
        tasks=found,
        harness=_of_the_harness(task or []),
        texts={str(path): read_texts(path) for path in text or []},
        split=split,
        seed=seed,
        window=window,
        stride=stride,
        limit=limit,
        shots=shots,
        batch_size=batch_size,
        include_path=include_path,
    )
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"there is no folder {include_path} of task files.")

    from rich.progress import Progress

    from gramian import evaluation

    console = Console(stderr=as_json)
    measured = {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for name in [model] if against is None else [against, model]:
            try:
                measured[name] = _measure(name, wanted, device, progress)
            except (OSError, ValueError) as error:
                raise UserError(f"{name}: {one_line(error)}") from error
    report = evaluation.EvaluationReport(
        model,
        tuple(measured[model]),
        against,
        () if against is None else tuple(measured[against]),
        _conditions(wanted),
    )
    if output is not None:
        from gramian._staging import staged_directory

        with staged_directory(output) as stage:
            (stage / "evaluation.json").write_text(report.to_json() + "\n", encoding="utf-8")
            (stage / "evaluation.md").write_text(report.to_markdown(), encoding="utf-8")
    if as_json:
        print(report.to_json())
    else:
        console.print(report)
        if output is not None:
            console.print(f"Written to {output}", highlight=False)
    if report.unusable:
        one = report.unusable[0]
        raise UserError(
            f"{one.metric} on {one.task} is {one.value}: the model's weights or outputs hold NaN "
            "or infinity."
        )


def _require_one_process() -> None:
    try:
        processes = world_size()
    except ValueError as error:
        raise UserError(one_line(error)) from error
    if processes > 1:
        raise UserError(
            f"evaluate runs in one process, not in {processes} that would each do all of it: start "
            "it without torchrun."
        )


def _conditions(wanted: _Wanted) -> dict[str, Any]:
    """What the numbers were measured on, but for the names of tasks and texts."""
    from dataclasses import asdict

    from gramian.tasks import choose_split

    conditions: dict[str, Any] = {"seed": wanted.seed}
    for key in ("limit", "window", "stride", "shots"):
        if (value := getattr(wanted, key)) is not None:
            conditions[key] = value
    if wanted.tasks:
        conditions["tasks"] = {
            name: {"split": choose_split(task, name, wanted.split), **asdict(task)}
            for name, task in wanted.tasks.items()
        }
    return conditions


def _wanted(**values: Any) -> _Wanted:
    wanted = _Wanted(**values)
    if wanted.harness:
        import importlib.util

        if importlib.util.find_spec("lm_eval") is None:
            from gramian import tasks
            from gramian._nearest import unknown

            raise UserError(
                f"{unknown('task', wanted.harness[0], tasks.names())} Those of "
                'lm-evaluation-harness need: pip install "gramian[evaluate]".'
            )
    return wanted


def _of_the_harness(names: list[str]) -> list[str]:
    from gramian import tasks

    return [name for name in names if name not in tasks.names()]


def _measure(name: str, wanted: _Wanted, device: str, progress: Progress) -> list[Measure]:
    """Everything that is wanted, of one model."""
    from gramian import evaluation
    from gramian.analysis import open_model
    from gramian.models import GramianForCausalLM, GramianPreTrainedModel

    bar = progress.add_task(f"Loading {name}", total=None)
    if not Path(name).exists():
        raise UserError(f"there is no model {name}.")
    model, tokenizer = open_model(name)
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {one_line(error)}") from error
    if wanted.texts or wanted.harness:
        if isinstance(model, GramianPreTrainedModel) and not isinstance(model, GramianForCausalLM):
            raise UserError(
                f"{name} is a {type(model).__name__}; texts need a causal language model."
            )
        if tokenizer is None:
            reason = f"{name} has no tokenizer, so it cannot read a text."
            if wanted.harness:
                from gramian import tasks
                from gramian._nearest import unknown

                reason = (
                    f"{name} has no tokenizer, which every task needs that is not ours: "
                    f"{unknown('task of ours', wanted.harness[0], tasks.names())}"
                )
            raise UserError(reason)

    def shown(key: str) -> Callable[[int, int], None]:
        return lambda done, total: progress.update(
            bar, description=f"{name}: {key}", completed=done, total=total
        )

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
    for key, text in wanted.texts.items():
        measures += evaluation.perplexity(
            model,
            tokenizer,
            text,
            window=wanted.window,
            stride=wanted.stride,
            batch_size=wanted.batch_size,
            progress=shown(key),
        ).measures(key)
    if wanted.harness:
        progress.stop()  # the harness has bars of its own
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
        progress.start()
    return measures
