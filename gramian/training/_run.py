"""Run one training: make the task and the model, train, and write the run's folder.

config.yaml        the configuration
environment.json   a list: versions, machine and command at the start and at each resumption
metrics.jsonl      one line for each log entry
samples.jsonl      the model's predictions for a few rows at each evaluation
checkpoints/       checkpoints, from which an interrupted run resumes
imports/           copies of the user's modules that registered parts of the run
best/, last/       models for `from_pretrained`
training.png       losses and metrics against steps
report.json        the report; it is written last, so a run that has a report is finished
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from gramian import tasks
from gramian._checks import check_choice
from gramian._drawing import save_figure
from gramian._imports import copy_parts, import_parts
from gramian._nearest import unknown
from gramian._staging import staged_file
from gramian.memory import MemoryLosses, restore_modes
from gramian.memory.callbacks import StateSizeCallback
from gramian.memory.truncation import mode_filters
from gramian.models import GramianConfig, write_card
from gramian.models.adapters import tokenizer_folder
from gramian.models.labels import LabelError
from gramian.tasks import Description, Kind, Task, find_kind
from gramian.tasks.encoding import load_tokenizer
from gramian.tasks.kinds import higher_is_better
from gramian.training.arguments import count_steps, make_arguments
from gramian.training.collation import Collator, Packer
from gramian.training.configuration import (
    IMPORTS,
    ConfigError,
    TrainingConfig,
    parse_config,
)
from gramian.training.plots import plot_training
from gramian.training.progress import Progress, StepCallback
from gramian.training.recording import (
    Recorder,
    Sampler,
    cut_after,
    environment,
    read_lines,
    write_json,
)
from gramian.training.rows import Rows
from gramian.training.starting import (
    adapt,
    base_of,
    check_adapter,
    check_compiling,
    load_saved,
    name_labels,
    saved_names,
)
from gramian.training.teaching import load_teaching
from gramian.training.trainer import Goal, GramianTrainer, Patience, complete_checkpoints

__all__ = ["TrainingReport", "check", "earlier_report", "train"]


@dataclass(frozen=True)
class TrainingReport:
    """The results of a run.

    Attributes:
        output: the run's folder.
        steps: number of optimizer steps, over all resumptions.
        parameters: number of parameters of the model.
        metrics: a mapping from the names of metrics to their values at the last evaluation.
        best: a mapping with two entries. The name of `evaluation.metric` maps to its best value,
            and `"step"` to the optimizer step of that evaluation.
        seconds: wall time of training in seconds, counted from the last resumption.
        resumed_from: the step from which the run was last resumed, or 0 if the run was never
            resumed.
    """

    output: str
    steps: int
    parameters: int
    metrics: dict[str, float]
    best: dict[str, Any]
    seconds: float
    resumed_from: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def train(config: TrainingConfig, *, progress: Progress = False) -> TrainingReport:
    """Train a model as `config` describes, or resume an interrupted run with the same `config`.

    Under `torchrun` every process calls the function with the same configuration.

    Args:
        config: a configuration from `load_config` or `parse_config`.
        progress: whether to show a progress bar on standard error; or a function that is called as
            `progress(done, total)` with numbers of optimizer steps.

    Returns:
        The report, which is also saved in the run's folder. If the run is already finished, nothing
        is trained and the saved report is returned.

    Raises:
        ConfigError: if the task, its labels, the model, the batch size and the number of processes
            do not fit together, or if the folder holds another run.
        DivergedError: if the loss or a weight is no longer finite. Earlier checkpoints are kept,
            and the same call resumes from the last checkpoint.
        FileNotFoundError: if a file of the task is missing.
    """
    folder = Path(config.output)
    _import(config)
    task = _task(config)
    description = task.description()
    if config.hardware.threads is not None:
        torch.set_num_threads(config.hardware.threads)
    set_seed(config.seed)
    model = _model(config, description)
    _restore_truncation(model, folder, config)
    name_labels(model, task.classes())
    try:
        data: Any = task.dataset("train", config.seed, streaming=bool(config.task.get("streaming")))
        held_out: Any = task.dataset(config.evaluation.split, config.seed)
    except ValueError as error:
        raise ConfigError(f"task {config.task['name']}: {error}") from error
    if config.evaluation.examples is not None:
        held_out = held_out.select(range(min(len(held_out), config.evaluation.examples)))
    arguments = make_arguments(config, model, count_steps(config, data), bar=progress is True)
    _check_one_process(config, arguments)
    losses, packer = _losses(model, config), _packer(config, description)
    teaching = load_teaching(config, model, description)

    with arguments.main_process_first(local=False):
        report = _prepare(folder, config, arguments)
    if report is not None:
        return report
    checkpoints = complete_checkpoints(folder / "checkpoints")
    resumed_from = int(checkpoints[-1].name.rsplit("-", 1)[1]) if checkpoints else 0

    set_seed(config.seed)
    with _tensorboard_in(folder):
        trainer = GramianTrainer(
            description,
            folder,
            tokenizer=_tokenizer(config, task),
            losses=losses,
            teaching=teaching,
            packer=packer,
            truncation=config.regularization.truncation,
            decay_all=config.optimization.decay_all,
            model=model,
            args=arguments,
            train_dataset=Rows(data) if hasattr(data, "__len__") else data,
            eval_dataset=Rows(held_out),
            data_collator=Collator(description),
        )
    trainer.remove_callback(PrinterCallback)
    if callable(progress):
        trainer.add_callback(StepCallback(progress))
    trainer.add_callback(Recorder(folder / "metrics.jsonl"))
    sizes = config.evaluation.ess
    if sizes.rows and not config.hardware.fsdp:
        trainer.add_callback(
            StateSizeCallback(trainer, sizes.rows, every=sizes.every, max_channels=sizes.channels)
        )
    if config.evaluation.patience is not None:
        trainer.add_callback(Patience(config.evaluation.patience))
    if config.evaluation.stop_at is not None:
        trainer.add_callback(Goal(config.evaluation.metric, config.evaluation.stop_at))
    if not config.hardware.fsdp:  # no process holds the whole of a sharded model
        rows = [held_out[index] for index in range(min(len(held_out), config.evaluation.samples))]
        length = config.evaluation.sample_length
        trainer.add_callback(Sampler(folder / "samples.jsonl", rows, description, length))

    began = time.perf_counter()
    with _without_bars():
        try:
            trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
        except LabelError as error:
            raise ConfigError(f"task {config.task['name']}: {error}") from error
        trainer.save_as("last")
    seconds = time.perf_counter() - began
    with arguments.main_process_first(local=False):
        if trainer.is_world_process_zero():
            _finish(folder, config, trainer, seconds, resumed_from)
    return _read_report(folder)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide the progress bars that transformers shows whenever a model is saved."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _tensorboard_in(folder: Path) -> Iterator[None]:
    """Make transformers write TensorBoard's files into the run's folder.

    When a trainer is created, it reads the name of the folder from an environment variable.
    """
    name = "TENSORBOARD_LOGGING_DIR"
    before = os.environ.get(name)
    os.environ[name] = str(folder / "tensorboard")
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def check(config: TrainingConfig) -> None:
    """Raise the errors that `train` would raise before its first step, and write nothing.

    Raises:
        ConfigError, FileNotFoundError: if `train` would raise one before its first step.
    """
    _import(config)
    task = _task(config)
    with nullcontext() if "path" in config.model else torch.device("meta"):
        model = _model(config, task.description())
        _check_truncation(model, config)
        _losses(model, config)
    _packer(config, task.description())
    load_teaching(config, model, task.description())
    for split in ("train", config.evaluation.split):
        try:
            first = next(iter(task.checked_rows(split, config.seed)), None)
        except ValueError as error:
            raise ConfigError(f"task {config.task['name']}: {error}") from error
        if first is None:
            raise ConfigError(f"the task has no {split} rows with these settings.")
    if config.optimization.steps is None and config.task.get("streaming"):
        count_steps(config, None)
    make_arguments(config, model, config.optimization.steps or 1)


def _import(config: TrainingConfig) -> None:
    """Import the modules that register parts of the run.

    If an original is missing, the copy that an earlier call stored is imported.
    """
    try:
        import_parts(config.imports, Path(config.output, IMPORTS))
    except ValueError as error:
        raise ConfigError(f"imports: {error}") from error


def _task(config: TrainingConfig) -> Task:
    settings = dict(config.task)
    name, setting = settings.pop("name"), settings.pop("setting", None)
    settings.pop("streaming", None)
    try:
        task = tasks.build(name, setting, **settings)
        tokenizer = _saved_tokenizer(config)
        if tokenizer is not None:
            task = task.tokens_of(tokenizer)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"task: {error}") from error
    if config.evaluation.split not in task.splits:
        raise ConfigError(unknown("evaluation.split", config.evaluation.split, task.splits))
    description = task.description()
    try:
        kind = find_kind(description.kind)
    except ValueError as error:
        raise ConfigError(f"task {name}: {error}") from error
    names = _names(config, kind, description)
    if names is not None:
        try:
            task = task.with_classes(names)
        except ValueError as error:
            raise ConfigError(f"task {name}: {error}") from error
        description = task.description()
    try:
        kind.check_description(description)
    except ValueError as error:
        raise ConfigError(f"the task {name} {error}") from error
    metric = config.evaluation.metric
    try:
        check_choice("evaluation.metric", metric, kind.metrics, f" for the task {name}")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return task


def _names(config: TrainingConfig, kind: Kind, description: Description) -> list[str] | None:
    """Return the names of the labels of the initial model or else of the teacher, if they have any.

    Raises:
        ConfigError: if both have names, and these differ.
    """
    own = saved_names(config.model.get("path"), kind)
    taught = None if description.num_labels is None else saved_names(config.teacher.path, kind)
    if own is not None and taught is not None and own != taught:
        raise ConfigError(
            f"teacher.path must hold a model with the labels of model.path, {own}; it has {taught}."
        )
    return taught if own is None else own


def _tokenizer(config: TrainingConfig, task: Task) -> Any:
    """Return the tokenizer to save with the model: the task's or else that of a saved model."""
    own = task.own_tokenizer()
    return _saved_tokenizer(config) if own is None else own


