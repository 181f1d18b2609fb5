"""Register mixers by name, and build them from their configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from gramian._nearest import unknown
from gramian._registry import registering
from gramian.mixers.mixer import Mixer

__all__ = ["MIXERS", "build", "options_of", "register", "takes"]

MIXERS: dict[str, type[Mixer]] = {}
"""The registered mixers by name."""

_MixerType = TypeVar("_MixerType", bound="type[Mixer]")

_SHARED = {
    "width",
    "heads",
    "filter",
    "max_length",
    "short_kernel",
    "kernel_dropout",
    "bidirectional",
}
"""The arguments that a model sets for all of its layers."""


def register(kind: str) -> Callable[[_MixerType], _MixerType]:
    """Return a class decorator that registers a mixer under the name `kind`.

    Raises:
        ValueError: if another class is registered under that name.
    """
    return registering(MIXERS, kind, "kind", "mixer type")


def build(config: str | Mapping[str, Any] | Mixer, **defaults: Any) -> Mixer:
    """Build a mixer from its configuration.

    Args:
        config: `{"type": name, …}` with the constructor's arguments, the name alone, or a mixer,
            which is returned unchanged.
        defaults: Values for arguments that `config` omits, such as `width`, `heads`, `filter` and
            `max_length`. The mixer gets only the defaults that its constructor accepts.

    Raises:
        ValueError: if the type is unknown, if the mixer does not accept an argument, or if `config`
            contradicts the requested width.
    """
    if isinstance(config, Mixer):
        built = config
    else:
        given = {"type": config} if isinstance(config, str) else dict(config)
        kind = given.pop("type", None)
        if kind not in MIXERS:
            raise ValueError(unknown("mixer type", kind, MIXERS))
        accepted = inspect.signature(MIXERS[kind]).parameters
        for key in given:
            if key not in accepted:
                raise ValueError(unknown(f"key of a mixer {kind!r}", key, accepted))
        arguments = {name: value for name, value in defaults.items() if name in accepted}
        try:
            built = MIXERS[kind](**(arguments | given))
        except TypeError as error:
            raise ValueError(f"the mixer {kind!r} cannot be built: {error}.") from None
    if built.width != defaults.get("width", built.width):
        raise ValueError(
            f"a mixer of width {defaults['width']} is needed; got one of {built.width}."
        )
    return built


def takes(kind: str, argument: str) -> bool:
    """Return whether the constructor of a registered mixer accepts an argument."""
    return argument in inspect.signature(MIXERS[kind]).parameters


def options_of(kind: str) -> list[str]:
    """Return the arguments of a registered mixer, except those that a model sets for all layers."""
    return [name for name in inspect.signature(MIXERS[kind]).parameters if name not in _SHARED]
