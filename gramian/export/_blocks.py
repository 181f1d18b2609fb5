"""Define recurrences as modules that `torch.export` can trace, for a step or a whole chunk.

The recurrence defines the matrices by which a chunk is multiplied, and the layout of states for
these products (`gramian.systems.BlockForm`). A program must accept chunks of any length. So this
module cuts the chunk into blocks of c samples, and a scan passes the state from block to block. The
last block may have any number r < c of samples. Let x be the state before this block, A the state
matrix, and R the matrix that maps a block of inputs to its part of the next state. The state after
the last block is `A^r x`, plus R times a block with c - r zeros followed by the r samples.

The sequences of a chunk may have different lengths, and then begin with padding (`Padding`). Within
a recurrence, each sequence is moved to the front of its row. So it is cut into the same blocks as
without padding, and continues from its state. Its last block is the one in which its samples end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gramian.systems import Blocks, FIRWindowRecurrence, FIRWindowState, Recurrence, State

__all__ = [
    "BLOCK",
    "BlockedRecurrence",
    "LastBlock",
    "Padding",
    "TracedBlocks",
    "WindowedRecurrence",
    "carry",
    "split_blocks",
    "trace_recurrence",
]

BLOCK = 32
"""The number c of samples in a block.

This number is about the size of a state, so that products with the matrices T, O and R of
`gramian.systems.BlockForm` cost about the same.
"""


class Padding:
    """The number of columns before the first token of each row of a chunk.

    Args:
        real: (batch, length), boolean: false for padding, which comes before the tokens of a row.
    """

    def __init__(self, real: Tensor) -> None:
        self.counts = real.sum(1)
        """The number of tokens of each row, (batch), int64."""
        self._columns = torch.arange(real.shape[1], device=real.device)
        self._waits = (real.shape[1] - self.counts)[:, None]  # (batch, 1)

    def to_front(self, x: Tensor, time: int = -1) -> Tensor:
        """Move the tokens of x, (batch, …), to the front of their rows along a dimension."""
        return self._gathered(x, self._columns + self._waits, time)

    def to_back(self, x: Tensor, time: int = -1) -> Tensor:
        """Undo `to_front`."""
        return self._gathered(x, self._columns + self.counts[:, None], time)

    def _gathered(self, x: Tensor, source: Tensor, time: int) -> Tensor:
        batch, length = source.shape
        wrapped = torch.where(source < length, source, source - length)
        shape = [1] * x.ndim
        shape[0], shape[time] = batch, length
        return x.gather(time, wrapped.reshape(shape).expand_as(x))


def lengths_of(x: Tensor, padding: Padding | None) -> Tensor:
    """Return the number of samples of each row of x (batch, …, length), (batch), int64."""
    if padding is not None:
        return padding.counts
    return torch.full((x.shape[0],), x.shape[-1], dtype=torch.int64, device=x.device)


def split_blocks(x: Tensor, size: int = BLOCK, silent: float = 0.0) -> Tensor:
    """Cut a signal into blocks.

    There is always one block more than the length requires. So no length is a special case, and one
    traced graph works for all lengths.

    Args:
        x: the signal, (…, length).
        size: number of samples in a block.
        silent: value of the samples that are added after the end.

    Returns:
        The K blocks, (…, K, size).
    """
    length = x.shape[-1]
    count = length // size + 2
    padded = torch.nn.functional.pad(x, (0, count * size - length), value=silent)
    return padded.reshape(*x.shape[:-1], count, size)


class LastBlock:
    """The samples that follow the last whole block of each row.

    Args:
        counts: (batch), int64: the number of samples of each row, which come first in the row.
        size: number of samples in a block.
    """

    def __init__(self, counts: Tensor, size: int = BLOCK) -> None:
        self.whole = torch.div(counts, size, rounding_mode="floor")
        """The number of whole blocks of each row, (batch), int64."""
        self.rest = counts - self.whole * size
        """The number of samples after them, (batch), int64."""
        index = torch.arange(size, device=counts.device)
        self._columns = (counts[:, None] - size + index).clamp_min(0)  # (batch, size)
        self._new = index >= size - self.rest[:, None]

    def of(self, x: Tensor) -> Tensor:
        """Return the last samples of a signal (batch, …, length).

        The result is (batch, …, size). It ends with the `rest` samples, and begins with zeros.
        """
        shape = (x.shape[0], *(1,) * (x.ndim - 2), -1)
        columns = self._columns.reshape(shape).expand(*x.shape[:-1], -1)
        latest = x.gather(-1, columns)
        return torch.where(self._new.reshape(shape), latest, torch.zeros_like(latest))

    def state_before(self, starts: Tensor) -> Tensor:
        """Return the state before the last samples, (batch, …).

        Args:
            starts: the states before all blocks, (K, batch, …).
        """
        batch = starts.shape[1]
        rows = torch.arange(batch, device=starts.device)
        return starts.flatten(0, 1).index_select(0, self.whole * batch + rows)


def carry(
    advance: Callable[..., Tensor], inputs: Tensor, start: Tensor, *others: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `x_{k+1} = advance(x_k, *others_k) + inputs_k` from `start`.

    Args:
        advance: A function that is linear in its first argument.
        inputs: The tensors to add in each of the K steps, (K, …).
        start: x_0, (…).
        others: Further arguments of `advance`, each (K, …).

    Returns:
        x_0 … x_{K-1}, (K, …), and x_K, (…).
    """
    from torch._higher_order_ops.scan import scan

    def body(x: Tensor, given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        first, *rest = given
        return advance(x, *rest) + first, x.clone()

    end, starts = scan(body, start.clone(memory_format=torch.contiguous_format), (inputs, *others))
    return starts, end


class TracedBlocks(nn.Module):
    """A module that holds block matrices as its buffers.

    Tensors in the body of a scan must belong to the module that is traced.

    Args:
        blocks: The block matrices of a group of channels.
    """

    inside: Tensor
    observe: Tensor
    reach: Tensor

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self._like = blocks
        self._names = [field.name for field in dataclasses.fields(blocks)]
        for name in self._names:
            value: Tensor | None = getattr(blocks, name)
            held = None if value is None else value.contiguous()
            self.register_buffer(name, held, persistent=False)

    @property
    def blocks(self) -> Blocks:
        """The block matrices, whose tensors are the buffers."""
        return dataclasses.replace(self._like, **{n: getattr(self, n) for n in self._names})

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the state."""
        return self.inside.dtype

    def advance(self, x: Tensor) -> Tensor:
        """Return `A^c x` for x (batch, G, n, streams)."""
        return self.blocks.advance(x)

    def advance_by(self, x: Tensor, steps: Tensor) -> Tensor:
        """Return `A^steps x` for an integer tensor (batch) below c."""
        return self.blocks.advance_by(x, steps)

    def select(self, x: Tensor) -> Tensor:
        """Return the channels of this group from x (batch, channels, …)."""
        return self.blocks.select(x)

    def convolve(self, u: Tensor, x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Process a chunk that continues from a state.

        The products of all blocks are one batched matrix product for each channel.

        Args:
            u: The inputs of G channels, (batch, G, length).
            x: The state before the chunk, (batch, G, n, 1).
            counts: (batch), int64: the number of samples of each row. They come first in the row.

        Returns:
            The outputs, (batch, G, length), and the state after the chunk.
        """
        batch, groups, length = u.shape
        signal = u.to(self.dtype)
        samples = split_blocks(signal).transpose(0, 1)  # (G, batch, K, c)
        count = samples.shape[2]
        flat = samples.reshape(groups, batch * count, BLOCK)
        if self.blocks.is_static:
            y = torch.bmm(flat, self.inside.mT)
            return y.reshape(groups, batch, count * BLOCK)[..., :length].transpose(0, 1), x
        inputs = torch.bmm(flat, self.reach.mT).reshape(groups, batch, count, -1)
        starts, _ = carry(self.advance, inputs.permute(2, 1, 0, 3).unsqueeze(-1), x)
        before = starts.squeeze(-1).permute(2, 1, 0, 3)  # (G, batch, K, n)
        before = before.reshape(groups, batch * count, -1)
        y = torch.bmm(flat, self.inside.mT) + torch.bmm(before, self.observe.mT)
        y = y.reshape(groups, batch, count * BLOCK)[..., :length].transpose(0, 1)
        last = LastBlock(counts)
        end = self.advance_by(last.state_before(starts), last.rest)
        return y, end + self.reach @ last.of(signal).unsqueeze(-1)


class WindowedRecurrence(nn.Module):
    """A short FIR recurrence as functions without side effects, which convolve with its taps.

    Args:
        recurrence: The recurrence, with channels *C.
    """

    kernel: Tensor

    def __init__(self, recurrence: FIRWindowRecurrence) -> None:
        super().__init__()
        self.recurrence = recurrence
        self.form = recurrence.form
        taps = recurrence.kernel.reshape(-1, 1, recurrence.kernel.shape[-1]).flip(-1).contiguous()
        self.register_buffer("kernel", taps, persistent=False)

    def step(self, u_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Compute a step of the recurrence without writing into `state`."""
        assert isinstance(state, FIRWindowState)
        return self.recurrence.advance(u_t, state)

    def prefill(
        self, u: Tensor, state: State, padding: Padding | None = None
    ) -> tuple[Tensor, State]:
        """Process a chunk (batch, *C, length), which may begin with padding."""
        assert isinstance(state, FIRWindowState)
        if padding is not None:
            u = padding.to_front(u)
        joined = torch.cat([state.inputs, u.to(self.kernel.dtype)], dim=-1)
        groups = self.kernel.shape[0]
        flat = joined.reshape(u.shape[0], groups, joined.shape[-1])
        y = nn.functional.conv1d(flat, self.kernel, groups=groups).reshape(u.shape).to(u.dtype)
        known = torch.arange(state.inputs.shape[-1], device=u.device)
        latest = lengths_of(u, padding)[:, None] + known  # (batch, K - 1)
        latest = latest.reshape(u.shape[0], *(1,) * (u.ndim - 2), -1).expand(*u.shape[:-1], -1)
        after = FIRWindowState(joined.gather(-1, latest))
        return y if padding is None else padding.to_back(y), after


class BlockedRecurrence(nn.Module):
    """A frozen recurrence in the form of functions without side effects.

    Args:
        recurrence: The recurrence of any finite-dimensional time-invariant system.
        streams: Number of dimensions, after the channels, along which inputs share a filter. For
            the outer products of MultiHyena, whose system has channels (heads, 1, 1), it is 2.

    Raises:
        ValueError: if the recurrence has no block form.
    """

    def __init__(self, recurrence: Recurrence, streams: int = 0) -> None:
        super().__init__()
        self.recurrence = recurrence
        self.form = recurrence.form
        self._blocks = recurrence.block_form(BLOCK, streams)
        # There is one part for each group of channels, because the state has a tensor for each.
        self.parts: Any = nn.ModuleList(TracedBlocks(part) for part in self._blocks.parts)

    def step(self, u_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Compute a step of the recurrence without writing into `state`."""
        return self.recurrence.advance(u_t, state)

    def prefill(
        self, u: Tensor, state: State, padding: Padding | None = None
    ) -> tuple[Tensor, State]:
        """Process a chunk in blocks.

        Args:
            u: (batch, *C, length), with the channels *C of the system.
            state: The state before the chunk.
            padding: The padding before the samples of each row, which does not change the state.
                None if there is none.
        """
        channels = u.shape[1:-1]
        counts = lengths_of(u, padding)
        if padding is not None:
            u = padding.to_front(u)
        outputs, ends = [], []
        for part, x in zip(self.parts, self.pack(state), strict=True):
            chosen = part.select(u).reshape(u.shape[0], -1, u.shape[-1])
            y, end = part.convolve(chosen, x, counts)
            outputs.append(y.reshape(u.shape[0], -1, *channels[1:], u.shape[-1]))
            ends.append(end)
        y = self.restore_order(outputs).reshape(u.shape).to(u.dtype)
        return y if padding is None else padding.to_back(y), self.unpack(ends, state)

    def restore_order(self, outputs: list[Tensor]) -> Tensor:
        """Join the outputs of all parts, (batch, channels, …), in the order of the channels."""
        return self._blocks.restore_order(outputs)

    def pack(self, state: State) -> list[Tensor]:
        """Return the state as one tensor (batch, G, n, streams) for each part."""
        return self._blocks.pack(state)

    def unpack(self, packed: list[Tensor], like: State) -> State:
        """Return the state that `pack` maps to `packed`. `like` is any state of the recurrence."""
        return self._blocks.unpack(packed, like)


def trace_recurrence(
    recurrence: Recurrence, streams: int = 0
) -> BlockedRecurrence | WindowedRecurrence:
    """Return a recurrence as functions without side effects; see `BlockedRecurrence`.

    The window of an FIR recurrence is convolved with its taps, except in float64, for which
    onnxruntime has no convolution.
    """
    if not isinstance(recurrence, FIRWindowRecurrence):
        return BlockedRecurrence(recurrence, streams)
    if streams or recurrence.kernel.dtype == torch.float64:
        return BlockedRecurrence(recurrence, streams)
    return WindowedRecurrence(recurrence)