def _saved_tokenizer(config: TrainingConfig) -> Any:
    """Load the tokenizer of the initial model, or else of the teacher, if it has one.

    Raises:
        ConfigError: if both have one, and these have other tokens.
    """
    own, taught = _tokenizer_in(config.model.get("path")), _tokenizer_in(config.teacher.path)
    if own is not None and taught is not None and own.get_vocab() != taught.get_vocab():
        raise ConfigError(
            "teacher.path must hold a model with the tokens of model.path; those of its tokenizer "
            "differ."
        )
    return taught if own is None else own


def _tokenizer_in(path: str | None) -> Any:
    """Load the tokenizer of a saved model, or return None if there is no model or tokenizer."""
    if path is None:
        return None
    folder = tokenizer_folder(Path(path))
    if (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(str(folder))
    return None


def _model(config: TrainingConfig, description: Description) -> Any:
    """Make or load the model to train, which is a `PeftModel` if an adapter is trained."""
    check_adapter(config)
    check_compiling(config)
    kind = find_kind(description.kind)
    model_class: type[PreTrainedModel] = kind.model_class()
    values = dict(config.model)
    path = values.pop("path", None)
    if path is not None:
        if values:
            raise ConfigError(f"model has a path, so it cannot have {', '.join(values)} too.")
        model, new = load_saved(path, kind, description)
        return model if config.adapter is None else adapt(model, config.adapter, path, new)
    known = set(GramianConfig.__annotations__)
    for key in values:
        if key not in known:
            raise ConfigError(unknown("key of model", key, known))
    values.setdefault("max_position_embeddings", description.length)
    if description.vocab_size is not None:
        values.setdefault("vocab_size", description.vocab_size)
        if values["vocab_size"] < description.vocab_size:
            raise ConfigError(
                f"model.vocab_size must be at least the task's {description.vocab_size}; got "
                f"{values['vocab_size']}."
            )
    if description.input_size is not None:
        values.setdefault("input_size", description.input_size)
    if description.num_labels is not None:
        values["num_labels"] = description.num_labels
    for key, value in kind.model_options().items():
        values.setdefault(key, value)
    try:
        return model_class(GramianConfig(**values))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"model: {error}") from error


