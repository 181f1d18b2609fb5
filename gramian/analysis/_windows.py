r"""Let attention see a sliding window of the text, in place of all of it.

Query t of a windowed head sees the last w tokens, t - w < s <= t, and the first tokens s < m, the
*sinks*, on which much attention rests whatever they are (arXiv 2309.17453). The softmax runs over
these tokens alone. So the state of the head is w + m keys and values, however long the text is.

The maps of a windowed head follow from those of the head: entries outside of the window are 0, and
the others of a row are divided by what is left of its softmax.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from gramian.analysis._attention import ATTENTION, eager_attention
from gramian.analysis._inputs import check_model
from gramian.analysis._operators import exclusive
from gramian.analysis._tracing import Tracer
from gramian.mixers import SoftmaxAttention

__all__ = ["check_window", "window_attention", "window_maps"]

_ROUNDING = 16
"""The multiple of the dtype's precision up to which the sum of a softmax may differ from 1."""


@contextmanager
def window_attention(
    model: nn.Module,
    heads: Mapping[str, Sequence[int] | None],
    window: int,
    sinks: int = 0,
) -> Iterator[None]:
    """Let some heads of a model attend to a sliding window of the text within this context.

    The layers may be any whose attention goes through transformers' attention interface, and
    `gramian.mixers.SoftmaxAttention`. They read whole sequences, without a cache. Within the
    context, the model's attention functions are the eager ones, in this thread; afterwards, and
    after an exception, everything is as before. Weights are not changed.

    Args:
        model: The model.
        heads: The windowed heads of every layer by the path of its module, as `StateReport` names
            them; None for all heads of the layer.
        window: Number w of the last tokens that a query sees, its own included.
        sinks: Number of the first tokens that a query sees, too.

    Raises:
        TypeError: if the model is not a module.
        ValueError: if the window is below 1, or the number of sinks below 0; if the model has no
            module of a path, or no head of a number; and, when the model runs, if a module calls no
            attention function, or if it does not read whole sequences.
    """
    check_model(model)
    check_window(window, sinks)
    chosen = {path: _module(model, path) for path in heads}
    tracer = Tracer(model)
    called: set[str] = set()

    def handle(
        kind: str, name: str, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        path = tracer.paths[id(tracer.stack[-1])]
        if kind != "function" or name != ATTENTION or path not in chosen:
            return function(*args, **kwargs)
        called.add(path)
        bound = inspect.signature(function).bind(*args, **kwargs)
        _narrow(bound, path, heads[path], window, sinks)
        return function(*bound.args, **bound.kwargs)

    def leave(path: str, module: nn.Module, output: Any) -> None:
        if path in chosen and path not in called:
            raise ValueError(
                f"{path} cannot have a window: {type(module).__name__} calls no attention function "
                "of transformers."
            )

    with ExitStack() as stack:
        stack.enter_context(exclusive())
        if "transformers" in sys.modules:
            stack.enter_context(eager_attention(model))
        for path, module in chosen.items():
            if isinstance(module, SoftmaxAttention):
                called.add(path)
                forward = _of_mixer(module, path, heads[path], window, sinks)
                stack.enter_context(tracer.patched(module, forward))
        stack.enter_context(tracer.installed(lambda *_: None, leave))
        tracer.handler = handle
        yield


def window_maps(maps: Tensor, window: int, sinks: int = 0) -> Tensor:
    """Compute the maps of windowed heads from those of the heads.

    Args:
        maps: Maps of softmax attention, (*C, L, L). If a row sums to less than 1, the rest of its
            softmax is on no token, and stays there.
        window: Number of the last tokens that a query sees, its own included.
        sinks: Number of the first tokens that it sees, too.

    Returns:
        (*C, L, L), in the dtype of the maps.

    Raises:
        ValueError: if the window is below 1, or the number of sinks below 0.
    """
    check_window(window, sinks)
    seen = _seen(maps.shape[-1], window, sinks, maps.device)
    nowhere = 1 - maps.double().sum(-1, keepdim=True)
    rounding = _ROUNDING * torch.finfo(maps.dtype).eps
    nowhere = torch.where(nowhere > rounding, nowhere, 0).to(maps.dtype)
    kept = maps * seen
    return kept / (kept.sum(-1, keepdim=True) + nowhere).clamp_min(torch.finfo(maps.dtype).tiny)


def check_window(window: int, sinks: int) -> None:
    """Check the sizes of a window.

    Raises:
        ValueError: if one is out of range.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1 token; got {window}.")
    if sinks < 0:
        raise ValueError(f"sinks must be at least 0 tokens; got {sinks}.")


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} has no module {path}.") from error


def _seen(length: int, window: int, sinks: int, device: torch.device) -> Tensor:
    """Return which keys each query sees, (L, L)."""
    index = torch.arange(length, device=device)
    away = index[:, None] - index
    return (away >= 0) & ((away < window) | (index < sinks))


def _hidden(path: str, count: int, chosen: Sequence[int] | None, seen: Tensor) -> Tensor:
    """Return which keys the queries of each head do not see because of the window, (H or 1, L, L).

    Raises:
        ValueError: if the layer does not have one of the heads.
    """
    if chosen is None:
        return ~seen[None]
    for head in chosen:
        if not 0 <= head < count:
            raise ValueError(f"{path} has {count} heads; got the number {head}.")
    windowed = torch.zeros(count, dtype=torch.bool, device=seen.device)
    windowed[list(chosen)] = True
    return windowed[:, None, None] & ~seen


def _narrow(
    bound: inspect.BoundArguments,
    path: str,
    chosen: Sequence[int] | None,
    window: int,
    sinks: int,
) -> None:
    """Hide what is outside of a window in the mask of an attention function's arguments."""
    names = list(bound.signature.parameters)
    query, key = (bound.arguments.get(name) for name in names[1:3])
    if (
        "attention_mask" not in names
        or not isinstance(query, Tensor)
        or not isinstance(key, Tensor)
    ):
        raise ValueError(f"{path} cannot have a window: its attention function takes no mask.")
    length, count = query.shape[-2], query.shape[1]
    if key.shape[-2] != length:
        raise ValueError(
            f"{path}: a window needs whole sequences, without a cache; got {length} queries and "
            f"{key.shape[-2]} keys."
        )
    hidden = _hidden(path, count, chosen, _seen(length, window, sinks, query.device))
    mask = bound.arguments.get("attention_mask")
    if mask is None:
        mask = query.new_zeros(1, 1, length, length)
    if mask.dtype == torch.bool:
        bound.arguments["attention_mask"] = mask & ~hidden
    else:
        least = torch.finfo(mask.dtype).min
        bound.arguments["attention_mask"] = torch.where(hidden, least, mask)


def _of_mixer(
    mixer: SoftmaxAttention,
    path: str,
    chosen: Sequence[int] | None,
    window: int,
    sinks: int,
) -> Callable[..., Tensor]:
    """Return what replaces the forward of a mixer of Gramian."""

    def forward(former: Any, x: Tensor, state: Any = None, mask: Any = None) -> Tensor:
        if state is not None or mask is not None:
            raise ValueError(f"{path}: a window needs whole sequences, without padding or a state.")
        index = torch.arange(x.shape[1], device=x.device)
        q, k, v = mixer.project(x, index[None])
        hidden = _hidden(path, mixer.heads, chosen, _seen(len(index), window, sinks, x.device))
        own = _seen(len(index), mixer.window or len(index), 0, x.device)
        y = scaled_dot_product_attention(
            q, k, v, attn_mask=own & ~hidden, enable_gqa=mixer.heads != mixer.kv_heads
        )
        return mixer.merge(y)

    return forward
