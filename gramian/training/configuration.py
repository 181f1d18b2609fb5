"""What a training run is told: YAML, checked against the dataclasses below.

Every key is known or an error that names the nearest; every value has its field's type. The
defaults are written here and nowhere else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from gramian._imports import find_copy, import_parts
from gramian._nearest import unknown
from gramian.tasks.kinds import metric_names

__all__ = [
    "Checkpoints",
    "ConfigError",
    "Evaluation",
    "Hardware",
    "Logging",
    "Optimization",
    "Regularization",
    "StatePenalty",
    "StateSizes",
    "TrainingConfig",
    "add_imports",
    "load_config",
    "parse_config",
    "read_change",
    "read_values",
    "set_value",
]

SCHEDULES = ("cosine", "linear", "constant")
DEVICES = ("auto", "cpu")
IMPORTS = "imports"
"""The folder of a run that keeps the modules that it imports."""


class ConfigError(ValueError):
    """Something in a configuration that its author can put right; the message is one sentence."""


@dataclass(frozen=True)
class Optimization:
    """AdamW with linear warm-up, then a schedule.

    Parameters of filters get the learning rate and decay that the filters ask for, by
    `gramian.parameter_groups`.

    Attributes:
        steps: optimiser steps; or give `epochs`.
        epochs: passes over the training set.
        batch_size: sequences of an optimiser step, over all processes and accumulated parts, so
            that a run does not depend on how many processes share it; the last batch of an epoch
            is filled up with other rows where several do.
        accumulation: parts that a process takes its share of a batch in.
        packing: whether to put the sequences of a part end to end, in rows no longer than the
            task's longest, in place of padding each; they learn what they would by themselves.
        learning_rate: at the peak.
        weight_decay: of matrices that are no embeddings and no filters.
        betas: of AdamW.
        epsilon: of AdamW.
        warmup: steps of linear warm-up if at least 1, share of the steps if below.
        schedule: `"cosine"`, `"linear"` or `"constant"`, after the warm-up.
        final_rate: at the end of the cosine, as a share of the peak.
        clip_norm: largest norm of the gradient; 0 does not clip.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 32
    accumulation: int = 1
    packing: bool = False
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    epsilon: float = 1e-8
    warmup: float = 0.05
    schedule: str = "cosine"
    final_rate: float = 0.05
    clip_norm: float = 1.0


@dataclass(frozen=True)
class StatePenalty:
    """A loss on effective state-size; see `gramian.memory.ess_penalty`.

    Attributes:
        weight: of the loss; 0 leaves it out.
        target: state-size that every head or channel is drawn to.
        share: or share of the state there is.
        sequences: of a process's batch that are measured.
        channels: heads or channels of a layer that are measured, others at each step.
    """

    weight: float = 0.0
    target: float | None = None
    share: float | None = None
    sequences: int = 2
    channels: int = 8


@dataclass(frozen=True)
class Regularization:
    """Losses on the memory of a model, added to the task's and logged by themselves.

    Attributes:
        gates: weight of `gramian.memory.gate_regularizer`, which draws the gates of linear
            recurrences towards 1; 0 leaves it out.
        ess: see there.
    """

    gates: float = 0.0
    ess: StatePenalty = field(default_factory=StatePenalty)


@dataclass(frozen=True)
class StateSizes:
    """Effective state-sizes at each evaluation; see `StateSizeCallback`.

    Attributes:
        rows: of the held-out set that are read; 0 does not measure.
        every: positions between those that are measured.
        channels: at most so many heads or channels of a layer.
    """

    rows: int = 0
    every: int = 16
    channels: int = 16


@dataclass(frozen=True)
class Evaluation:
    """When and on what to evaluate; the end of training is always evaluated.

    Attributes:
        every: optimiser steps between evaluations; None evaluates at the end only.
        split: of the task.
        examples: at most so many rows; None takes all.
        batch_size: sequences of a process at once; None takes the training's.
        metric: by which the best model is chosen: `"loss"` or `"accuracy"`; of a signal `"loss"`,
            the same as `"mse"`, or `"relative_error"`, the root of it over the targets' own.
        patience: evaluations without a better metric after which training stops; None goes on.
        samples: rows of which predictions, or continuations of text, are written down.
        sample_length: tokens of a continuation, or last steps of a signal.
        ess: state-sizes to log; see there.
    """

    every: int | None = None
    split: str = "validation"
    examples: int | None = None
    batch_size: int | None = None
    metric: str = "loss"
    patience: int | None = None
    samples: int = 2
    sample_length: int = 128
    ess: StateSizes = field(default_factory=StateSizes)