def _check_truncation(model: Any, config: TrainingConfig) -> None:
    if not config.regularization.truncation:
        return
    if config.adapter is not None:
        raise ConfigError("regularization.truncation cannot be combined with an adapter.")
    if not mode_filters(model):
        raise ConfigError(
            "regularization.truncation needs filters of the type modal or s4d; this model has none."
        )


def _restore_truncation(model: Any, folder: Path, config: TrainingConfig) -> None:
    """Give the filters the modes that they have in the checkpoint from which a run resumes."""
    _check_truncation(model, config)
    if not config.regularization.truncation or earlier_report(folder, config) is not None:
        return
    for checkpoint in complete_checkpoints(folder / "checkpoints")[-1:]:
        restore_modes(model, checkpoint)


def _check_one_process(config: TrainingConfig, arguments: TrainingArguments) -> None:
    if config.regularization.truncation and arguments.world_size > 1:
        raise ConfigError(
            "regularization.truncation changes the shapes of parameters, so it takes one process; "
            f"got {arguments.world_size}."
        )


def _losses(model: PreTrainedModel, config: TrainingConfig) -> MemoryLosses | None:
    if config.evaluation.ess.rows and getattr(model.config, "bidirectional", False):
        raise ConfigError(
            "evaluation.ess.rows must be 0 for a bidirectional model: it looks at the whole "
            "sequence and has no state."
        )
    regularization = config.regularization
    if not (regularization.gates or regularization.ess.weight or regularization.hankel):
        return None
    penalty = regularization.ess
    try:
        return MemoryLosses(
            base_of(model),
            regularization.gates,
            penalty.weight,
            target=penalty.target,
            share=penalty.share,
            sequences=penalty.sequences,
            channels=penalty.channels,
            hankel=regularization.hankel,
            normalize_gates=regularization.normalize_gates,
            gate_layers=regularization.gate_layers,
        )
    except ValueError as error:
        raise ConfigError(f"regularization.{error}") from error


