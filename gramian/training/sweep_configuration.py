"""Read the configuration of a sweep: a training configuration, and lists of values for keys.

    sweep:
      seed: [0, 1, 2]
      task.vocab_size: [10, 20, 40]
      layer:
        attention: {model.mixers: softmax_attention}
        hyena: {model.mixers: multi_hyena, model.filter: {type: rtf, state_size: 16}}

An axis that is a list assigns each of its values to one key of the configuration. An axis that maps
names to changes applies several changes together under each name. The sweep is the grid of all
axes.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gramian.training.configuration import (
    ConfigError,
    TrainingConfig,
    add_imports,
    parse_config,
    read_change,
    read_values,
    set_value,
)

__all__ = ["SweepConfig", "SweepPoint", "load_sweep", "parse_sweep"]

FIXED = ("output", "imports", "evaluation.metric", "sweep")
LONGEST = 60


@dataclass(frozen=True)
class SweepPoint:
    """One training run of a sweep.

    Attributes:
        name: name of the run's folder within the sweep's folder.
        values: for each axis, the value of its key at this point, or the name of the group of
            changes.
        config: the run's configuration.
    """

    name: str
    values: dict[str, Any]
    config: TrainingConfig


@dataclass(frozen=True)
class SweepConfig:
    """The configuration of a sweep.

    Attributes:
        output: the sweep's folder, which contains one folder per point.
        axes: for each axis, a list of all its values. The axes are in the order of the file.
        points: all points of the grid. The last axis varies fastest.
        source: the plain values from which the configuration was parsed.
    """

    output: str
    axes: dict[str, list[Any]]
    points: tuple[SweepPoint, ...]
    source: dict[str, Any]

    @property
    def metric(self) -> str:
        """Return `evaluation.metric`, which all points share."""
        return self.points[0].config.evaluation.metric


def load_sweep(
    path: str | Path, overrides: Sequence[str] = (), imports: Sequence[str] = ()
) -> SweepConfig:
    """Read a sweep from a YAML file, and import the modules under `imports`.

    Args:
        path: the file.
        overrides: changes `key=value` to the configuration that all points share. Dots in the key
            separate sections, and the value is YAML. `"sweep.task.vocab_size=[10, 20]"` sets an
            axis.
        imports: modules to add to the key `imports`. All points import them.

    Raises:
        FileNotFoundError: if the file does not exist.
        ConfigError: if the file is not valid YAML, if a module cannot be imported, or if
            `parse_sweep` raises this error.
    """
    values = read_values(path)
    for override in overrides:
        key, value = read_change(override)
        head, _, axis = key.partition(".")
        keys = ["sweep", axis] if head == "sweep" and axis else key.split(".")
        if key in _axes(values):
            raise ConfigError(f"{key} is swept; change the axis: sweep.{key}=[…].")
        set_value(values, keys, value)
    add_imports(values, imports, path)
    return parse_sweep(values)


def parse_sweep(values: Mapping[str, Any]) -> SweepConfig:
    """Make a sweep from plain values, such as those that YAML gives, and parse all points.

    Raises:
        ConfigError: if there are no axes; if an axis is empty, repeats a value or changes a key
            that another axis changes; or if the configuration of a point is invalid.
    """
    source = copy.deepcopy(dict(values))
    axes = {name: _axis(name, axis) for name, axis in _axes(source).items()}
    if not axes:
        raise ConfigError(
            "the configuration lacks a sweep: keys with lists of values, such as "
            "'sweep: {seed: [0, 1, 2]}'."
        )
    _check_keys(axes)
    base = {key: value for key, value in source.items() if key != "sweep"}
    output = base.get("output")
    if not isinstance(output, str):
        raise ConfigError("the configuration lacks the key output, the sweep's folder.")
    short = _short_names(axes)
    points: dict[str, SweepPoint] = {}
    for choice in itertools.product(*(axis.items() for axis in axes.values())):
        labels = dict(zip(axes, (label for label, _ in choice), strict=True))
        name = ",".join(f"{short[axis]}={label}" for axis, label in labels.items())
        if len(name) > LONGEST * 2:
            name = f"{name[: LONGEST * 2]}-{_digest(name)}"
        one = copy.deepcopy(base)
        for _, changes in choice:
            for key, value in changes.changes.items():
                set_value(one, key.split("."), copy.deepcopy(value))
        one["output"] = str(Path(output) / name)
        try:
            config = parse_config(one)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        shown = {axis: changes.shown for axis, (_, changes) in zip(axes, choice, strict=True)}
        points[name] = SweepPoint(name, shown, config)
    return SweepConfig(
        output=output,
        axes={name: [one.shown for one in axis.values()] for name, axis in axes.items()},
        points=tuple(points.values()),
        source=source,
    )


@dataclass(frozen=True)
class _Changes:
    """The changes that one value of an axis makes, and the text that tables show for the value."""

    shown: Any
    changes: dict[str, Any]


def _axes(values: Mapping[str, Any]) -> dict[str, Any]:
    axes = values.get("sweep") or {}
    if not isinstance(axes, Mapping):
        raise ConfigError(f"sweep must hold keys and lists of values; got {axes!r}.")
    return dict(axes)


def _axis(name: str, axis: Any) -> dict[str, _Changes]:
    """Return a mapping from the label of each value of an axis to its changes.

    A label can be part of the name of a folder.
    """
    if not isinstance(name, str) or not isinstance(axis, list | tuple | Mapping) or not axis:
        raise ConfigError(
            f"the axis {name} of the sweep must be a list of values, or names with the changes "
            f"that each makes; got {axis!r}."
        )
    places: dict[str, _Changes] = {}
    if isinstance(axis, Mapping):
        for shown, changes in axis.items():
            if not isinstance(changes, Mapping) or not all(isinstance(key, str) for key in changes):
                raise ConfigError(
                    f"{shown} of the axis {name} must hold changes, such as "
                    f"'{{model.num_heads: 4}}'; got {changes!r}."
                )
            places[_label(str(shown))] = _Changes(str(shown), dict(changes))
        return places
    for value in axis:
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
            value = float(value)  # YAML 1.1 reads 1e-3, without a point, as text
        label = _label(value)
        if label in places:
            raise ConfigError(f"the axis {name} of the sweep repeats {value!r}.")
        places[label] = _Changes(value, {name: value})
    return places


def _check_keys(axes: Mapping[str, Mapping[str, _Changes]]) -> None:
    """Check that no axis sets a fixed key, and that no two axes set the same key.

    Setting a section also sets the keys inside it.
    """
    owners: dict[str, str] = {}
    for name, axis in axes.items():
        for key in {key for place in axis.values() for key in place.changes}:
            for fixed in FIXED:
                if _overlap(key, fixed):
                    raise ConfigError(f"a sweep cannot change {fixed}, which all points share.")
            for other, owner in owners.items():
                if owner != name and _overlap(key, other):
                    raise ConfigError(f"the axes {owner} and {name} of the sweep both set {key}.")
            owners[key] = name


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _short_names(axes: Mapping[str, Any]) -> dict[str, str]:
    """Return a short name for each key: its last part or, if that is not unique, the whole key."""
    last = [name.rsplit(".", 1)[-1] for name in axes]
    return {
        name: _safe(one if last.count(one) == 1 else name)
        for name, one in zip(axes, last, strict=True)
    }


def _label(value: Any) -> str:
    """Return text for a folder's name. Different values have different texts."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    safe = _safe(text)[:LONGEST]
    # The text "1" must have another label than the number 1, and the text "null" than null.
    plain = safe == text and (not isinstance(value, str) or _is_word(value))
    return safe if plain else f"{safe}-{_digest(repr(type(value)) + text)}"


def _is_word(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return True
    return False


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-.") or "value"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
