"""Compute the attention of some layers of a model by another function.

The function is given the queries, keys, values and mask of a call, positions already applied, and
returns the outputs of all heads. Layers may be any whose attention goes through transformers'
attention interface, and `gramian.mixers.SoftmaxAttention`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from gramian.analysis._attention import ATTENTION, eager_attention
from gramian.analysis._inputs import check_model
from gramian.analysis._operators import exclusive
from gramian.analysis._tracing import Tracer
from gramian.mixers import SoftmaxAttention

__all__ = ["Attended", "AttentionCall", "replace_attention"]

Attended = tuple[Tensor, Tensor | None]
"""The outputs of all heads, (batch, L, H, N), and their maps, (batch, H, L, L), or None."""


@dataclass(frozen=True)
class AttentionCall:
    """A call of causal attention with H heads, G of which share keys and values each.

    Attributes:
        path: path of the module in the model.
        query: queries, (batch, H, L, N), with their positions.
        key: keys, (batch, H / G, L, N), with their positions.
        value: values, (batch, H / G, L, M).
        mask: what the queries see, (batch or 1, H or 1, L, L): a boolean mask, which is True where
            a key is seen, or numbers that are added to the scores; None if no query looks ahead.
        scale: the factor of the products of queries and keys.
        run: function that computes the layer's own attention with another mask.
    """

    path: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    run: Callable[[Tensor | None], Attended] = field(repr=False)

    @property
    def visible(self) -> Tensor:
        """Which keys the layer's queries see, (batch or 1, H or 1, L, L), boolean."""
        if self.mask is None:
            length = self.query.shape[-2]
            ones = torch.ones(length, length, dtype=torch.bool, device=self.query.device)
            return ones.tril()[None, None]
        if self.mask.dtype == torch.bool:
            return self.mask
        return self.mask > torch.finfo(self.mask.dtype).min / 2

    @property
    def real(self) -> Tensor:
        """Which tokens are no padding, (batch or 1, L), boolean: their own queries see them."""
        return self.visible.diagonal(dim1=-2, dim2=-1).any(1)

    def check_head(self, head: int) -> None:
        """Raise a ValueError if there is no head of a number."""
        count = self.query.shape[1]
        if not 0 <= head < count:
            raise ValueError(f"{self.path} has {count} heads; got the number {head}.")


@contextmanager
def replace_attention(
    model: nn.Module, functions: Mapping[str, Callable[[AttentionCall], Attended]]
) -> Iterator[None]:
    """Compute the attention of some layers by other functions within this context.

    The layers may be any whose attention goes through transformers' attention interface, and
    `gramian.mixers.SoftmaxAttention`. They read whole sequences, without a cache. Within the
    context, the model's attention functions are the eager ones, in this thread; afterwards, and
    after an exception, everything is as before. Weights are not changed.

    Args:
        model: The model.
        functions: For the path of each layer's module, a function that is given the call and
            returns the outputs of all heads, (batch, L, H, M), and their maps or None.

    Raises:
        TypeError: if the model is not a module.
        ValueError: if the model has no module of a path; and, when the model runs, if a module
            calls no attention function that takes a mask, or if it does not read whole sequences.
    """
    check_model(model)
    chosen = {path: _module(model, path) for path in functions}
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
        return functions[path](_call(path, function, bound))

    def leave(path: str, module: nn.Module, output: Any) -> None:
        if path in chosen and path not in called:
            raise ValueError(
                f"the attention of {path} cannot be replaced: {type(module).__name__} calls no "
                "attention function of transformers."
            )

    with ExitStack() as stack:
        stack.enter_context(exclusive())
        if "transformers" in sys.modules:
            stack.enter_context(eager_attention(model))
        for path, module in chosen.items():
            if isinstance(module, SoftmaxAttention):
                called.add(path)
                forward = _of_mixer(module, path, functions[path])
                stack.enter_context(tracer.patched(module, forward))
        stack.enter_context(tracer.installed(lambda *_: None, leave))
        tracer.handler = handle
        yield


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} has no module {path}.") from error


def _call(path: str, function: Callable[..., Any], bound: inspect.BoundArguments) -> AttentionCall:
    """Return the call of an attention function of transformers."""
    names = list(bound.signature.parameters)
    query, key, value = (bound.arguments.get(name) for name in names[1:4])
    if (
        "attention_mask" not in names
        or not isinstance(query, Tensor)
        or not isinstance(key, Tensor)
        or not isinstance(value, Tensor)
    ):
        raise ValueError(
            f"the attention of {path} cannot be replaced: its attention function takes no mask."
        )
    length = query.shape[-2]
    if key.shape[-2] != length:
        raise ValueError(
            f"{path}: attention is replaced on whole sequences, without a cache; got {length} "
            f"queries and {key.shape[-2]} keys."
        )

    def run(mask: Tensor | None) -> Attended:
        bound.arguments["attention_mask"] = mask
        result = function(*bound.args, **bound.kwargs)
        return result[0], result[1] if len(result) > 1 else None

    given = bound.arguments | bound.arguments.get("kwargs", {})
    scale = given.get("scaling")
    return AttentionCall(
        path,
        query,
        key,
        value,
        bound.arguments.get("attention_mask"),
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        run,
    )


def _of_mixer(
    mixer: SoftmaxAttention, path: str, function: Callable[[AttentionCall], Attended]
) -> Callable[..., Tensor]:
    """Return what replaces the forward of a mixer of Gramian."""

    def forward(former: Any, x: Tensor, state: Any = None, mask: Any = None) -> Tensor:
        if state is not None or mask is not None:
            raise ValueError(
                f"{path}: attention is replaced on whole sequences, without padding or a state."
            )
        index = torch.arange(x.shape[1], device=x.device)
        q, k, v = mixer.project(x, index[None])
        away = index[:, None] - index
        own = (away >= 0) & (away < (mixer.window or len(index)))

        def run(seen: Tensor | None) -> Attended:
            grouped = mixer.heads != mixer.kv_heads
            y = scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)
            return y.transpose(1, 2), None

        call = AttentionCall(path, q, k, v, own[None, None], q.shape[-1] ** -0.5, run)
        y, _ = function(call)
        return mixer.merge(y.transpose(1, 2))

    return forward
