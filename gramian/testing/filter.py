"""Test filters: configuration, lengths, precision and gradients."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from gramian.filters import Filter, build
from gramian.testing.comparison import (
    nudge,
    require,
    require_close,
    require_gradients,
    require_json,
    stopped,
)
from gramian.testing.system import check_system

__all__ = ["check_filter"]

_LENGTHS = (1, 2, 3, 63)


def check_filter(filter: Filter, *, tolerance: float = 1e-4, seed: int = 0) -> None:
    """Check that a registered filter keeps the contract of filters.

    - `build(filter.config())` makes a filter with the same system.
    - The first 1, 2, 3 and 63 taps do not depend on how many taps are requested. A filter that is
      built with one of these numbers as `max_length` has finite taps, unless it refuses this
      `max_length` with a ValueError.
    - A cast to half precision leaves the parameters in single precision and does not change the
      taps. No parameter and no buffer is complex.
    - Gradients reach every trainable parameter. If zeros stop a gradient, the gradient must pass at
      slightly changed values of the parameters.
    - The system passes `check_system`.

    Args:
        filter: the filter. It is not modified.
        tolerance: largest relative error accepted in single precision.
        seed: seed of the random numbers.

    Raises:
        AssertionError: if a property fails. The message names the property.
        TypeError: if `filter` is not a `Filter`.
    """
    if not isinstance(filter, Filter):
        raise TypeError(f"check_filter takes a Filter; got {type(filter).__name__}.")
    filter = copy.deepcopy(filter)
    name = f"the filter {type(filter).__name__}"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        _check_config(filter, name)
        _check_lengths(filter, name, tolerance)
        _check_precision(filter, name, tolerance)
    _check_gradients(filter, name, seed)
    with torch.no_grad():
        system = copy.deepcopy(filter).double()()
    check_system(system, tolerance=1e-7, seed=seed)


def _built(config: dict[str, Any], filter: Filter) -> Filter:
    """Build a filter from its configuration, on the device of another one."""
    weights = [*filter.parameters(), *filter.buffers()]
    return build(config).to(weights[0].device) if weights else build(config)


def _taps(filter: Filter, length: int) -> Tensor:
    taps: Tensor = filter(length).impulse_response(length)
    return taps


def _check_config(filter: Filter, name: str) -> None:
    require(hasattr(filter, "name"), f"{name}: it must be registered, by `filters.register`.")
    config = require_json(name, filter.config())
    try:
        again = _built(config, filter)
    except ValueError as error:
        sentence = f"{name}: build(config()) must make the same filter again: {error}"
        raise AssertionError(sentence) from error
    require(
        type(again) is type(filter) and again.config() == config,
        f"{name}: build(config()) must make the same filter again; got {again.config()!r} "
        f"from {config!r}.",
    )
    weights = filter.state_dict()
    different = {key for key in again.state_dict() if key not in weights}
    different |= {
        key
        for key, value in weights.items()
        if key not in again.state_dict() or again.state_dict()[key].shape != value.shape
    }
    require(
        not different,
        f"{name}: build(config()) must make weights of the same names and shapes; "
        f"{', '.join(sorted(different))} differ.",
    )
    again.load_state_dict(weights)
    length = filter.max_length
    require(
        torch.equal(_taps(again, length), _taps(filter, length)),
        f"{name}: build(config()) with the same weights must have the same taps.",
    )
    for key in filter.optimizer_hints():
        known = {one for one, _ in filter.named_parameters()}
        require(key in known, f"{name}: optimizer_hints() names {key!r}, which is no parameter.")


def _check_lengths(filter: Filter, name: str, tolerance: float) -> None:
    system = filter()
    require(
        tuple(system.channel_shape) == (filter.channels,),
        f"{name}: its system must have the channels ({filter.channels},); got "
        f"{tuple(system.channel_shape)}.",
    )
    taps = system.impulse_response(max(filter.max_length, *_LENGTHS))
    require(taps.isfinite().all(), f"{name}: its taps must be finite.")
    for length in _LENGTHS:
        if length <= filter.max_length:
            claim = f"{name}: filter({length}) must have the first taps of filter()"
            require_close(claim, _taps(filter, length), taps[:, :length], tolerance)
        try:
            short = _built(filter.config() | {"max_length": length}, filter)
        except ValueError:  # a filter may refuse a max_length that is too small
            continue
        require(
            _taps(short, length).isfinite().all(),
            f"{name}: with max_length {length} its taps must be finite.",
        )


def _check_precision(filter: Filter, name: str, tolerance: float) -> None:
    for key, value in filter.state_dict().items():
        require(not value.is_complex(), f"{name}: {key} is complex, which is not to be stored.")
    single = copy.deepcopy(filter).float()
    expected = _taps(single, filter.max_length)
    for dtype in (torch.bfloat16, torch.float16):
        single.to(dtype)
        for key, parameter in single.named_parameters():
            require(
                parameter.dtype == torch.float32,
                f"{name}: the parameter {key} must stay in float32 when the model is cast to "
                f"{dtype}; got {parameter.dtype}.",
            )
        require(
            torch.equal(_taps(single, filter.max_length), expected),
            f"{name}: a cast to {dtype} must leave the taps as they are.",
        )
    double = _taps(copy.deepcopy(filter).double(), filter.max_length)
    claim = f"{name}: in double precision it must have the same taps"
    require_close(claim, expected, double, tolerance)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        weights = build(filter.config()).state_dict()
    finally:
        torch.set_default_dtype(default)
    for key, value in weights.items():
        require(
            not value.is_floating_point() or value.dtype == torch.float32,
            f"{name}: {key} must be in float32 where the default is bfloat16; got {value.dtype}.",
        )


def _check_gradients(filter: Filter, name: str, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    trained = {key: one for key, one in filter.named_parameters() if one.requires_grad}
    if not trained:
        return
    taps = _taps(filter, filter.max_length)
    require(taps.requires_grad, f"{name}: its taps must depend on its parameters.")
    weight = torch.randn(taps.shape, generator=random).to(taps)

    def gradients() -> tuple[Tensor | None, ...]:
        loss = (_taps(filter, filter.max_length) * weight).sum()
        return torch.autograd.grad(loss, list(trained.values()), allow_unused=True)

    found = gradients()
    if stopped(found):
        nudge(trained.values(), random)
        found = gradients()
    require_gradients(name, trained, found)
