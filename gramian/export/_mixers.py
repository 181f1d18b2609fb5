"""Define mixers as functions without side effects, of an input and the tensors of a state.

The input is one token or a chunk of any length. The exported programs run the mixers' own code for
projections, gates and short convolutions. The functions here replace what a traced graph cannot
contain: loops over time, Fourier transforms, and a growing cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gramian.export._blocks import (
    BLOCK,
    LastBlock,
    Padding,
    carry,
    split_blocks,
    trace_recurrence,
)
from gramian.mixers import (
    Block,
    ConvolutionMixer,
    LinearRecurrence,
    LinearRecurrenceState,
    Mixer,
    MultiHyena,
    MultiHyenaState,
    SoftmaxAttention,
    SoftmaxAttentionState,
)
from gramian.mixers.linear_recurrence import Coefficients
from gramian.mixers.mixer import apply_mask
from gramian.ops.scan import Diagonal, DiagonalPlusLowRank, join
from gramian.systems import State

__all__ = ["MixerProgram", "fill", "make_program", "named_tensors", "register_program"]

_DISTIL = (
    "exact online convolution keeps its past in a buffer that is written into at a counted place; "
    "distil the model first (gramian distill MODEL OUT, or gramian.distill), or reduce the filter "
    "(gramian.reduce)."
)


def named_tensors(state: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and the tensors of a state. Tensors without a batch are left out.

    Args:
        state: The state, or one of its fields.
        prefix: Name of the state. The name of a tensor is this name, followed by the names of
            fields and the indices of tuples.
    """
    if isinstance(state, Tensor):
        if state.ndim:  # a number for the whole batch is not part of the exported state
            yield prefix, state
        return
    names = getattr(state, "_fields", range(len(state)))
    for name, value in zip(names, state, strict=True):
        yield from named_tensors(value, f"{prefix}.{name}")


def fill(template: Any, tensors: Iterator[Tensor]) -> Any:
    """Return a state like `template` with the given tensors, in the order of `named_tensors`."""
    if isinstance(template, Tensor):
        return next(tensors) if template.ndim else torch.zeros_like(template)
    values = [fill(value, tensors) for value in template]
    return type(template)(*values) if isinstance(template, State) else tuple(values)


