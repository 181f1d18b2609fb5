"""Watch the scans that layers of transformers take from the file that defines them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from gramian.shrinking._family import Call

__all__ = ["state_outputs", "time_steps", "watch_scan"]


@contextmanager
def watch_scan(
    layer: nn.Module,
    name: str,
    read: Callable[..., Call],
    visit: Callable[[Call], None],
) -> Iterator[None]:
    """Call `visit` with every call of a scan in this context.

    Args:
        layer: the layer that calls the scan.
        name: name of the scan in the file that defines the layer's class.
        read: function that maps the scan and its arguments to a `Call`.
        visit: function that is called after the scan.

    Raises:
        ValueError: if the file has no such scan, which another version of transformers may cause.
    """
    place: Any = sys.modules[type(layer).__module__]
    scan = getattr(place, name, None)
    if scan is None:
        raise ValueError(
            f"{type(layer).__name__} must take the scan {name} from the file that defines it; got "
            f"{place.__name__} without it."
        )

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = scan(*args, **kwargs)
        visit(read(scan, result, *args, **kwargs))
        return result

    setattr(place, name, watched)
    try:
        yield
    finally:
        setattr(place, name, scan)


def time_steps(dt: Tensor, bias: Tensor | None, positive: bool) -> Tensor:
    """Return the steps Δ of Mamba's scans, in at least single precision.

    Args:
        dt: the argument of a scan.
        bias: what the scan adds to it, or None; it broadcasts to `dt`.
        positive: whether softplus follows.
    """
    step = dt.to(torch.promote_types(dt.dtype, torch.float32))
    if bias is not None:
        step = step + bias.to(step.dtype)
    return softplus(step) if positive else step


def state_outputs(scan: Callable[..., Any], *args: Tensor, **options: Any) -> Callable[[], Tensor]:
    """Return a function that runs one of Mamba's scans without its skip and its gate."""

    def outputs() -> Tensor:
        y = scan(*args, **{**options, "D": None, "z": None})
        found: Tensor = y[0] if isinstance(y, tuple) else y
        return found

    return outputs
