"""List the keys of a configuration, with their defaults and meanings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from gramian._json import to_json

__all__ = ["Key", "list_keys", "read_attributes", "setting"]


@dataclass(frozen=True)
class Key:
    """A key of a configuration.

    Attributes:
        name: name of the key with its sections, such as `optimization.steps`.
        default: default value in YAML, or None if the key must be given.
        meaning: explanation of the key, on one line.
    """

    name: str
    default: str | None
    meaning: str


def setting(meaning: str, default: Any) -> Any:
    """Declare a field of a configuration together with its meaning.

    Args:
        meaning: one line that explains the key to authors of configurations.
        default: immutable default of the field.
    """
    return dataclasses.field(default=default, metadata={"help": meaning})


def list_keys(kind: type[Any], where: str = "") -> list[Key]:
    """List every key of a configuration, in the order of the dataclasses.

    The keys of `sweep`, `task` and `model.filter` are omitted, because they vary with the axes, the
    task and the type of filter.

    Args:
        kind: dataclass of the configuration or of a section.
        where: prefix of the section's keys, with a trailing dot.
    """
    found = []
    for one in dataclasses.fields(kind):
        name = f"{where}{one.name}"
        if one.default_factory is not dataclasses.MISSING:
            default: Any = one.default_factory()
        else:
            default = one.default
        if dataclasses.is_dataclass(default) and default is not dataclasses.MISSING:
            found += list_keys(type(default), f"{name}.")
            continue
        shown = None if default is dataclasses.MISSING else _yaml(default)
        found.append(Key(name, shown, one.metadata["help"]))
        if name == "model":
            found += _model_keys()
    return found


def _model_keys() -> list[Key]:
    """List the fields of `GramianConfig`, with the meanings that its docstring gives."""
    from gramian.models import GramianConfig

    defaults = GramianConfig().to_dict()
    return [
        Key(f"model.{name}", _yaml(defaults.get(name)), meaning)
        for name, meaning in read_attributes(GramianConfig).items()
    ]


def read_attributes(kind: type[Any]) -> dict[str, str]:
    """Read the meanings of a class's fields from the section `Attributes:` of its docstring.

    A line that begins with the name of an annotated field and a colon begins an entry, at any
    indentation. The other lines of the section continue the entry before them. The section ends at
    a blank line.

    Args:
        kind: the class, whose section must have one entry for each annotated field.

    Returns:
        A mapping from the names of the fields to their meanings, in the order of the section. Each
        meaning is one line.

    Raises:
        ValueError: if a field has no entry or several.
    """
    lines = iter((kind.__doc__ or "").splitlines())
    for line in lines:
        if line.strip() == "Attributes:":
            break
    found: dict[str, list[str]] = {}
    entry: list[str] = []
    for line in lines:
        if not line.strip():
            break
        name, colon, meaning = line.strip().partition(": ")
        if not colon or name not in kind.__annotations__:
            entry.append(line.strip())
            continue
        if name in found:
            raise ValueError(f"the docstring of {kind.__name__} has two entries for {name}.")
        entry = found[name] = [meaning]
    missing = [name for name in kind.__annotations__ if name not in found]
    if missing:
        raise ValueError(f"the docstring of {kind.__name__} has no entry for {missing[0]}.")
    return {name: " ".join(entry) for name, entry in found.items()}


def _yaml(value: Any) -> str:
    """Format a plain value as YAML.

    JSON is almost a subset of YAML 1.1; only a number like 1e-06 needs a point.
    """
    text = to_json(value)
    return text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text
