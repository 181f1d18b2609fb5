"""The contract of every filter, and the registry that builds filters from their configuration."""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch

from gramian._checks import check_sizes
from gramian._modules import SinglePrecisionModule
from gramian._nearest import unknown
from gramian._registry import registering
from gramian.ops.devices import has_float64
from gramian.ops.precision import full_precision
from gramian.systems import System

__all__ = ["Filter", "build", "check_lr", "register"]

_REGISTRY: dict[str, type[Filter]] = {}
_FilterType = TypeVar("_FilterType", bound="type[Filter]")


class Filter(SinglePrecisionModule, abc.ABC):
    """A module whose parameters make a time-invariant system, with one channel for each filter.

    `filter(length)` goes through `forward`, so that hooks and sharding see the call. Every call
    makes a new system, and gradients flow through it. The parameters describe dynamics, in which a
    pole of 0.999 must not become 1.0. So the parameters stay in float32 when the model is cast to
    half precision, and the system is made outside of autocast.

    Args:
        channels: The number of filters.
        max_length: The number of taps that kernels have in training.
    """

    name: ClassVar[str]
    """The name under which the class is registered."""

    def __init__(self, channels: int, max_length: int) -> None:
        super().__init__()
        check_sizes(channels=channels, max_length=max_length)
        self.channels = channels
        self.max_length = max_length

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.needs_float64:
            device = next(self.parameters()).device
            if not has_float64(device):
                raise NotImplementedError(
                    f"the filter {self.name!r} is computed in double precision, which the device "
                    f"{device.type!r} does not have; move the model to the CPU, or take a filter "
                    "such as 'implicit', or 'rtf' with a truncated numerator."
                )
        with full_precision():
            return super().__call__(*args, **kwargs)

    @property
    def needs_float64(self) -> bool:
        """Whether the system is made in double precision, which not every device has."""
        return False

    @abc.abstractmethod
    def forward(self, length: int | None = None) -> System:
        """Make the system of all channels.

        Args:
            length: The number of taps that will be used. None means as many as the filter has.
        """

    @abc.abstractmethod
    def reset_parameters(self) -> None:
        """Draw the initial parameters in place, and fill the buffers."""

    def reset_buffers(self) -> None:
        """Fill, in place, the buffers that follow from the configuration."""

    def resample(self, step: float) -> None:
        """Change the parameters, in place, for samples that are `step` old samples apart.

        A filter that was trained on a signal then filters the same signal at another sampling rate.
        The input counts as held between samples, so that a tap covers the time of `step` old taps.
        `max_length` stays the same.

        Args:
            step: The distance of new samples in old ones: 2 for half of the sampling rate, 0.5 for
                twice the rate.

        Raises:
            NotImplementedError: if the filter has no poles.
            ValueError: if the step is not a positive, finite number, or if the parameters cannot
                describe the resampled filter.
        """
        raise NotImplementedError(
            f"a filter {self.name!r} has no sampling rate to change; rtf, s4d, s4 and modal have."
        )

    def config(self) -> dict[str, Any]:
        """Return the configuration, ready for JSON, from which `build` makes this filter again."""
        return {"type": self.name, "channels": self.channels, "max_length": self.max_length}

    def optimizer_hints(self) -> dict[str, dict[str, float]]:
        """Return optimizer options for parameters that should differ from the rest of the model.

        Returns:
            A mapping from the names of parameters, as in `named_parameters`, to their options, such
            as `{"a": {"weight_decay": 0.0}}`. `gramian.parameter_groups` makes parameter groups
            from these options.
        """
        return {}

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.config().items() if k != "type")


def check_lr(lr: float | None, name: str = "lr") -> float | None:
    """Return `lr`, or raise a ValueError unless it is None or a finite number of at least 0."""
    if lr is not None and not (isinstance(lr, int | float) and 0 <= lr < float("inf")):
        raise ValueError(f"{name} must be None or a learning rate of at least 0; got {lr!r}.")
    return lr


def register(name: str) -> Callable[[_FilterType], _FilterType]:
    """Register the decorated filter class for configurations `{"type": name, …}`.

    Raises:
        ValueError: if another class already has the name.
    """
    return registering(_REGISTRY, name, "name", "filter type")


def build(config: dict[str, Any] | Filter, **defaults: Any) -> Filter:
    """Build a filter from its configuration.

    Args:
        config: `{"type": name, …}` with the constructor's arguments, or a filter, which is returned
            unchanged.
        defaults: Arguments that `config` may omit, such as `channels` and `max_length`.

    Raises:
        ValueError: if the type is unknown, if the filter does not accept an argument, or if
            `config` contradicts the number of channels in `defaults`.
    """
    if isinstance(config, Filter):
        built = config
    else:
        arguments = {**defaults, **config}
        kind = arguments.pop("type", None)
        if kind not in _REGISTRY:
            raise ValueError(unknown("filter type", kind, _REGISTRY))
        accepted = inspect.signature(_REGISTRY[kind]).parameters
        if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in accepted.values()):
            for key in arguments:
                if key not in accepted:
                    names = [name for name in accepted if name not in defaults]
                    raise ValueError(unknown(f"key of a filter {kind!r}", key, names))
        try:
            built = _REGISTRY[kind](**arguments)
        except TypeError as error:
            raise ValueError(f"the filter {kind!r} cannot be built: {error}.") from None
        if torch.finfo(torch.get_default_dtype()).bits < 32:  # set when loading in half precision
            built.float()
    if built.channels != defaults.get("channels", built.channels):
        raise ValueError(
            f"a filter of {defaults['channels']} channels is needed; got one of {built.channels}."
        )
    return built