@dataclass(frozen=True)
class Checkpoints:
    """What a killed run goes on from.

    Attributes:
        every: optimiser steps between checkpoints; None keeps the one at the end only.
        keep: how many, at least 2: the last may be incomplete.
    """

    every: int | None = None
    keep: int = 2


@dataclass(frozen=True)
class Logging:
    """Where figures go besides `metrics.jsonl`.

    Attributes:
        every: optimiser steps between lines.
        report_to: `"tensorboard"`, or any other that transformers' `Trainer` knows.
    """

    every: int = 10
    report_to: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Hardware:
    """How to compute; nothing here changes what is learned, but for rounding.

    Attributes:
        device: `"auto"` takes accelerators where there are any, `"cpu"` does not.
        bf16: mixed precision; filters keep to float32.
        compile: `torch.compile`.
        gradient_checkpointing: keep a block's input only and compute the rest again.
        fsdp: shard parameters over the processes (FSDP2).
        workers: processes that load data, for each training process.
        threads: of PyTorch on the processor; None leaves it alone.
    """

    device: str = "auto"
    bf16: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False
    fsdp: bool = False
    workers: int = 0
    threads: int | None = None


@dataclass(frozen=True)
class TrainingConfig:
    """A training run.

    Attributes:
        output: the run's folder.
        task: `name` of a task of `gramian.tasks`, perhaps `setting` and `streaming`, and changes
            to the task's settings.
        model: the fields of `gramian.models.GramianConfig`, or `path`, the folder of a saved model
            to go on from. What the task decides (vocabulary, labels, input size, and the filters'
            length unless it is given) is filled in.
        imports: Python files or modules that register tasks, filters or mixers of your own; the
            run's folder keeps a copy of each.
        seed: of data, initial weights and everything else random.
        optimization: see there, and so on for the others.
    """

    output: str
    task: dict[str, Any]
    model: dict[str, Any]
    imports: list[str] = field(default_factory=list)
    seed: int = 0
    optimization: Optimization = field(default_factory=Optimization)
    regularization: Regularization = field(default_factory=Regularization)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    logging: Logging = field(default_factory=Logging)
    hardware: Hardware = field(default_factory=Hardware)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `parse_config` takes them."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Key:
    """A key of a configuration.

    Attributes:
        name: with dots, such as `optimization.steps`.
        default: in YAML, or None if the key must be given.
        meaning: what its dataclass says of it.
    """

    name: str
    default: str | None
    meaning: str


def keys(kind: type[Any] = TrainingConfig, where: str = "") -> list[Key]:
    """Every key of a configuration, in the order of the dataclasses; but for those of `sweep`,
    `task` and `model.filter`, which depend on what they describe."""
    meanings = _meanings(kind.__doc__ or "")
    found = []
    for one in dataclasses.fields(kind):
        name = f"{where}{one.name}"
        if one.default_factory is not dataclasses.MISSING:
            default: Any = one.default_factory()
        else:
            default = one.default
        if dataclasses.is_dataclass(default) and default is not dataclasses.MISSING:
            found += keys(type(default), f"{name}.")
            continue
        shown = None if default is dataclasses.MISSING else _yaml(default)
        found.append(Key(name, shown, meanings.get(one.name, "")))
        if name == "model":
            found += _model_keys()
    return found


def _model_keys() -> list[Key]:
    """What `GramianConfig` documents of itself."""
    from gramian.models import GramianConfig

    meanings, defaults = _meanings(GramianConfig.__doc__ or ""), GramianConfig().to_dict()
    return [
        Key(f"model.{name}", _yaml(defaults.get(name)), meaning)
        for name, meaning in meanings.items()
    ]


def _meanings(text: str) -> dict[str, str]:
    """The entries of a docstring's section of attributes, each on one line."""
    found: dict[str, str] = {}
    name = ""
    for line in text.partition("Attributes:\n")[2].splitlines():
        if line.startswith(" " * 12):
            found[name] += f" {line.strip()}"
        elif line.startswith(" " * 8):
            name, _, meaning = line.strip().partition(": ")
            found[name] = meaning
        elif line.strip():  # the next section
            break
    return found


