"""Write standard JSON. NaN and infinities become null.

By default, Python writes NaN and Infinity as words that other JSON parsers reject.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["to_json"]


def to_json(values: Any, **options: Any) -> str:
    """Return JSON text. Floating-point numbers that are not finite become null.

    Args:
        values: plain values, mappings, lists and tuples.
        options: options of `json.dumps`.

    Raises:
        TypeError: if JSON cannot hold a value.
    """
    return json.dumps(_finite(values), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
