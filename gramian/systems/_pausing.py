r"""Chunks in which the streams of a batch have different numbers of samples.

Sequences of different lengths that share a chunk end together. So stream b starts with `steps[b]`
columns in which no time passes for it. If the past is silent, zeros in these columns have no
effect. If it is not, the state must stay unchanged until the stream's first sample.

A finite-dimensional state does not depend on the columns, so the streams can be processed in pieces
of equal length. If there are few different lengths, the streams of each length form one piece. If
there are more lengths than binary digits in them, every stream is cut into pieces whose lengths are
the powers of two in the binary representation of its length. This gives at most ⌊log₂ T⌋ + 1 pieces
for a chunk of T columns. The state of an FIR system consists of its last inputs. Its streams are
not cut: these inputs are moved next to the stream's first sample instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gramian.ops.devices import from_host
from gramian.systems._state import State
from gramian.systems.fir import FIRState, FIRWindowState

__all__ = ["Pause", "PausedOperator", "apply_paused"]

Operator = Callable[[Tensor, State], tuple[Tensor, State]]


class _Piece(NamedTuple):
    streams: list[int]
    begins: list[int]
    """The first column of the piece in each of these streams."""
    length: int


class Pause:
    """The number of columns at the start of a chunk in which each stream pauses.

    Args:
        steps: For every stream of the batch, the number of paused columns, from 0 to `length`.
        length: The number of columns of the chunk.
    """

    def __init__(self, steps: Sequence[int], length: int) -> None:
        self.steps = tuple(steps)
        self.length = length
        self._pieces: list[_Piece] | None = None

    def within(self, begin: int, end: int) -> Pause:
        """Return the pause of a chunk that consists of the columns `begin` … `end - 1` only."""
        length = min(end, self.length) - begin
        return Pause([min(max(step - begin, 0), length) for step in self.steps], length)

    @property
    def pieces(self) -> list[_Piece]:
        """Return the pieces in order of time. In each piece, all streams have the same length."""
        if self._pieces is None:
            counts = [self.length - step for step in self.steps]
            lengths = sorted({count for count in counts if count})
            bits = [bit for bit in range(self.length.bit_length(), -1, -1) if _any(counts, bit)]
            self._pieces = []
            if len(lengths) <= len(bits):
                for length in lengths:
                    streams = [b for b, count in enumerate(counts) if count == length]
                    begins = [self.length - length] * len(streams)
                    self._pieces.append(_Piece(streams, begins, length))
            else:
                for bit in bits:
                    streams = [b for b, count in enumerate(counts) if count >> bit & 1]
                    begins = [self.steps[b] + (counts[b] >> bit + 1 << bit + 1) for b in streams]
                    self._pieces.append(_Piece(streams, begins, 1 << bit))
        return self._pieces


def _any(counts: list[int], bit: int) -> bool:
    return any(count >> bit & 1 for count in counts)


def apply_paused(operator: Operator, u: Tensor, state: State, pause: Pause) -> tuple[Tensor, State]:
    """Compute `operator(u, state)`, but hold the state of a stream while it pauses.

    Args:
        operator: A system that is called with a state, or the `prefill` of its recurrence.
        u: (batch, *C', T): the chunk. Values in paused columns are ignored.
        state: A state of the operator, batch first.
        pause: The pause, for T columns.

    Returns:
        y, which has the shape of `u` and is zero in paused columns, and the state after the chunk.
    """
    if not any(pause.steps):
        return operator(u, state)
    if isinstance(state, FIRState | FIRWindowState):
        return _apply_to_moved_past(operator, u, state, pause)
    u = u.movedim(-1, 1)  # (batch, T, *C')
    y = torch.zeros_like(u)
    for streams, begins, length in pause.pieces:
        rows = from_host(streams, u.device)
        columns = from_host(begins, u.device)[:, None]
        place = rows[:, None], columns + torch.arange(length, device=u.device)
        made, after = operator(u[place].movedim(1, -1), state.select(rows))
        y = y.index_put(place, made.movedim(-1, 1).to(y.dtype))
        state = state.put(rows, after)
    return y.movedim(1, -1), state


def _apply_to_moved_past(
    operator: Operator, u: Tensor, state: FIRState | FIRWindowState, pause: Pause
) -> tuple[Tensor, State]:
    y, after = operator(*state.moved(u, pause.steps))
    steps = from_host(pause.steps, u.device).reshape(-1, *(1,) * (u.ndim - 1))
    waits = torch.arange(u.shape[-1], device=u.device) < steps
    return y.to(u.dtype).masked_fill(waits, 0), after


class PausedOperator:
    """An operator that pauses as `apply_paused` does, for a chunk that is given whole or in parts.

    Each call takes the next columns of the chunk, in order of time.

    Args:
        operator: A system that is called with a state, or the `prefill` of its recurrence.
        pause: The pause of the whole chunk.
    """

    def __init__(self, operator: Operator, pause: Pause) -> None:
        self.operator = operator
        self.pause = pause
        self._taken = 0

    def __call__(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        begin, self._taken = self._taken, self._taken + u.shape[-1]
        return apply_paused(self.operator, u, state, self.pause.within(begin, self._taken))
