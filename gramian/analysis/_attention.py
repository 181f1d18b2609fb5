"""Read the maps of softmax attention that goes through transformers' attention interface.

The layers use the implementation "eager" while they are read, so that the masks and position biases
are those that the model itself makes. `eager_attention_forward` of the modeling file returns the
map with the output. If the map applied to the values is not the output, as in layers that scale
their output, the map is the output for the identity matrix as values.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gramian.analysis._responses import TOLERANCE, Unreadable
from gramian.analysis._storage import Storage
from gramian.analysis._tracing import Call
from gramian.analysis._values import copied

__all__ = ["ATTENTION", "attention_values", "eager_attention", "read_attention", "takes_mask"]

ATTENTION = "eager_attention_forward"
"""Name that transformers' modeling files give to the attention function that they fall back to."""


_PROBES = 4
"""The number of random combinations of channels in which a map must give the output."""


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Make the layers use the attention functions of their modeling files, without a cache."""
    from transformers import PreTrainedModel

    configs: dict[int, Any] = {}
    takes: dict[int, bool] = {}
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        todo = [module.config]
        chosen = _takes_functions(module)
        while todo:
            config = todo.pop()
            configs[id(config)] = config
            takes[id(config)] = takes.get(id(config), False) or chosen
            inner = (getattr(config, key, None) for key in config.sub_configs)
            todo += [c for c in inner if c is not None and id(c) not in configs]
    before = {
        key: (_implementation(config), getattr(config, "use_cache", None))
        for key, config in configs.items()
    }
    try:
        for key, config in configs.items():
            if takes[key]:
                _set_implementation(config, "eager")
            if before[key][1] is not None:
                config.use_cache = False
        yield
    finally:
        for key, config in configs.items():
            _set_implementation(config, before[key][0])
            if before[key][1] is not None:
                config.use_cache = before[key][1]


def read_attention(call: Call) -> tuple[Tensor, Storage]:
    """Return the maps (heads, L, L) of a call of an eager attention function, and its storage.

    Queries, keys and values in half precision are widened to single precision, in a second call
    whose output is not used.

    Args:
        call: The call of a function that takes the module, queries (batch, heads, L, N), keys and
            values (batch, key heads, L, N), and a mask.

    Raises:
        Unreadable: if no causal map gives the output.
    """
    function, result = call.function, call.result
    args, kwargs = call.inputs
    bound = inspect.signature(function).bind(*args, **kwargs)
    names = list(bound.arguments)
    if len(names) < 4 or not all(isinstance(bound.arguments[n], Tensor) for n in names[1:4]):
        raise Unreadable("its attention function has other arguments than those of transformers.")
    key: Tensor = bound.arguments[names[2]]
    value: Tensor = bound.arguments[names[3]]
    itemsize = value.element_size()
    dtype = torch.promote_types(value.dtype, torch.float32)
    if dtype != value.dtype:
        for name in names[1:4]:
            bound.arguments[name] = bound.arguments[name].to(dtype)
        result = function(*copied(bound.args), **copied(bound.kwargs))
        value = bound.arguments[names[3]]
    output = result[0]
    weights = result[1] if len(result) > 1 else None
    if not isinstance(weights, Tensor) or not _gives(weights, value, output):
        length = value.shape[-2]
        identity = torch.eye(length, dtype=dtype, device=value.device)
        bound.arguments[names[3]] = identity.expand(*value.shape[:2], length, length)
        answer = function(*copied(bound.args), **copied(bound.kwargs))[0]
        weights = answer.transpose(1, 2)  # (1, heads, L, L)
        if not _gives(weights, value, output):
            raise Unreadable("its output is not its map applied to its values.")
    rows, columns = weights.shape[-2:]
    if rows != columns:
        raise Unreadable(f"it maps {columns} positions to {rows}: not those of one sequence.")
    if bool(weights[0].triu(1).any()):
        raise Unreadable("it is not causal: it looks ahead.")
    group = weights.shape[1] // value.shape[1]
    return weights[0].detach(), Storage(value.shape[-1], key.shape[-1], group, itemsize)


def takes_mask(call: Call) -> bool:
    """Return whether a call is one of the function `ATTENTION`, and takes a mask."""
    function = call.key[:2] == ("function", ATTENTION)
    return function and "attention_mask" in inspect.signature(call.function).parameters


def attention_values(call: Call) -> Tensor:
    """Return the values (heads, L, N) to which a call that `read_attention` reads applies its maps.

    Half precision is widened, as the maps are.
    """
    args, kwargs = call.inputs
    query, _, value = list(inspect.signature(call.function).bind(*args, **kwargs).args)[1:4]
    value = value[0].to(torch.promote_types(value.dtype, torch.float32))
    widened: Tensor = value.repeat_interleave(query.shape[1] // len(value), dim=0)
    return widened


def _gives(weights: Tensor, value: Tensor, output: Tensor) -> bool:
    """Return whether weights (1, heads, L, L) times values (1, key heads, L, N) give the output.

    A few random combinations of the channels are compared. Weights that are not finite count as
    right: the measurement raises an error about them.
    """
    if weights.ndim != 4 or weights.shape[1] % value.shape[1] or len(weights) != 1:
        return False
    if weights.shape[-1] != value.shape[-2]:
        return False
    random = torch.randn(value.shape[-1], _PROBES, generator=torch.Generator().manual_seed(2))
    random = random.to(value)
    value = (value @ random).repeat_interleave(weights.shape[1] // value.shape[1], dim=1)
    expected = weights.to(value.dtype) @ value
    output = output.reshape(1, expected.shape[2], expected.shape[1], len(random))
    error = (expected - output.transpose(1, 2).to(random) @ random).norm()
    if bool(error <= TOLERANCE * expected.norm()):
        return True
    return not bool(weights.isfinite().all())


def _takes_functions(model: Any) -> bool:
    """Return whether the attention function of a transformers model can be chosen by name."""
    return bool(model._can_set_attn_implementation())  # noqa: SLF001 (there is no public test)


def _implementation(config: Any) -> str | None:
    """Return the name of the attention function in a configuration of transformers."""
    return config._attn_implementation_internal  # noqa: SLF001 (there is no public field)


def _set_implementation(config: Any, name: str | None) -> None:
    """Set the name of the attention function in one configuration, and in no other."""
    config._attn_implementation_internal = name  # noqa: SLF001 (public setters change others, too)