def _yaml(value: Any) -> str:
    """A plain value as it stands in YAML, of which JSON is a part, but for numbers like 1e-06."""
    import json

    text = json.dumps(value)
    return text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text


def load_config(
    path: str | Path, overrides: Sequence[str] = (), imports: Sequence[str] = ()
) -> TrainingConfig:
    """Read a YAML file, with changes such as `"optimization.steps=100"`.

    The modules under `imports` are imported, those of a finished or interrupted run's own file as
    the run's folder keeps them.

    Args:
        path: the file.
        overrides: `key=value`, the key with dots, the value in YAML.
        imports: modules to add to the key `imports`.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: text that is no YAML, an unknown key, a value that does not fit, a module that
            cannot be imported.
    """
    values = read_values(path)
    for override in overrides:
        key, value = read_change(override)
        set_value(values, key.split("."), value)
    add_imports(values, imports, path)
    return parse_config(values)


def add_imports(values: dict[str, Any], imports: Sequence[str], path: str | Path) -> None:
    """Add modules to the key `imports` of plain values in place, and import all of them.

    Args:
        values: what the file holds.
        imports: modules to add.
        path: the file. Copies that a run keeps beside its own are imported in place of modules.

    Raises:
        ConfigError: for a module that cannot be imported.
    """
    named = _value(list[str], values.get("imports") or [], "imports")
    if not named and not imports:
        values.pop("imports", None)
        return
    values["imports"] = list(dict.fromkeys([*named, *imports]))
    copies = Path(path).parent / IMPORTS
    found = [(find_copy(name, copies), name) for name in values["imports"]]
    try:
        import_parts([name if copy is None else str(copy) for copy, name in found])
    except ValueError as error:
        raise ConfigError(f"imports: {error}") from error


def read_values(path: str | Path) -> dict[str, Any]:
    """What a YAML file holds, unchecked but for being keys and values."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration file {path}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, such as 'seed: 0'.")
    return values


def read_change(text: str) -> tuple[str, Any]:
    """The key and the value of a `key=value` whose value is YAML."""
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"a change must read key=value, such as seed=1; got {text!r}.")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value in {text!r} is not valid YAML.") from error


def parse_config(values: Mapping[str, Any]) -> TrainingConfig:
    """A configuration from plain values.

    Raises:
        ConfigError: on an unknown or missing key, or a value that does not fit.
    """
    if "sweep" in values:
        raise ConfigError("the configuration holds a sweep, which gramian sweep runs.")
    config = _parse(TrainingConfig, values, "")
    _check(config)
    return config


def set_value(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set a nested key in place."""
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{'.'.join(keys)} changes a key of {key}, which has none.")
    values[keys[-1]] = value


_T = TypeVar("_T")


def _parse(kind: type[_T], values: Any, where: str) -> _T:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must hold keys and values; got {values!r}.")
    hints = typing.get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            place = f"key of {where}" if where else "key"
            raise ConfigError(unknown(place, key, hints))
        arguments[key] = _value(hints[key], value, f"{where}.{key}".lstrip("."))
    for one in dataclasses.fields(kind):  # type: ignore[arg-type]
        required = one.default is one.default_factory is dataclasses.MISSING
        if required and one.name not in arguments:
            raise ConfigError(f"the configuration lacks the key {one.name}.")
    return kind(**arguments)


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _parse(typing.cast(type, hint), {} if value is None else value, where)
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (hint,) = (option for option in options if option is not type(None))
        return _value(hint, value, where)
    if origin is list:
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list; got {value!r}.")
        return [_value(options[0], one, where) for one in value]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must hold keys and values; got {value!r}.")
        return dict(value)
    if hint is float:
        return _number(value, where)
    if hint is int and isinstance(value, str | float):
        with contextlib.suppress(ValueError, OverflowError):
            value = int(float(value)) if float(value).is_integer() else value
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        expected = {int: "an integer", bool: "true or false", str: "text"}[hint]
        raise ConfigError(f"{where} must be {expected}; got {value!r}.")
    return value


def _number(value: Any, where: str) -> float:
    # YAML 1.1 reads 1e-3, without a point, as text.
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{where} must be a number; got {value!r}.") from None


