"""The configuration of a training run: YAML, checked against the dataclasses below.

An unknown key is an error that names the nearest known one, and every value must have the type of
its field. The defaults are defined here and nowhere else.
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
from gramian.training.keys import Key, list_keys, setting

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
    """An error in a configuration that its author can correct; the message is one sentence."""


@dataclass(frozen=True)
class Optimization:
    """AdamW with linear warm-up, then a schedule.

    `gramian.parameter_groups` gives the parameters of filters the learning rates and weight decays
    that the filters request.
    """

    steps: int | None = setting("number of optimizer steps; or give `epochs`.", None)
    epochs: float | None = setting("number of passes over the training set.", None)
    batch_size: int = setting(
        "number of sequences in an optimizer step, over all processes and micro-batches, so that "
        "a run does not depend on how many processes share it; where several do, the last batch "
        "of an epoch is filled up with other rows.",
        32,
    )
    accumulation: int = setting(
        "number of gradient-accumulation steps: micro-batches per process and optimizer step.", 1
    )
    packing: bool = setting(
        "whether to put the sequences of a micro-batch end to end, in rows no longer than the "
        "task's longest, instead of padding each; what is learned stays the same.",
        False,
    )
    learning_rate: float = setting("learning rate at its peak.", 1e-3)
    weight_decay: float = setting(
        "weight decay of matrices that are no embeddings and no filters.", 0.1
    )
    betas: list[float] = field(
        default_factory=lambda: [0.9, 0.98], metadata={"help": "the two betas of AdamW."}
    )
    epsilon: float = setting("the epsilon of AdamW.", 1e-8)
    warmup: float = setting(
        "linear warm-up: a number of steps if at least 1, a share of them if below.", 0.05
    )
    schedule: str = setting(
        '`"cosine"`, `"linear"` or `"constant"`, the schedule after the warm-up.', "cosine"
    )
    final_rate: float = setting(
        "learning rate at the end of the cosine, as a share of the peak.", 0.05
    )
    clip_norm: float = setting("largest norm of the gradient; 0 turns clipping off.", 1.0)


@dataclass(frozen=True)
class StatePenalty:
    """Set a loss on effective state-size; see `gramian.memory.ess_penalty`."""

    weight: float = setting("weight of the loss; 0 turns it off.", 0.0)
    target: float | None = setting("state-size towards which every head or channel is drawn.", None)
    share: float | None = setting("or the share of the state that it is drawn to.", None)
    sequences: int = setting("number of sequences of a process's batch that are measured.", 2)
    channels: int = setting(
        "number of heads or channels of a layer that are measured; others at each step.", 8
    )


@dataclass(frozen=True)
class Regularization:
    """Set losses on a model's memory, which are added to the task's loss and logged separately."""

    gates: float = setting(
        "weight of `gramian.memory.gate_regularizer`, which draws the gates of linear "
        "recurrences towards 1; 0 turns it off.",
        0.0,
    )
    ess: StatePenalty = field(default_factory=StatePenalty)


@dataclass(frozen=True)
class StateSizes:
    """Measure effective state-sizes at each evaluation; see `StateSizeCallback`."""

    rows: int = setting("number of held-out rows that are read; 0 measures nothing.", 0)
    every: int = setting("number of positions from one that is measured to the next.", 16)
    channels: int = setting("largest number of heads or channels of a layer that are measured.", 16)


@dataclass(frozen=True)
class Evaluation:
    """Set when and on what to evaluate; the end of training is always evaluated."""

    every: int | None = setting(
        "optimizer steps from one evaluation to the next; None evaluates at the end only.", None
    )
    split: str = setting("split of the task to evaluate on.", "validation")
    examples: int | None = setting("largest number of rows; None takes all.", None)
    batch_size: int | None = setting(
        "number of sequences in a batch of a process; None takes that of training.", None
    )
    metric: str = setting(
        'the metric by which the best model is chosen: `"loss"` or `"accuracy"`; where labels are '
        'numbers `"loss"`, the same as `"mse"`, or `"relative_error"`: RMSE divided by the RMS of '
        "the targets.",
        "loss",
    )
    patience: int | None = setting(
        "number of evaluations without a better metric after which training stops; None never "
        "stops it.",
        None,
    )
    samples: int = setting(
        "number of rows whose predictions, or continuations of text, are written down.", 2
    )
    sample_length: int = setting(
        "number of tokens of a continuation, or of last steps of a signal.", 128
    )
    ess: StateSizes = field(default_factory=StateSizes)


@dataclass(frozen=True)
class Checkpoints:
    """Set how often to write checkpoints, from which an interrupted run resumes."""

    every: int | None = setting(
        "optimizer steps from one checkpoint to the next; None writes one at the end only.", None
    )
    keep: int = setting("number of checkpoints to keep, at least 2: the last may be incomplete.", 2)


@dataclass(frozen=True)
class Logging:
    """Set how often and where to log metrics, besides `metrics.jsonl`."""

    every: int = setting("optimizer steps from one line to the next.", 10)
    report_to: list[str] = field(
        default_factory=list,
        metadata={
            "help": 'further targets: `"tensorboard"`, or another of transformers\' `Trainer`.'
        },
    )


@dataclass(frozen=True)
class Hardware:
    """Set how to compute; nothing here changes what is learned, except for rounding."""

    device: str = setting(
        '`"auto"` uses accelerators where there are any, `"cpu"` does not.', "auto"
    )
    bf16: bool = setting("whether to train in mixed precision; filters stay in float32.", False)
    compile: bool = setting("whether to use `torch.compile`.", False)
    gradient_checkpointing: bool = setting(
        "whether to keep only the input of each block and compute the rest again.", False
    )
    fsdp: bool = setting("whether to shard parameters over the processes (FSDP2).", False)
    workers: int = setting("number of processes that load data, for each training process.", 0)
    threads: int | None = setting(
        "number of threads of PyTorch on the processor; None leaves it alone.", None
    )


@dataclass(frozen=True)
class TrainingConfig:
    """Describe a training run; `gramian train --keys` lists the meaning of every key."""

    output: str = field(metadata={"help": "folder of the run."})
    task: dict[str, Any] = field(
        metadata={
            "help": "`name` of a task of `gramian.tasks`, optionally `setting` and `streaming`, "
            "and changes to the task's settings."
        }
    )
    model: dict[str, Any] = field(
        metadata={
            "help": "the fields of `gramian.models.GramianConfig`, or `path`, the folder of a "
            "saved model to go on from. What the task decides (vocabulary, labels, input size, and "
            "the filters' length unless it is given) is filled in."
        }
    )
    imports: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Python files or modules that register tasks, filters or mixers of your own; "
            "the run's folder keeps a copy of each."
        },
    )
    adapter: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "an adapter of peft to train in place of the weights of the model in "
            "`model.path`: `type`, which is `lora`, and fields of `peft.LoraConfig`, such as `r`, "
            "`lora_alpha` and `target_modules`. None trains the weights."
        },
    )
    seed: int = setting("seed of data, initial weights and everything else that is random.", 0)
    optimization: Optimization = field(default_factory=Optimization)
    regularization: Regularization = field(default_factory=Regularization)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    logging: Logging = field(default_factory=Logging)
    hardware: Hardware = field(default_factory=Hardware)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain values, which `parse_config` accepts."""
        return dataclasses.asdict(self)


