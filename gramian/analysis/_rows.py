"""Read attention over long contexts without its maps: a few rows at a time.

An eager attention function returns the map (heads, L, L) beside the output. Given only some of the
queries, with their rows of the mask, it returns these rows of both. So the output is put together
from rows, and the rows of a map are computed again whenever they are needed.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from gramian.analysis._responses import TOLERANCE, Unreadable
from gramian.analysis._storage import Storage
from gramian.ess import RowOperator

__all__ = ["AttentionRows"]

_TILE = 2**27
"""The largest number of bytes of the rows of all heads that are computed together."""

_KEPT = 2**29
"""The largest number of bytes of the maps of heads that were computed beside others."""

_COMPARED = 96
"""Number of first positions at which the rows are compared with a call on these positions alone."""


class AttentionRows:
    """A call of an eager attention function, made a few queries at a time.

    Args:
        function: The function, as in `gramian.analysis._attention.read_attention`.
        args: Its arguments.
        kwargs: Its keyword arguments.

    Attributes:
        result: what the function returns, with None in place of the map.
        storage: how the layer stores its past.
        heads: the number of heads.

    Raises:
        Unreadable: if the function does not treat each query alone, is not causal, or if its output
            is not its map applied to its values.
    """

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.function = function
        self.bound = inspect.signature(function).bind(*args, **kwargs)
        names = list(self.bound.arguments)
        given = [self.bound.arguments[name] for name in names[1:4]]
        if len(given) < 3 or not all(isinstance(x, Tensor) and x.ndim == 4 for x in given):
            raise Unreadable(
                "its attention function has other arguments than those of transformers."
            )
        self.names = names[1:4]
        query, key, value = given
        self.length, self.heads = query.shape[2], query.shape[1]
        if key.shape[2] != self.length or len(query) != 1 or self.heads % key.shape[1]:
            raise Unreadable(f"it maps {key.shape[2]} positions to {self.length}.")
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.group = self.heads // key.shape[1]
        self.storage = Storage(value.shape[-1], key.shape[-1], self.group, value.element_size())
        parts = [self._rows(rows) for rows in self._tiles()]
        output = torch.cat([part[0] for part in parts], 1).to(query.dtype)
        self.result = (output, None)
        self._apart = self._compare(parts[0][0])

    def operator(self, channels: slice) -> RowOperator:
        """Return the maps of some heads by their rows.

        The function computes the rows of all heads of a group. Those of the other heads are kept
        until they are asked for, unless they are too large.
        """
        heads = range(self.heads)[channels]
        keeps = self._apart and 2 * self.length**2 * (self.group - 1) <= _KEPT
        kept: dict[tuple[int, int, int], Tensor] = {}
        lock = threading.Lock()

        def rows(channel: int, where: slice) -> Tensor:
            head = heads[channel]
            if not self._apart:
                return self._rows(where, checked=False)[1][head]
            with lock if keeps else nullcontext():
                found = kept.pop((head, where.start, where.stop), None)
                if found is not None:
                    return found
                group = head // self.group
                maps = self._rows(where, group, checked=False)[1]
                if keeps:
                    for k, other in enumerate(maps, start=group * self.group):
                        if k != head and k in heads:
                            kept[k, where.start, where.stop] = other
            return maps[head % self.group]

        query: Tensor = self.bound.arguments[self.names[0]]
        return RowOperator(rows, self.length, len(heads), query.device)

    def _tiles(self) -> list[slice]:
        size = max(1, _TILE // (4 * self.heads * self.length))
        return [slice(a, min(a + size, self.length)) for a in range(0, self.length, size)]

    def _rows(
        self, rows: slice, group: int | None = None, checked: bool = True, start: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return rows of the output (1, n, heads, N) and of the maps (heads, n, rows.stop)."""
        arguments = dict(self.bound.arguments)
        for name, value in arguments.items():
            if name in self.names:
                continue
            if isinstance(value, dict):
                arguments[name] = {k: self._cut(v, rows) for k, v in value.items()}
            else:
                arguments[name] = self._cut(value, rows)
        query, key, value = (arguments[name].to(self.dtype) for name in self.names)
        if group is not None:
            query = query[:, group * self.group : (group + 1) * self.group]
            key, value = key[:, group : group + 1], value[:, group : group + 1]
        given = query[:, :, rows], key[:, :, : rows.stop], value[:, :, : rows.stop]
        arguments |= zip(self.names, given, strict=True)
        bound = inspect.BoundArguments(self.bound.signature, arguments)
        result = self.function(*bound.args, **bound.kwargs)
        output, weights = result[0], result[1]
        if not isinstance(weights, Tensor) or weights.shape[2:] != (
            rows.stop - rows.start,
            rows.stop,
        ):
            raise Unreadable("its attention function returns no map.")
        if checked:
            self._check(rows, weights, given[2], output)
        return output, weights[0].detach()

    def _cut(self, value: Any, rows: slice) -> Any:
        """Return the rows and columns of an argument that has some for every position."""
        if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[-1] != self.length:
            return value
        if value.shape[-2] == self.length:
            value = value[..., rows, :]
        return value[..., : rows.stop]

    def _check(self, rows: slice, weights: Tensor, value: Tensor, output: Tensor) -> None:
        """Check that rows of maps are causal, and give the output."""
        if bool(weights[0, ..., rows.start :].triu(1).any()):
            raise Unreadable("it is not causal: it looks ahead.")
        value = value.repeat_interleave(self.group, dim=1)
        expected = (weights.to(value.dtype) @ value).transpose(1, 2)
        error = (expected - output.reshape(expected.shape)).norm()
        if not bool(error <= TOLERANCE * expected.norm()) and bool(weights.isfinite().all()):
            raise Unreadable("its output is not its map applied to its values.")

    def _compare(self, first: Tensor) -> bool:
        """Check rows against a call on the first positions. Return whether heads can be told apart.

        Heads can be told apart if the function, given one group of heads alone, returns the maps
        that it returns for this group among all.
        """
        count = min(_COMPARED, self.length, first.shape[1])
        whole, maps = self._rows(slice(0, count))
        middle = count // 2
        _, below = self._rows(slice(middle, count))
        for one, other in ((whole, first[:, :count]), (maps[:, middle:], below)):
            if not torch.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True):
                raise Unreadable("its attention function does not treat every query alone.")
        try:
            for group in {0, self.heads // self.group - 1}:
                alone = self._rows(slice(middle, count), group, checked=False)[1]
                own = below[group * self.group : (group + 1) * self.group]
                if not torch.allclose(alone, own, rtol=1e-3, atol=1e-5, equal_nan=True):
                    return False
        except (RuntimeError, IndexError, Unreadable):
            return False
        return True