class MixerProgram:
    """The recurrence of a mixer in a form that can be traced.

    This class suits mixers whose `mix_token` and `mix_chunk` can themselves be traced, for any
    length and any mask. Any other mixer needs a subclass, which `register_program` registers.

    Args:
        mixer: The mixer to export. Its filters are evaluated when the program is made.
        name: Name of the mixer in error messages.
        context: Number of tokens for which attention without a window has room.

    Attributes:
        template: The zero state of one sequence.
        constants: Modules, besides the mixer, whose buffers the program reads.
        context: Number of tokens for which the program has room; None if there is no limit.

    Raises:
        ValueError: if the mixer or its filter cannot be exported.
    """

    constants: tuple[nn.Module, ...] = ()
    context: int | None = None

    def __init__(self, mixer: Any, name: str, context: int | None = None) -> None:
        self.mixer = mixer
        self.template: State = mixer.recurrence().initial_state(1)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Mix one token (batch, width) without writing into `state`."""
        return self.mixer.mix_token(x_t, state.clone())

    def prefill(self, x: Tensor, state: State, mask: Tensor) -> tuple[Tensor, State]:
        """Mix a chunk of any length that continues from `state`.

        Args:
            x: The chunk, (batch, length, width), zero where the mask is false.
            state: The state before the chunk.
            mask: (batch, length), boolean: false for padding, which comes before the tokens of a
                row and leaves the state unchanged.
        """
        return self.mixer.mix_chunk(x, state, mask)


_PROGRAMS: dict[type[Any], type[MixerProgram]] = {}
_ProgramType = TypeVar("_ProgramType", bound="type[MixerProgram]")


def register_program(*kinds: type[Any]) -> Callable[[_ProgramType], _ProgramType]:
    """Return a class decorator that registers a program for mixers of some classes.

    The program is also used for subclasses of these classes. If the methods of a mixer can
    themselves be traced, `MixerProgram` is its program, and
    `gramian.export.register_program(MyMixer)(gramian.export.MixerProgram)` registers it.

    Args:
        kinds: The classes of mixers.
    """

    def add(program: _ProgramType) -> _ProgramType:
        _PROGRAMS.update(dict.fromkeys(kinds, program))
        return program

    return add


def make_program(mixer: Mixer, name: str, context: int | None = None) -> MixerProgram:
    """Make the program of a mixer.

    If no program is registered for the class of the mixer, the program of its nearest base class is
    used.

    Raises:
        ValueError: if the mixer is not causal, or if neither its class nor a base class has a
            program.
    """
    if not mixer.causal:
        raise ValueError(
            f"{name} is bidirectional: it looks at the whole sequence, so it has no recurrence "
            "to export."
        )
    for kind in type(mixer).__mro__:
        if kind in _PROGRAMS:
            return _PROGRAMS[kind](mixer, name, context)
    raise ValueError(
        f"{name} cannot be exported: nothing says how a {type(mixer).__name__} is traced; register "
        "a MixerProgram for its class with gramian.export.register_program."
    )


@register_program(Block)
class _BlockProgram(MixerProgram):
    """The program of a block, which calls the program of the mixer inside."""

    def __init__(self, mixer: Block, name: str, context: int | None = None) -> None:
        self.block = mixer
        self.inner = make_program(mixer.mixer, name, context)
        self.template = self.inner.template
        self.constants = self.inner.constants
        self.context = self.inner.context

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        return self.block.carry(x_t, state, self.inner.step)

    def prefill(self, x: Tensor, state: State, mask: Tensor) -> tuple[Tensor, State]:
        def move(z: Tensor, before: State) -> tuple[Tensor, State]:
            return self.inner.prefill(apply_mask(z, mask), before, mask)

        return self.block.carry(x, state, move)


@register_program(ConvolutionMixer)
class _ConvolutionProgram(MixerProgram):
    """The program of mixers with long convolutions. It processes chunks in blocks of samples."""

    mixer: ConvolutionMixer

    def __init__(self, mixer: ConvolutionMixer, name: str, context: int | None = None) -> None:
        super().__init__(mixer, name, context)
        recurrence = mixer.recurrence()
        if "online" in recurrence.forms:
            raise ValueError(f"{name} cannot be exported: {_DISTIL}")
        streams = len(mixer.streams) - 1
        self.long: tuple[Any, ...] = tuple(
            trace_recurrence(long, streams) for long in recurrence.long
        )
        self.constants = self.long

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        long: Any = self.long  # these modules have the interface of recurrences
        return self.mixer.convolve_token(x_t, state, long)

    def prefill(self, x: Tensor, state: State, mask: Tensor) -> tuple[Tensor, State]:
        padding = Padding(mask)
        operators = tuple(partial(long.prefill, padding=padding) for long in self.long)
        return self.mixer.convolve_chunk(x, state, mask, operators)


@register_program(MultiHyena)
class _MultiHyenaProgram(_ConvolutionProgram):
    """The program of MultiHyena. A block's output is `(Q Kᵀ ∘ T) V`, plus the state's output."""

    mixer: MultiHyena

    def prefill(self, x: Tensor, state: State, mask: Tensor) -> tuple[Tensor, State]:
        assert isinstance(state, MultiHyenaState)
        (long,) = self.long
        padding = Padding(mask)
        *projected, past = self.mixer.project(x, mask, state.short)
        q, k, v = (padding.to_front(z, 2) for z in projected)  # (batch, heads, length, N)
        outputs, ends = [], []
        for part, carried in zip(long.parts, long.pack(state.long), strict=True):
            queries, keys, values = (part.select(z) for z in (q, k, v))
            y, end = _outer_products(part, queries, keys, values, carried, padding.counts)
            outputs.append(y)
            ends.append(end)
        y = self.mixer.merge(padding.to_back(long.restore_order(outputs), 2))
        return y, MultiHyenaState(past, long.unpack(ends, state.long))


def _outer_products(
    part: Any, q: Tensor, k: Tensor, v: Tensor, state: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Process a chunk of the heads whose filters are in one part.

    Args:
        part: The block matrices of the heads, a `TracedBlocks`.
        q, k, v: (batch, heads, length, N).
        state: The state before the chunk, (batch, heads, n, N²).
        counts: (batch), int64: the number of tokens of each row. They come first in the row.

    Returns:
        The outputs, (batch, heads, length, N), and the state after the chunk.
    """
    from torch._higher_order_ops.scan import scan

    width, length = q.shape[-1], q.shape[2]
    if part.blocks.is_static:
        direct = part.inside[:, :1, :1].to(q.dtype)  # (heads, 1, 1)
        return (q * k).sum(-1, keepdim=True) * direct * v, state

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
    last = LastBlock(counts)
    end = part.advance_by(last.state_before(starts), last.rest)
    return y, end + part.reach @ outer(last.of(k.mT).mT, last.of(v.mT).mT)


