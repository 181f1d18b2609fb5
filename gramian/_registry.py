"""Register classes by name. Configurations build parts by these names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["registering"]

_Class = TypeVar("_Class", bound="type[Any]")


def registering(
    table: dict[str, type[Any]], name: str, attribute: str, what: str
) -> Callable[[_Class], _Class]:
    """Return a class decorator that registers a class.

    Args:
        table: the registered classes by their names.
        name: name of the class in the table.
        attribute: attribute of the class that is set to `name`.
        what: the kind of class in messages, such as "filter type".

    Raises:
        ValueError: from the decorator, if another class is registered under `name`.
    """

    def add(cls: _Class) -> _Class:
        if table.get(name, cls) is not cls:
            raise ValueError(f"the {what} {name!r} is already registered.")
        setattr(cls, attribute, name)
        table[name] = cls
        return cls

    return add
