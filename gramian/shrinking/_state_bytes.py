"""Measure how many bytes a model stores for a sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["state_bytes"]


@torch.no_grad()
def state_bytes(model: Any, window: Tensor) -> int:
    """Return the bytes of the cache after a window, (length): states, keys and values.

    Raises:
        ValueError: if the model cannot run with a cache.
    """
    own = getattr(model, "state_bytes", None)
    if own is not None:
        return int(own(1, len(window)))
    try:
        output = model(window[None].to(model.device), use_cache=True)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"shrink needs a model that runs with a cache; this {type(model).__name__} does not: "
            f"{reason}"
        ) from error
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        cache = getattr(output, "cache_params", None)
    found = {x.untyped_storage().data_ptr(): x.numel() * x.element_size() for x in _tensors(cache)}
    return sum(found.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a cache, its layers, and their lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
    elif type(value).__module__.startswith("transformers."):
        yield from _tensors(vars(value))
