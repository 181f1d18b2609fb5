"""Watch the scans that layers of transformers take from the file that defines them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from gramian.shrinking._family import Call

__all__ = ["watch_scan"]


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
