"""Read the configuration of a training run from YAML, and check it against dataclasses.

An unknown key is an error that names the nearest known one, and every value must have the type of
its field. The defaults are defined in the dataclasses and nowhere else.
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
from gramian.training.checks import (
    check_checkpoints,
    check_combinations,
    check_evaluation,
    check_hardware,
    check_optimization,
    check_regularization,
    check_teacher,
)
from gramian.training.keys import Key, list_keys, setting
from gramian.training.sections import (
    Checkpoints,
    ConfigError,
    Evaluation,
    Hardware,
    Logging,
    Optimization,
    Regularization,
    StatePenalty,
    StateSizes,
    Teacher,
)

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
    "Teacher",
    "TrainingConfig",
    "add_imports",
    "load_config",
    "parse_config",
    "read_change",
    "read_values",
    "set_value",
]

IMPORTS = "imports"
"""Name of the folder, inside a run's folder, that holds copies of the imported modules."""


@dataclass(frozen=True)
class TrainingConfig:
    """The configuration of a training run. `gramian train --keys` explains every key."""

    output: str = field(metadata={"help": "folder of the run."})
    task: dict[str, Any] = field(
        metadata={
            "help": "the `name` of a task of `gramian.tasks`; optionally `setting`, the name of a "
            "published setting, and `streaming: true`, which stores no rows; and any settings of "
            "the task."
        }
    )
    model: dict[str, Any] = field(
        metadata={
            "help": "the fields of `gramian.models.GramianConfig`; or `path`, the folder of a "
            "saved model from which training continues. The vocabulary, the input size and the "
            "filters' length are those of the task unless they are given; the number of labels is "
            "always the task's."
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
    teacher: Teacher = field(default_factory=Teacher)
    regularization: Regularization = field(default_factory=Regularization)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    logging: Logging = field(default_factory=Logging)
    hardware: Hardware = field(default_factory=Hardware)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain values. `parse_config` accepts these values."""
        return dataclasses.asdict(self)


def keys() -> list[Key]:
    """List every key of a configuration."""
    return list_keys(TrainingConfig)


def load_config(
    path: str | Path, overrides: Sequence[str] = (), imports: Sequence[str] = ()
) -> TrainingConfig:
    """Read a YAML file, with changes such as `"optimization.steps=100"`.

    The modules under the key `imports` are imported. If the file is in the folder of an earlier
    run, and this folder has a copy of a module, the copy is imported instead.

    Args:
        path: the file.
        overrides: changes `key=value`. Dots in the key separate sections, and the value is YAML.
        imports: modules to add to the key `imports`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ConfigError: if the file is not valid YAML, a key is unknown or missing, a value is invalid,
            or a module cannot be imported.
    """
    values = read_values(path)
    for override in overrides:
        key, value = read_change(override)
        set_value(values, key.split("."), value)
    add_imports(values, imports, path)
    return parse_config(values)


def add_imports(values: dict[str, Any], imports: Sequence[str], path: str | Path) -> None:
    """Add modules to the key `imports` of `values` in place, and import every module it lists.

    Args:
        values: contents of a configuration file, as plain values.
        imports: modules to add.
        path: the file. If the copy of a module is in the folder `imports/` beside it, the copy is
            imported.

    Raises:
        ConfigError: if a module cannot be imported.
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
    """Parse text `key=value`, whose value is YAML, and return the key and the value."""
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"a change must read key=value, such as seed=1; got {text!r}.")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value in {text!r} is not valid YAML.") from error


def parse_config(values: Mapping[str, Any]) -> TrainingConfig:
    """Make a configuration from plain values, such as those that YAML gives.

    Raises:
        ConfigError: if a key is unknown or missing, or a value is invalid.
    """
    if "sweep" in values:
        raise ConfigError("the configuration holds a sweep, which gramian sweep runs.")
    config = _parse(TrainingConfig, values, "")
    _check(config)
    return config


def set_value(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set a key of nested sections in place.

    `keys` are the parts of the key, such as `["optimization", "steps"]` for `optimization.steps`.

    Raises:
        ConfigError: if the value of a part of the key, except the last part, is not a section.
    """
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
    if config.seed < 0:
        raise ConfigError(f"seed must be at least 0; got {config.seed}.")
    if "name" not in config.task:
        raise ConfigError("task lacks a name, such as mqar.")
    files = [Path(name).name for name in config.imports]
    if len(set(files)) < len(files):
        raise ConfigError(
            f"imports must be modules whose files have names of their own; got {config.imports}."
        )
    check_optimization(config.optimization)
    check_teacher(config.teacher)
    check_regularization(config.regularization)
    check_evaluation(config.evaluation)
    check_checkpoints(config.checkpoints, config.logging)
    check_hardware(config.hardware)
    check_combinations(config.optimization, config.regularization, config.hardware)