@register_program(LinearRecurrence)
class _LinearRecurrenceProgram(MixerProgram):
    """The program of linear recurrences. It processes chunks in blocks of steps.

    Padding and the end of the last block are steps that leave the memory unchanged.
    """

    mixer: LinearRecurrence

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        return self.mixer.mix_token(x_t, state)  # this does not write into the state

    def prefill(self, x: Tensor, state: State, mask: Tensor) -> tuple[Tensor, State]:
        assert isinstance(state, LinearRecurrenceState)
        mixer = self.mixer
        steps, values, rest, past = mixer.features(x, state.short, mask)
        coefficients = steps.coefficients()
        size = 1 << (max(4, min(64, mixer.state_size, mixer.value_width)) - 1).bit_length()
        y, memory = _by_blocks(coefficients, values, state.memory.to(values.dtype), size)
        return mixer.finish(y, rest), LinearRecurrenceState(past, memory)


def _by_blocks(
    coefficients: Coefficients, values: Tensor, memory: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Run the steps of a linear recurrence in blocks.

    Args:
        coefficients: The coefficients of all steps.
        values: (batch, heads, length, N).
        memory: The memory before the first step, (batch, heads, n, N).
        size: Number of steps in a block.

    Returns:
        The outputs, (batch, heads, length, N), and the memory after the last step.
    """
    batch, heads, length, width = values.shape

    def blocks(z: Tensor, silent: float = 0.0) -> Tensor:
        """Cut (batch, heads, length, f) into (batch heads K, size, f)."""
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
        """Rearrange (batch heads K, 1, …) to (K, batch heads, 1, …)."""
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


@register_program(SoftmaxAttention)
class _AttentionProgram(MixerProgram):
    """The program of attention. Its state has room for a fixed number of keys and values."""

    mixer: SoftmaxAttention

    def __init__(self, mixer: SoftmaxAttention, name: str, context: int | None = None) -> None:
        self.mixer = mixer
        if mixer.window is None:
            if context is None or context < 1:
                raise ValueError(
                    f"{name} is attention without a window, whose keys and values need a "
                    f"fixed room: give context=, the tokens of prompt and text together; got "
                    f"{context}."
                )
            self.context = context
        like = mixer.in_proj.weight
        room = mixer.window or context or 0
        keys = like.detach().new_zeros(1, mixer.kv_heads, room, mixer.head_width)
        counts = torch.zeros(1, dtype=torch.int64, device=like.device)
        nothing = torch.zeros((), dtype=torch.int64)
        self.template = SoftmaxAttentionState(keys, keys.clone(), counts, nothing)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        assert isinstance(state, SoftmaxAttentionState)
        y, after = super().step(x_t, state)
        return self._inside_room(y[:, None], state.real[:, None])[:, 0], after

    def prefill(self, x: Tensor, state: State, mask: Tensor) -> tuple[Tensor, State]:
        assert isinstance(state, SoftmaxAttentionState)
        mixer, length = self.mixer, x.shape[1]
        index = torch.arange(length, device=x.device)
        real = mask.to(torch.int64)
        positions = state.real[:, None] + real.cumsum(1) - real
        q, k, v = mixer.project(x, positions)
        ahead = index[:, None] - index  # number of positions from key s to query t
        seen = ahead >= 0
        if mixer.window is not None:
            seen = seen & (ahead < mixer.window)
        seen = (seen & mask[:, None]) | (ahead == 0)  # padding sees itself, and so stays finite
        remembered = mixer.remembered(state, positions[:, :, None])  # (batch, length, room)
        visible = torch.cat([remembered, seen], dim=2)  # (batch, length, room + length)
        keys = torch.cat([state.keys.to(k.dtype), k], dim=2).unsqueeze(2)
        values = torch.cat([state.values.to(v.dtype), v], dim=2).unsqueeze(2)
        q = q.unflatten(1, (mixer.kv_heads, -1))  # (batch, kv_heads, group, length, N)
        scores = q @ keys.mT / math.sqrt(mixer.head_width)
        weights = scores.masked_fill(~visible[:, None, None], -math.inf).softmax(-1)
        y = mixer.merge((weights @ values).flatten(1, 2))
        return self._inside_room(y, positions), mixer.remember(state, k, v, mask)

    def _inside_room(self, y: Tensor, positions: Tensor) -> Tensor:
        """Return outputs, with NaN at tokens for which attention has no room.

        A program cannot raise an error, so the outputs must show that there is no room.

        Args:
            y: The outputs, (batch, length, width).
            positions: The number of tokens before each of these tokens, (batch, length).
        """
        if self.context is None:
            return y
        nothing = torch.full((), math.nan, dtype=y.dtype, device=y.device)
        return torch.where((positions < self.context)[..., None], y, nothing)
