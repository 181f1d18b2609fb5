"""Compare values, and raise an `AssertionError` with one sentence if they disagree."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gramian._json import to_json

__all__ = [
    "nudge",
    "require",
    "require_close",
    "require_gradients",
    "require_json",
    "stopped",
]


def require(holds: bool | Tensor, sentence: str) -> None:
    """Raise an AssertionError with the message `sentence` unless `holds` is true."""
    if not bool(holds):
        raise AssertionError(sentence)


def require_close(claim: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise an AssertionError unless two tensors agree.

    Args:
        claim: beginning of the message. It states the property that should hold.
        actual: the computed tensor.
        expected: the correct tensor, of the same shape.
        tolerance: largest relative error accepted, both in the l2 norm and in the largest entry.
    """
    require(
        actual.shape == expected.shape,
        f"{claim}: the shape is {tuple(actual.shape)}, not {tuple(expected.shape)}.",
    )
    if not expected.numel():
        return
    kind = torch.complex128 if expected.is_complex() else torch.float64
    actual, expected = actual.detach().to(kind), expected.detach().to(kind)
    difference = actual - expected
    error = 0.0
    for order in (2, torch.inf):
        scale = torch.linalg.vector_norm(expected.flatten(), order)
        size = torch.linalg.vector_norm(difference.flatten(), order)
        ratio = float(size / scale) if float(scale) else float(size)
        error = ratio if ratio != ratio else max(error, ratio)
        require(
            ratio <= tolerance,
            f"{claim}: the relative error is {error:.1e}, more than {tolerance:.0e}.",
        )


def require_gradients(owner: str, names: Iterable[str], gradients: Iterable[Tensor | None]) -> None:
    """Raise an AssertionError unless every gradient exists, is finite and has a nonzero entry."""
    for name, gradient in zip(names, gradients, strict=True):
        require(gradient is not None, f"{owner}: no gradient reaches the parameter {name}.")
        assert gradient is not None
        require(
            gradient.isfinite().all(),
            f"{owner}: the gradient of the parameter {name} is not finite.",
        )
        require(
            gradient.abs().max() > 0,
            f"{owner}: the gradient of the parameter {name} is zero everywhere.",
        )


def stopped(gradients: Iterable[Tensor | None]) -> bool:
    """Return whether any gradient exists but is zero everywhere."""
    return any(gradient is not None and not gradient.any() for gradient in gradients)


def nudge(parameters: Iterable[Tensor], random: torch.Generator) -> None:
    """Change parameters a little, so that none keeps an initial value of zero.

    If a weight is zero, no gradient passes to the values that it multiplies.
    """
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            parameter += 1e-2 * noise.to(parameter)


def require_json(owner: str, config: dict[str, Any]) -> dict[str, Any]:
    """Write `config` as JSON and return it read again, or raise an AssertionError if it changed."""
    try:
        again: dict[str, Any] = json.loads(to_json(config))
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{owner}: config() cannot be written as JSON: {error}.") from error
    for key, value in config.items():
        require(
            again.get(key) == value,
            f"{owner}: JSON changes {key!r} of config() from {value!r} to {again.get(key)!r}.",
        )
    return again