def _packer(config: TrainingConfig, description: Description) -> Packer | None:
    if not config.optimization.packing:
        return None
    try:
        return Packer(description)
    except ValueError as error:
        raise ConfigError(f"optimization.packing: {error}") from error


def earlier_report(folder: Path, config: TrainingConfig) -> TrainingReport | None:
    """Return the report of this run if the run is finished, or None if it is not.

    Raises:
        ConfigError: if the folder holds another run or other files.
    """
    import yaml

    written = folder / "config.yaml"
    if written.is_file():
        before = yaml.safe_load(written.read_text(encoding="utf-8"))
        with suppress(ConfigError):  # keys newer than the run get their defaults
            before = parse_config(before).to_dict()
        changed = sorted(_differences(before, config.to_dict()))
        if changed:
            raise ConfigError(
                f"{folder} holds a run with another {', '.join(changed)}; give another output, or "
                "remove the folder."
            )
        if (folder / "report.json").is_file():
            return _read_report(folder)
    elif folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ConfigError(f"{folder} exists and holds no run; give another output.")
    return None


def _prepare(
    folder: Path, config: TrainingConfig, arguments: TrainingArguments
) -> TrainingReport | None:
    """Create the run's folder, or prepare it for resuming.

    Returns:
        The report of the run if it is finished already, or None.
    """
    import yaml

    report = earlier_report(folder, config)
    if report is not None or arguments.process_index != 0:
        return report
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / "config.yaml"
    if not written.is_file():
        with staged_file(written) as stage:
            text = yaml.safe_dump(config.to_dict(), sort_keys=False)
            stage.write_text(text, encoding="utf-8")
    checkpoints = complete_checkpoints(folder / "checkpoints")
    step = int(checkpoints[-1].name.rsplit("-", 1)[1]) if checkpoints else 0
    for name in ("metrics.jsonl", "samples.jsonl"):
        cut_after(folder / name, step if checkpoints else -1)
    for name in ("best", "last"):
        old = folder / f".{name}-old"
        if old.exists() and not (folder / name).exists():  # killed between two renames
            old.rename(folder / name)
    machines = folder / "environment.json"
    earlier = json.loads(machines.read_text(encoding="utf-8")) if machines.is_file() else []
    copies = copy_parts(config.imports, folder / IMPORTS)
    started = {"from_step": step, "imports": copies, **environment(arguments.world_size)}
    write_json(machines, [*earlier, started])
    return None


