"""Mixers as pure functions of tensors: one token or a chunk of any length, and the state's tensors.

Projections, gates and short convolutions are the mixers' own code. What differs from their chunked
form is what a traced graph cannot do: loops over time, Fourier transforms, a cache that grows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gramian.export._blocks import BLOCK, BlockedRecurrence, carry, last_block, split_blocks
from gramian.mixers import (
    Block,
    LinearRecurrence,
    LongConvolution,
    Mixer,
    MultiHyena,
    SoftmaxAttention,
)
from gramian.mixers._linear_recurrence import Coefficients, LinearRecurrenceState
from gramian.mixers.multi_hyena import MultiHyenaState
from gramian.mixers.softmax_attention import SoftmaxAttentionState
from gramian.ops.scan import Diagonal, DiagonalPlusLowRank, join
from gramian.systems import State

__all__ = ["ExportableMixer", "fill", "named_tensors"]

_DISTIL = (
    "exact online convolution keeps its past in a buffer that is written into at a counted place; "
    "distil the model first (gramian distill MODEL OUT, or gramian.distill), or reduce the filter "
    "(gramian.reduce)."
)


def named_tensors(state: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a state's batched tensors, by field and index."""
    if isinstance(state, Tensor):
        if state.ndim:  # a count of the whole batch is no part of what is carried
            yield prefix, state
        return
    names = getattr(state, "_fields", range(len(state)))
    for name, value in zip(names, state, strict=True):
        yield from named_tensors(value, f"{prefix}.{name}")


def fill(template: Any, tensors: Iterator[Tensor]) -> Any:
    """A state like ``template`` around others' tensors, in the order of `named_tensors`."""
    if isinstance(template, Tensor):
        return next(tensors) if template.ndim else torch.zeros_like(template)
    values = [fill(value, tensors) for value in template]
    return type(template)(*values) if isinstance(template, State) else tuple(values)


class ExportableMixer:
    """A mixer's recurrence made ready to be traced.

    Args:
        mixer: What to export; its filters are evaluated here.
        name: What messages call it.
        context: Tokens that attention without a window has room for.

    Raises:
        ValueError: for a mixer or a filter that cannot be exported.
    """

    def __init__(self, mixer: Mixer, name: str, context: int | None = None) -> None:
        self.mixer = mixer
        inner = mixer
        while isinstance(inner, Block):
            inner = inner.mixer
        self.inner = inner
        if isinstance(inner, LongConvolution) and inner.bidirectional:
            raise ValueError(
                f"{name} is bidirectional: it looks at the whole sequence, so it has no recurrence "
                "to export."
            )
        recurrence = mixer.recurrence()
        if "online" in recurrence.forms:
            raise ValueError(f"{name} cannot be exported: {_DISTIL}")
        self.context: int | None = None
        if isinstance(inner, SoftmaxAttention):
            if inner.window is None:
                if context is None or context < 1:
                    raise ValueError(
                        f"{name} is attention without a window, whose keys and values need a "
                        f"fixed room: give context=, the tokens of prompt and text together; got "
                        f"{context}."
                    )
                self.context = context
            self.template: State = _attention_state(inner, inner.window or context or 0)
        else:
            self.template = recurrence.initial_state(1)
        streams = 2 if isinstance(inner, MultiHyena) else 0
        self.long: tuple[Any, ...] = tuple(
            BlockedRecurrence(long, streams) for long in recurrence.long
        )

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """One token (batch, width); nothing is written into ``state``."""
        if isinstance(self.inner, SoftmaxAttention):
            state = state.clone()
        y, after = self.mixer._step(x_t, state, self.long)
        return self._inside_room(y[:, None], state)[:, 0], after

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """A chunk (batch, length, width) of any length."""
        y, after = self._chunk(self.mixer, x, state)
        return self._inside_room(y, state), after

    def _inside_room(self, y: Tensor, state: State) -> Tensor:
        """Outputs (batch, length, width) after ``state``; NaN for tokens that attention has no room
        for, as a program cannot raise."""
        if self.context is None:
            return y
        assert isinstance(state, SoftmaxAttentionState)
        positions = state.real[:, None] + torch.arange(y.shape[1], device=y.device)
        nothing = torch.full((), math.nan, dtype=y.dtype, device=y.device)
        return torch.where((positions < self.context)[..., None], y, nothing)

    def _chunk(self, mixer: Mixer, x: Tensor, state: State) -> tuple[Tensor, State]:
        if isinstance(mixer, Block):
            return mixer.carry(x, state, partial(self._chunk, mixer.mixer))
        if isinstance(mixer, MultiHyena):
            return _multi_hyena(mixer, self.long[0], x, state)
        if isinstance(mixer, LinearRecurrence):
            return _linear_recurrence(mixer, x, state)
        if isinstance(mixer, SoftmaxAttention):
            return _attention(mixer, x, state)
        return mixer._chunk(x, state, None, tuple(long.prefill for long in self.long))


