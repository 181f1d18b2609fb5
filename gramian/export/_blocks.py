r"""Time-invariant recurrences as pure functions of real tensors, one step or any chunk at a time.

A chunk is taken by blocks of c samples. With the realisation ``x ← A x + B u``, ``y = C x + D u``,

    y_block = T u_block + O x,  O = [C; CA; …; CA^(c-1)],  T = Toeplitz(D, CB, CAB, …),
    x ← A^c x + R u_block,      R = [A^(c-1)B, …, AB, B],

so outputs and inputs to the state are matrix products over all blocks at once, and only ``A^c x``
goes from block to block, by a scan. The last block may have any number r < c of samples: the state
after it is ``A^r x`` plus R on those samples, moved to the block's end. Everything is computed in
double precision here and rounded to the dtype of the state; nothing depends on the chunk's length,
which programs leave open.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gramian.ops.vandermonde import integer_power
from gramian.systems import (
    CompanionRecurrence,
    CompanionState,
    DPLRRecurrence,
    DPLRState,
    LatticeRecurrence,
    ModalRecurrence,
    ModalState,
    Recurrence,
    State,
    StateSpace,
    StateSpaceRecurrence,
)

__all__ = ["BLOCK", "BlockedRecurrence", "Blocks", "carry", "last_block", "split_blocks"]

BLOCK = 32
"""Samples in a block: about as many as a state has numbers, so that T costs what O and R do."""


def split_blocks(x: Tensor, size: int = BLOCK, silent: float = 0.0) -> Tensor:
    """(…, length) as (…, K, size), ``silent`` after the end: always one block more than is needed,
    so that no number of blocks or of fillings is special, and a traced graph is good for all."""
    length = x.shape[-1]
    count = length // size + 2
    padded = torch.nn.functional.pad(x, (0, count * size - length), value=silent)
    return padded.reshape(*x.shape[:-1], count, size)


def last_block(x: Tensor, size: int = BLOCK) -> tuple[Tensor, Tensor]:
    """The ``length % size`` samples (…, length) after the last whole block, at the end of (…, size)
    with zeros before them, and their number."""
    length = x.shape[-1]
    rest = length - length // size * size
    latest = torch.nn.functional.pad(x, (size, 0))[..., length:]
    index = torch.arange(size, device=x.device)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return torch.where(index >= size - rest, latest, zero), torch.full(
        (), rest, dtype=torch.int64, device=x.device
    )


def carry(
    advance: Callable[..., Tensor], inputs: Tensor, start: Tensor, *others: Tensor
) -> tuple[Tensor, Tensor]:
    """``x_{k+1} = advance(x_k, *others_k) + inputs_k`` from ``start``.

    Args:
        advance: Linear in its first argument.
        inputs: (K, …).
        start: (…).
        others: (K, …) each.

    Returns:
        x_0 … x_{K-1}, (K, …), and x_K.
    """
    from torch._higher_order_ops.scan import scan

    def body(x: Tensor, given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        first, *rest = given
        return advance(x, *rest) + first, x.clone()

    end, starts = scan(body, start.clone(memory_format=torch.contiguous_format), (inputs, *others))
    return starts, end


class Blocks(nn.Module, abc.ABC):
    """The block matrices of G channels, and the layout of their states as (batch, G, n, streams).

    Args:
        channels: Which channels along their first dimension they are; None for all.
        taps: (G, c), float64.
        observe: (G, c, n), float64: O.
        reach: (G, n, c), float64: R.
        dtype: Of the state.
    """

    def __init__(
        self,
        channels: Tensor | None,
        taps: Tensor,
        observe: Tensor,
        reach: Tensor,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        size = taps.shape[-1]
        shifted = torch.nn.functional.pad(taps, (size - 1, 0)).unfold(-1, size, 1).flip(-1)
        self.dtype = dtype
        self._hold("channels", channels)
        self._hold("inside", shifted.to(dtype))  # (G, c, c)
        self._hold("observe", observe.to(dtype))
        self._hold("reach", reach.to(dtype))

    channels: Tensor | None
    inside: Tensor
    observe: Tensor
    reach: Tensor

    def _hold(self, name: str, value: Tensor | None) -> None:
        """As a buffer: what a scan's body uses must belong to the module that is traced."""
        if value is not None:
            value = value.contiguous()
        self.register_buffer(name, value, persistent=False)

    @abc.abstractmethod
    def advance(self, x: Tensor) -> Tensor:
        """``A^c x`` for x (batch, G, n, streams)."""

    @abc.abstractmethod
    def advance_by(self, x: Tensor, steps: Tensor) -> Tensor:
        """``A^steps x`` for an integer tensor () below c."""

    def select(self, x: Tensor) -> Tensor:
        """The part's channels of x (batch, channels, …)."""
        return x if self.channels is None else x.index_select(1, self.channels)

    def convolve(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (batch, G, length) of u from the state x (batch, G, n, 1), and the state after.

        All blocks are one batched product, channel by channel.
        """
        batch, groups, length = u.shape
        signal = u.to(self.dtype)
        samples = split_blocks(signal).transpose(0, 1)  # (G, batch, K, c)
        count = samples.shape[2]
        flat = samples.reshape(groups, batch * count, BLOCK)
        inputs = torch.bmm(flat, self.reach.mT).reshape(groups, batch, count, -1)
        starts, _ = carry(self.advance, inputs.permute(2, 1, 0, 3).unsqueeze(-1), x)
        before = starts.squeeze(-1).permute(2, 1, 0, 3)  # (G, batch, K, n)
        before = before.reshape(groups, batch * count, -1)
        y = torch.bmm(flat, self.inside.mT) + torch.bmm(before, self.observe.mT)
        y = y.reshape(groups, batch, count * BLOCK)[..., :length].transpose(0, 1)
        latest, rest = last_block(signal)
        end = self.advance_by(starts[count - 2], rest) + self.reach @ latest.unsqueeze(-1)
        return y, end


class _Rotations(Blocks):
    """Of modes: A multiplies pairs of numbers (all real parts, then all imaginary ones) by λ."""

    def __init__(
        self,
        channels: Tensor | None,
        poles: Tensor,
        residues: Tensor,
        d: Tensor,
        dtype: torch.dtype,
    ) -> None:
        poles, residues = poles.to(torch.complex128), residues.to(torch.complex128)  # (G, m)
        powers = torch.stack([integer_power(poles, t) for t in range(BLOCK + 1)])
        read = (residues * powers).movedim(0, 1)[:, :BLOCK]  # (G, c, m)
        taps = torch.cat([d.double().unsqueeze(-1), read.real.sum(-1)[:, : BLOCK - 1]], dim=-1)
        enter = powers[:BLOCK].flip(0).movedim(0, 2)  # (G, m, c)
        super().__init__(
            channels,
            taps,
            torch.cat([read.real, -read.imag], dim=-1),
            torch.cat([enter.real, enter.imag], dim=1),
            dtype,
        )
        planes = torch.stack([powers.real, powers.imag], dim=1).unsqueeze(-1)
        self._hold("powers", planes[:BLOCK].to(dtype))  # (c, 2, G, m, 1)
        self._hold("whole", planes[BLOCK].to(dtype))

    powers: Tensor
    whole: Tensor

    def advance(self, x: Tensor) -> Tensor:
        return _turn(x, self.whole)

    def advance_by(self, x: Tensor, steps: Tensor) -> Tensor:
        return _turn(x, self.powers.index_select(0, steps.reshape(1)).squeeze(0))


def _turn(x: Tensor, factor: Tensor) -> Tensor:
    re, im = x.chunk(2, dim=2)
    real, imaginary = factor[0], factor[1]
    return torch.cat([re * real - im * imaginary, re * imaginary + im * real], dim=2)


class _Matrices(Blocks):
    """Of a dense state matrix, whose powers of two make any power below c."""

    def __init__(self, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dtype: torch.dtype) -> None:
        rows, columns = [C], [B]
        for _ in range(BLOCK - 1):
            rows.append((rows[-1].unsqueeze(-2) @ A).squeeze(-2))
            columns.append((A @ columns[-1].unsqueeze(-1)).squeeze(-1))
        observe = torch.stack(rows, dim=-2)
        markov = (observe @ B.unsqueeze(-1)).squeeze(-1)
        taps = torch.cat([D.unsqueeze(-1), markov[:, : BLOCK - 1]], dim=-1)
        super().__init__(None, taps, observe, torch.stack(columns[::-1], dim=-1), dtype)
        powers = [A]
        while 2 ** (len(powers) - 1) < BLOCK:
            powers.append(powers[-1] @ powers[-1])
        self._hold("whole", powers[-1].to(dtype))
        self._hold("powers", torch.stack(powers[:-1]).to(dtype))  # (bits, G, n, n)

    powers: Tensor
    whole: Tensor

    def advance(self, x: Tensor) -> Tensor:
        return self.whole @ x

    def advance_by(self, x: Tensor, steps: Tensor) -> Tensor:
        for bit, power in enumerate(self.powers.unbind()):
            wanted = torch.div(steps, 2**bit, rounding_mode="floor") % 2 == 1
            x = torch.where(wanted, power @ x, x)
        return x


def _matrices(recurrence: Any) -> _Matrices:
    """The blocks of a recurrence with one state tensor, in the layout of that state."""
    system = recurrence.system
    if isinstance(recurrence, CompanionRecurrence):
        first = torch.zeros_like(system.a)
        first[..., 0] = 1
        system = StateSpace(system._companion(), first, system.b, system.d)
    elif isinstance(recurrence, DPLRRecurrence):  # (Re x, Im x) to pairs
        system = system.state_space()
        pairs = torch.arange(system.order, device=system.device).reshape(2, -1).mT.flatten()
        A, B, C = system.A, system.B, system.C
        A = A.index_select(-1, pairs).index_select(-2, pairs)
        system = StateSpace(A, B[..., pairs], C[..., pairs], system.D)
    flat = system.to(dtype=torch.float64).reshape_channels(system.channel_shape.numel())
    return _Matrices(flat.A, flat.B, flat.C, flat.D, recurrence._like.dtype)


class BlockedRecurrence(nn.Module):
    """A frozen recurrence, as functions that write into nothing.

    Args:
        recurrence: Of any finite-dimensional time-invariant system.
        streams: Dimensions after the channels that share a filter, as the outer products of
            MultiHyena do: the system's channels there are (heads, 1, 1).

    Raises:
        ValueError: for a recurrence of another kind.
    """

    def __init__(self, recurrence: Recurrence, streams: int = 0) -> None:
        super().__init__()
        self.recurrence: Any = recurrence
        self.form = recurrence.form
        self.streams = streams
        self._poles: tuple[Tensor, Tensor] | None = None
        if isinstance(recurrence, DPLRRecurrence):
            poles = recurrence._poles
            self._poles = poles.real.clone(), poles.imag.clone()
        if isinstance(recurrence, ModalRecurrence):
            parts: list[Blocks] = []
            system = recurrence.system
            for group in system.groups:
                part = system._part(group)
                poles, residues = (
                    value.reshape(-1, value.shape[-1]) for value in (part.poles, part.residues)
                )
                channels = group.channels
                index = None if channels is None else torch.tensor(channels, device=poles.device)
                dtype = recurrence._like.dtype
                parts.append(_Rotations(index, poles, residues, part.d.flatten(), dtype))
        elif isinstance(
            recurrence,
            CompanionRecurrence | DPLRRecurrence | LatticeRecurrence | StateSpaceRecurrence,
        ):
            parts = [_matrices(recurrence)]
        else:
            raise ValueError(f'a recurrence of the form "{recurrence.form}" has no state to export')
        self.parts: Any = nn.ModuleList(parts)  # one for each group of channels of the state

    def step(self, u_t: Tensor, state: State) -> tuple[Tensor, State]:
        """What the recurrence's step computes, with nothing written into ``state``."""
        if isinstance(self.recurrence, ModalRecurrence):
            assert isinstance(state, ModalState)
            return _modal_step(self.recurrence, u_t, state)
        if isinstance(self.recurrence, DPLRRecurrence):
            assert isinstance(state, DPLRState) and self._poles is not None
            return _dplr_step(self.recurrence, self._poles, u_t, state)
        if isinstance(self.recurrence, CompanionRecurrence):
            assert isinstance(state, CompanionState)
            return _companion_step(self.recurrence, u_t, state)
        return self.recurrence.step(u_t, state)

    def prefill(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        """A chunk (batch, *C, length), the channels being the system's own, by blocks."""
        channels = u.shape[1:-1]
        outputs, ends = [], []
        for part, x in zip(self.parts, self.pack(state), strict=True):
            y, end = part.convolve(part.select(u).reshape(u.shape[0], -1, u.shape[-1]), x)
            outputs.append(y.reshape(u.shape[0], -1, *channels[1:], u.shape[-1]))
            ends.append(end)
        y = self.restore_order(outputs).reshape(u.shape)
        return y.to(u.dtype), self.unpack(ends, state)

    def restore_order(self, outputs: list[Tensor]) -> Tensor:
        """The channels of all parts, (batch, channels, …) each, in their order."""
        if len(outputs) == 1:
            return outputs[0]
        return torch.cat(outputs, dim=1).index_select(1, self.recurrence._place)

    def pack(self, state: State) -> list[Tensor]:
        """The state's tensors as (batch, G, n, streams)."""
        if not isinstance(state, ModalState):
            (x,) = state
            G = self.parts[0].inside.shape[0]
            if self.streams:  # (batch, heads, N, N, *n)
                x = x.flatten(1 + 1 + self.streams)
                return [x.flatten(2, 1 + self.streams).mT]
            return [x.reshape(x.shape[0], G, -1, 1)]
        packed = []
        for part, modes in zip(self.parts, state.modes, strict=True):
            if self.streams:  # (batch, heads, N, 2, m, N)
                x = modes.permute(0, 1, 3, 4, 2, 5)
                packed.append(x.flatten(2, 3).flatten(3, 4))
            elif self.recurrence._d.ndim:  # (batch, *C[:-1], 2, m, C[-1])
                x = modes.movedim(-1, -3)
                packed.append(x.reshape(x.shape[0], part.inside.shape[0], -1, 1))
            else:
                packed.append(modes.reshape(modes.shape[0], 1, -1, 1))
        return packed

    def unpack(self, packed: list[Tensor], like: State) -> State:
        """The inverse of `pack`."""
        if not isinstance(like, ModalState):
            (shape,) = (x.shape for x in like)
            if self.streams:
                return type(like)(packed[0].mT.reshape(shape))
            return type(like)(packed[0].reshape(shape))
        states = []
        for x, old in zip(packed, like.modes, strict=True):
            shape = old.shape
            if self.streams:
                x = x.unflatten(3, (shape[2], shape[5])).unflatten(2, (2, shape[4]))
                states.append(x.permute(0, 1, 4, 2, 3, 5))
            elif self.recurrence._d.ndim:
                inner = x.reshape(shape[0], *shape[1:-3], shape[-1], 2, shape[-2])
                states.append(inner.movedim(-3, -1))
            else:
                states.append(x.reshape(shape))
        return ModalState(tuple(state.contiguous() for state in states))


def _modal_step(
    recurrence: ModalRecurrence, u_t: Tensor, state: ModalState
) -> tuple[Tensor, ModalState]:
    dims, pair = recurrence._d.ndim, recurrence._pair
    sample = u_t.to(state.modes[0].dtype)
    groups = recurrence._widened.get(sample.shape[-1] if dims else 1, recurrence._groups)
    outputs, states = [], []
    for group, modes in zip(groups, state.modes, strict=True):
        part = sample
        if group.channels is not None:
            part = sample.index_select(-dims, group.channels)
        re, im = modes.unbind(pair)
        outputs.append((re * group.read_real + im * group.read_imaginary).sum(pair + 1))
        turned = re * group.real - im * group.imaginary + part.unsqueeze(pair + 1)
        states.append(torch.stack([turned, im * group.real + re * group.imaginary], dim=pair))
    y = outputs[0]
    if recurrence._place is not None:
        y = torch.cat(outputs, dim=-dims).index_select(-dims, recurrence._place)
    return (y + recurrence._d * sample).to(u_t.dtype), ModalState(tuple(states))


def _dplr_step(
    recurrence: DPLRRecurrence, poles: tuple[Tensor, Tensor], u_t: Tensor, state: DPLRState
) -> tuple[Tensor, DPLRState]:
    (modes,) = state
    sample = u_t.to(modes.dtype)
    read = (recurrence._rows * modes.flatten(-2).unsqueeze(-2)).sum(-1)  # (*B, *C, 2)
    y = read[..., 0] + recurrence._D * sample
    real, imaginary = poles
    re, im = modes.unbind(-1)
    new = torch.stack([re * real - im * imaginary, re * imaginary + im * real], dim=-1)
    new = new + recurrence._B * sample[..., None, None]
    return y.to(u_t.dtype), DPLRState(new + recurrence._p * read[..., 1, None, None])


def _companion_step(
    recurrence: CompanionRecurrence, u_t: Tensor, state: CompanionState
) -> tuple[Tensor, CompanionState]:
    (past,) = state
    sample = u_t.to(past.dtype)
    feedback, output = (past.unsqueeze(-1) * recurrence._taps).sum(-2).unbind(-1)
    y = output + recurrence.system.d * sample
    newest = (sample + feedback).unsqueeze(-1)
    past = torch.cat([newest, past[..., : recurrence.system.order - 1]], dim=-1)
    return y.to(u_t.dtype), CompanionState(past)
