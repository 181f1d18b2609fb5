"""Check arguments. Each error says in one sentence what is accepted and what was given."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "check_choice",
    "check_divides",
    "check_integers",
    "check_not_negative",
    "check_positive",
    "check_probability",
    "check_sizes",
]


def check_sizes(**sizes: object) -> None:
    """Raise a ValueError unless every size is an integer of at least 1.

    Args:
        sizes: the sizes by their names, which the message uses.
    """
    check_integers(1, **sizes)


def check_integers(least: int, /, **values: object) -> None:
    """Raise a ValueError unless every value is an integer of at least `least`.

    Args:
        least: smallest accepted value.
        values: the values by their names, which the message uses.
    """
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}.")


def check_not_negative(**values: object) -> None:
    """Raise a ValueError unless every value is a finite number of at least 0.

    Args:
        values: the values by their names, which the message uses.
    """
    for name, value in values.items():
        if not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number of at least 0; got {value!r}.")


def check_positive(**values: object) -> None:
    """Raise a ValueError unless every value is a finite number above 0.

    Args:
        values: the values by their names, which the message uses.
    """
    for name, value in values.items():
        if not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a finite number above 0; got {value!r}.")


def check_probability(name: str, value: float) -> float:
    """Return `value` as a float. Raise a ValueError unless it is a probability below 1."""
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a probability, at least 0 and below 1; got {value!r}.")
    return float(value)


def check_divides(name: str, parts: int, width: int) -> None:
    """Raise a ValueError unless `parts` is positive and divides `width`."""
    if parts < 1 or width % parts:
        raise ValueError(f"{name} must divide the width {width}; got {parts}.")


def check_choice(name: str, value: object, accepted: Iterable[object], where: str = "") -> None:
    """Raise a ValueError unless `value` is among the accepted values.

    Args:
        name: name of the value in the message.
        value: the given value.
        accepted: the accepted values.
        where: text that follows the accepted names in the message, such as " in 'glu' blocks".
    """
    choices = tuple(accepted)
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}{where}; got {value!r}."
        )