def _check(config: TrainingConfig) -> None:
    steps, logging = config.optimization, config.logging
    evaluation, checkpoints, hardware = config.evaluation, config.checkpoints, config.hardware
    penalty = config.regularization.ess
    if (steps.steps is None) == (steps.epochs is None):
        raise ConfigError("give optimization.steps or optimization.epochs, one of the two.")
    files = [Path(name).name for name in config.imports]
    if len(set(files)) < len(files):
        raise ConfigError(
            f"imports must be modules whose files have names of their own; got {config.imports}."
        )
    if "name" not in config.task:
        raise ConfigError("task lacks a name, such as mqar.")
    sizes = {
        "optimization.steps": steps.steps,
        "optimization.batch_size": steps.batch_size,
        "optimization.accumulation": steps.accumulation,
        "evaluation.every": evaluation.every,
        "evaluation.examples": evaluation.examples,
        "evaluation.batch_size": evaluation.batch_size,
        "evaluation.patience": evaluation.patience,
        "evaluation.sample_length": evaluation.sample_length,
        "evaluation.ess.every": evaluation.ess.every,
        "evaluation.ess.channels": evaluation.ess.channels,
        "regularization.ess.sequences": penalty.sequences,
        "regularization.ess.channels": penalty.channels,
        "checkpoints.every": checkpoints.every,
        "logging.every": logging.every,
        "hardware.threads": hardware.threads,
    }
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(f"{name} must be at least 1; got {size}.")
    least_zero = {
        "seed": config.seed,
        "optimization.learning_rate": steps.learning_rate,
        "optimization.weight_decay": steps.weight_decay,
        "optimization.warmup": steps.warmup,
        "optimization.clip_norm": steps.clip_norm,
        "evaluation.samples": evaluation.samples,
        "evaluation.ess.rows": evaluation.ess.rows,
        "regularization.gates": config.regularization.gates,
        "regularization.ess.weight": penalty.weight,
        "hardware.workers": hardware.workers,
    }
    for name, value in least_zero.items():
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{name} must be at least 0 and finite; got {value}.")
    if steps.epochs is not None and not 0 < steps.epochs < float("inf"):
        raise ConfigError(f"optimization.epochs must be above 0; got {steps.epochs}.")
    if not 0 <= steps.final_rate <= 1:
        raise ConfigError(f"optimization.final_rate must lie from 0 to 1; got {steps.final_rate}.")
    if len(steps.betas) != 2 or not all(0 <= beta < 1 for beta in steps.betas):
        raise ConfigError(f"optimization.betas must be two numbers in [0, 1); got {steps.betas}.")
    if penalty.weight > 0 and (penalty.target is None) == (penalty.share is None):
        raise ConfigError("give regularization.ess.target or its share, one of the two.")
    if penalty.target is not None and not 0 < penalty.target < float("inf"):
        raise ConfigError(f"regularization.ess.target must be above 0; got {penalty.target}.")
    if penalty.share is not None and not 0 < penalty.share <= 1:
        raise ConfigError(f"regularization.ess.share must lie in (0, 1]; got {penalty.share}.")
    if (config.regularization.gates > 0 or penalty.weight > 0) and (
        hardware.fsdp or hardware.compile
    ):
        raise ConfigError(
            "regularization reads what layers read and their parameters, which it cannot with "
            "hardware.fsdp or hardware.compile."
        )
    if steps.packing and (config.regularization.gates > 0 or penalty.weight > 0):
        raise ConfigError(
            "regularization reads rows of one sequence each, which optimization.packing packs."
        )
    if steps.packing and hardware.compile:
        raise ConfigError(
            "packed rows cannot be compiled: give optimization.packing or hardware.compile."
        )
    choices = {
        "optimization.schedule": (steps.schedule, SCHEDULES),
        "evaluation.metric": (evaluation.metric, metric_names()),
        "hardware.device": (hardware.device, DEVICES),
    }
    for name, (given, accepted) in choices.items():
        if given not in accepted:
            raise ConfigError(unknown(name, given, accepted))
    if checkpoints.keep < 2:
        raise ConfigError(
            "checkpoints.keep must be at least 2, as the last one may be incomplete; got "
            f"{checkpoints.keep}."
        )
    if checkpoints.every is not None and checkpoints.every % logging.every:
        raise ConfigError(
            "checkpoints.every must be a multiple of logging.every, so that a resumed run logs "
            f"what one in one piece does; got {checkpoints.every} and {logging.every}."
        )