def _multi_hyena(
    mixer: MultiHyena, long: BlockedRecurrence, x: Tensor, state: State
) -> tuple[Tensor, State]:
    """Block by block: ``(Q Kᵀ ∘ T) V`` inside, and what the state holds of the past."""
    assert isinstance(state, MultiHyenaState)
    q, k, v, past = mixer._project(x, None, state.short)  # (batch, heads, length, N)
    outputs, ends = [], []
    for part, carried in zip(long.parts, long.pack(state.long), strict=True):
        queries, keys, values = (part.select(z) for z in (q, k, v))
        y, end = _outer_products(part, queries, keys, values, carried)
        outputs.append(y)
        ends.append(end)
    y = mixer._merge(long.restore_order(outputs))
    return y, MultiHyenaState(past, long.unpack(ends, state.long))


def _outer_products(
    part: Any, q: Tensor, k: Tensor, v: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """(batch, heads, length, N) and the state (batch, heads, n, N²) after it."""
    from torch._higher_order_ops.scan import scan

    width, length = q.shape[-1], q.shape[2]

    def outer(keys: Tensor, values: Tensor) -> Tensor:
        products = keys.unsqueeze(-1) * values.unsqueeze(-2)
        return products.flatten(-2).to(part.dtype)  # (batch, heads, c, N²)

    def body(carried: Tensor, block: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        queries, keys, values = block
        free = (part.observe @ carried).to(queries.dtype).unflatten(-1, (width, width))
        y = (queries.unsqueeze(-2) @ free).squeeze(-2)
        scores = (queries @ keys.mT) * part.inside.to(queries.dtype)
        after = part.advance(carried) + part.reach @ outer(keys, values)
        return after, (y + scores @ values, carried.clone())

    blocks = tuple(
        split_blocks(z.mT).permute(3, 0, 1, 4, 2).contiguous()
        for z in (q, k, v)  # (K, batch, heads, c, N)
    )
    _, (y, starts) = scan(body, state.clone(memory_format=torch.contiguous_format), blocks)
    count = y.shape[0]
    y = y.permute(1, 2, 0, 3, 4).reshape(*q.shape[:2], count * BLOCK, width)[:, :, :length]
    (keys, rest), (values, _) = last_block(k.mT), last_block(v.mT)
    end = part.advance_by(starts[count - 2], rest) + part.reach @ outer(keys.mT, values.mT)
    return y, end


def _linear_recurrence(mixer: LinearRecurrence, x: Tensor, state: State) -> tuple[Tensor, State]:
    """By blocks of steps, the last completed by steps that leave the memory as it is."""
    assert isinstance(state, LinearRecurrenceState)
    steps, values, rest, past = mixer._features(x, state.short, None)
    coefficients = steps.coefficients()
    size = 1 << (max(4, min(64, mixer.state_size, mixer.value_width)) - 1).bit_length()
    y, memory = _by_blocks(coefficients, values, state.memory.to(values.dtype), size)
    return mixer._finish(y, rest), LinearRecurrenceState(past, memory)


def _by_blocks(
    coefficients: Coefficients, values: Tensor, memory: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Outputs of values (batch, heads, length, N) and the memory (batch, heads, n, N) after."""
    batch, heads, length, width = values.shape

    def blocks(z: Tensor, silent: float = 0.0) -> Tensor:
        """(batch, heads, length, f) to (batch heads K, size, f)."""
        split = split_blocks(z.mT, size, silent)  # (batch, heads, f, K, size)
        return split.permute(0, 1, 3, 4, 2).reshape(-1, size, z.shape[-1])

    a, B, C = blocks(coefficients.A, 1.0), blocks(coefficients.B), blocks(coefficients.C)
    D = blocks(coefficients.D.unsqueeze(-1)).squeeze(-1)
    transition: Any = Diagonal(a)
    if coefficients.p is not None and coefficients.q is not None:
        p, q = blocks(coefficients.p), blocks(coefficients.q)
        transition = DiagonalPlusLowRank(a, p.unsqueeze(-1), q.unsqueeze(-1))
    joined = join(transition, B, C, D, size)
    samples = blocks(values)
    count = length // size + 2

    def by_time(z: Tensor) -> Tensor:
        """(batch heads K, 1, …) to (K, batch heads, 1, …)."""
        return z.reshape(batch * heads, count, *z.shape[1:]).transpose(0, 1).contiguous()

    factors: list[Tensor] = []
    kind: Any = type(joined.transition)

    def collect(z: Tensor) -> Tensor:
        factors.append(by_time(z))
        return z

    joined.transition.map(collect)

    def advance(m: Tensor, *given: Tensor) -> Tensor:
        return kind(*given).left(m)

    inputs = joined.reach @ samples.unsqueeze(1)  # (batch heads K, 1, n, N)
    start = memory.reshape(batch * heads, 1, *memory.shape[2:])
    starts, end = carry(advance, by_time(inputs), start, *factors)
    before = starts.transpose(0, 1).reshape(-1, 1, *memory.shape[2:])
    y = joined.inside @ samples.unsqueeze(1) + joined.observe @ before
    y = y.reshape(batch, heads, count * size, width)[:, :, :length]
    return y, end.reshape(memory.shape)


def _attention_state(mixer: SoftmaxAttention, room: int) -> SoftmaxAttentionState:
    """Empty keys and values with a fixed room, for one sequence."""
    like = mixer.in_proj.weight
    keys = like.detach().new_zeros(1, mixer.kv_heads, room, mixer.head_width)
    counts = torch.zeros(1, dtype=torch.int64, device=like.device)
    return SoftmaxAttentionState(keys, keys.clone(), counts, torch.zeros((), dtype=torch.int64))


def _attention(mixer: SoftmaxAttention, x: Tensor, state: State) -> tuple[Tensor, State]:
    """Every query on the fixed room and on the chunk up to its own place."""
    assert isinstance(state, SoftmaxAttentionState)
    length = x.shape[1]
    index = torch.arange(length, device=x.device)
    positions = state.real[:, None] + index
    q, k, v = mixer._project(x, positions)
    ahead = index[:, None] - index  # how far back key s is for query t
    seen = ahead >= 0
    if mixer.window is not None:
        seen = seen & (ahead < mixer.window)
    remembered = mixer._remembered(state, positions[:, :, None])  # (batch, length, room)
    visible = torch.cat([remembered, seen.expand(x.shape[0], -1, -1)], dim=2)
    keys = torch.cat([state.keys.to(k.dtype), k], dim=2).unsqueeze(2)
    values = torch.cat([state.values.to(v.dtype), v], dim=2).unsqueeze(2)
    q = q.unflatten(1, (mixer.kv_heads, -1))  # (batch, kv_heads, group, length, N)
    scores = q @ keys.mT / math.sqrt(mixer.head_width)
    weights = scores.masked_fill(~visible[:, None, None], -math.inf).softmax(-1)
    y = mixer._merge((weights @ values).flatten(1, 2))
    return y, mixer._remember(state, k, v, None)