def _differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            place = f"{where}.{key}".lstrip(".")
            yield from _differences(before.get(key), now.get(key), place)
    elif before != now:
        yield where


def _finish(
    folder: Path,
    config: TrainingConfig,
    trainer: GramianTrainer,
    seconds: float,
    resumed_from: int,
) -> None:
    lines = read_lines(folder / "metrics.jsonl")
    figure = plot_training(lines, config.evaluation.metric, str(folder))
    save_figure(figure, folder / "training.png")
    evaluations = [line for line in lines if "eval_loss" in line]
    at_the_end = [line for line in lines if line["step"] == evaluations[-1]["step"]]
    last = {
        key.removeprefix("eval_"): value
        for line in at_the_end
        for key, value in line.items()
        if key.startswith("eval_") and "second" not in key and "runtime" not in key
    }
    metric = f"eval_{config.evaluation.metric}"
    choose = max if higher_is_better(config.evaluation.metric) else min
    best = choose(evaluations, key=lambda line: line[metric])
    report = TrainingReport(
        output=str(folder),
        steps=trainer.state.global_step,
        parameters=sum(parameter.numel() for parameter in trainer.model.parameters()),
        metrics=last,
        best={config.evaluation.metric: best[metric], "step": best["step"]},
        seconds=seconds,
        resumed_from=resumed_from,
    )
    _write_cards(folder, config, trainer, report)
    write_json(folder / "report.json", report.to_dict())


def _write_cards(
    folder: Path, config: TrainingConfig, trainer: GramianTrainer, report: TrainingReport
) -> None:
    """Write the model cards of `best/` and `last/`."""
    model = base_of(trainer.model)
    about = (
        f"A `{type(model).__name__}` of {report.parameters:,} parameters, trained on the task "
        f"`{config.task['name']}` (`gramian train`)."
    )
    base = config.model.get("path")
    if base is not None:
        about += f" Training started from `{Path(base).resolve().name}`."
    if config.teacher.path is not None:
        about += f" Its teacher was `{Path(config.teacher.path).resolve().name}`."
    last = {**report.metrics, "step": report.steps}
    for name, values in (("best", report.best), ("last", last)):
        lines = (f"{key}: {value:.6g}" for key, value in values.items())
        results = f"{config.evaluation.split} split\n" + "\n".join(lines)
        title = f"{folder.name}/{name}"
        write_card(folder / name, model, about, results, base=base, name=title)


def _read_report(folder: Path) -> TrainingReport:
    values = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return TrainingReport(**values)