def keys() -> list[Key]:
    """List every key of a configuration."""
    return list_keys(TrainingConfig)


def load_config(
    path: str | Path, overrides: Sequence[str] = (), imports: Sequence[str] = ()
) -> TrainingConfig:
    """Read a YAML file, with changes such as `"optimization.steps=100"`.

    The modules under `imports` are imported. For the file in the folder of an earlier run, the
    copies in that folder stand in for modules that are not found.

    Args:
        path: the file.
        overrides: changes `key=value`, with dots in the key and the value in YAML.
        imports: modules to add to the key `imports`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ConfigError: on text that is not YAML, an unknown key, an invalid value, or a module that
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
        values: contents of the file.
        imports: modules to add.
        path: the file. Copies of modules that a run keeps beside it replace those not found.

    Raises:
        ConfigError: on a module that cannot be imported.
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
    """Read a YAML file of keys and values, without checking them."""
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
    """Parse a `key=value` whose value is YAML, and return the key and the value."""
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"a change must read key=value, such as seed=1; got {text!r}.")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value in {text!r} is not valid YAML.") from error


def parse_config(values: Mapping[str, Any]) -> TrainingConfig:
    """Make a configuration from plain values.

    Raises:
        ConfigError: on an unknown or missing key, or an invalid value.
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
