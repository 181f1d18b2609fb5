r"""Read the operator of any call from its responses.

A tensor in the arguments of a call carries values if the call's result is affine in it, if later
positions respond to it, and if every channel of it is answered in output channels of its own. Then
the result is `y = T v + b` for each pair of such channels. Column j of T is the response to a unit
impulse at position j, and one evaluation gives this column for all channels. Channels with the same
operator form a head. If N channels form a head, each of them can be given an impulse at another
position, so that the whole operator takes L / N evaluations. An operator is accepted only if it
predicts the response to random values.

Where nothing in a module can be read so, two more kinds of values count. Channels may be answered
in the same output channels, as in a convolution over all channels of a group: then every pair of an
input and an output channel has an operator. And integers, such as token ids, may be moved from
position to position, which is a linear map of whatever they stand for.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gramian.analysis._responses import (
    TOLERANCE,
    Responses,
    Unreadable,
    ValueMap,
    moves,
    sources,
)
from gramian.analysis._tracing import Call
from gramian.analysis._values import (
    is_padded_before,
    leaves_of,
    sequences_in,
    streams_of,
    time_axis,
)

__all__ = ["find_moves", "find_pairs", "find_values"]

_CLASSES = 256
"""The largest number of channels that may be answered in the same channel."""

_DISTINCT = 1024
"""The largest number of distinct operators with which others are compared."""

_SAME = 3e-5
"""The largest relative difference between the operators of the channels of one head."""

_ANSWERED = 1e-10
"""The least energy, relative to that of all channels, with which a channel answers."""


def find_values(call: Call, length: int, padding: int = 0, budget: int = 64) -> ValueMap:
    """Find where the values of a call are, and read its operators on a short sequence.

    Args:
        call: The call.
        length: The number of positions, at least 4.
        padding: The number of positions that convolutions may add.
        budget: Largest number of blocks of channels to try in one argument.

    Returns:
        The map of the values.

    Raises:
        Unreadable: if no argument carries values.
    """
    reasons = []
    candidates = [
        Responses(call, leaf, axis, length, streams=(streams_of(x.shape[axis], length), 1))
        for leaf, x, axis in sequences_in(call.inputs, length, length + padding)
    ]
    for limit in dict.fromkeys((1, budget)):
        for responses in candidates:
            try:
                return _Search(responses, padding, limit).found()
            except Unreadable as reason:
                reasons.append(str(reason))
            except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError) as e:
                reasons.append(f"it cannot be run again: {type(e).__name__}.")
    raise Unreadable(reasons[-1] if reasons else "no argument of it is a sequence.")


def find_pairs(call: Call, length: int, padding: int = 0) -> ValueMap:
    """Find values whose channels are answered in the same channels, as in a full convolution.

    The arguments are those of `find_values`. The whole argument has to enter affinely.

    Raises:
        Unreadable: if no argument carries such values.
    """
    reasons = ["no argument of it is a sequence."]
    for leaf, x, axis in sequences_in(call.inputs, length, length + padding):
        streams = (streams_of(x.shape[axis], length), 1)
        responses = Responses(call, leaf, axis, length, streams=streams)
        try:
            return _Search(responses, padding, 1).pairs_found()
        except Unreadable as reason:
            reasons.append(str(reason))
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError) as e:
            reasons.append(f"it cannot be run again: {type(e).__name__}.")
    raise Unreadable(reasons[-1])


def find_moves(call: Call, length: int, padding: int = 0) -> ValueMap:
    """Find integers, one for each position, that a call moves from position to position.

    Args:
        call: The call.
        length: The number of positions.
        padding: The number of further positions that there may be.

    Raises:
        Unreadable: if it does not do this.
    """
    longest = length + padding
    for leaf, result in itertools.product(
        _integers(call.inputs, length, longest), _integers(call.result, length, longest)
    ):
        try:
            responses = Responses(call, leaf[0], leaf[1], length, *result)
            responses.padded_before = _pads_integers_before(responses)
            operator = moves(sources(responses))
        except (Unreadable, RuntimeError, ValueError, TypeError, IndexError, KeyError):
            continue
        if bool(operator.triu(1).any()):
            raise Unreadable("it is not causal: it looks ahead.")
        if bool(operator.tril(-1).any()):
            one = torch.zeros(1, dtype=torch.int64)
            return ValueMap(
                *leaf,
                *result,
                inputs=one,
                outputs=one,
                operator=one,
                count=1,
                taps=_taps(operator),
                stochastic=False,
                padded_before=responses.padded_before,
                integers=True,
            )
    raise Unreadable("it does not only move integers from position to position.")


def _pads_integers_before(responses: Responses) -> bool:
    """Return whether further positions of a result come before the sequence."""
    at = responses.length // 3
    values = responses.values.clone()
    values[at] = values[(values != values[at]).nonzero()[-1, 0]]
    results = [leaves_of(responses.call.result), responses.outputs(values)]
    x, y = (result[responses.result] for result in results)
    return is_padded_before(x, y, responses.result_axis, responses.length, at)


def _integers(value: Any, length: int, longest: int) -> list[tuple[int, int]]:
    """Return index and axis of time of the leaves that have one integer for each position."""
    return [
        (index, axis)
        for index, x in enumerate(leaves_of(value))
        if (axis := time_axis(x, length, longest)) is not None
        and x.numel() == x.shape[axis] <= longest
        and not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    ]


class _Search:
    """The search for the channels of one argument that carry values."""

    def __init__(self, responses: Responses, padding: int, budget: int) -> None:
        self.run, self.padding, self.budget = responses, padding, budget
        self.length = responses.length
        self.values = responses.values
        self.channels = self.values.shape[1]
        self.generator = torch.Generator().manual_seed(0)
        self.scale = float(self.values.std(unbiased=False).clamp_min(1e-2))

    def found(self) -> ValueMap:
        self._choose_result()
        self.base = self.run(self.values)
        everything = torch.arange(self.channels)
        accepted = self._clean_blocks(everything)
        if not accepted:
            raise Unreadable("its result is not affine in values with channels of their own.")
        chosen = torch.cat([block for block, _ in self._without_conflicts(accepted)])
        if self._clean(chosen) is None:
            raise Unreadable("its result is affine in single channels only.")
        inputs, outputs = self._pairs(chosen)
        return self._operators(inputs, outputs)

    def pairs_found(self) -> ValueMap:
        self._choose_result()
        self.base = self.run(self.values)
        everything = torch.arange(self.channels)
        answered = self._clean(everything, apart=False)
        if answered is None or not bool(answered.any()):
            raise Unreadable("its result is not affine in its values.")
        classes = self._classes(everything)
        maps = [self._operators(*self._pairs(chosen)) for chosen in classes]
        first = [0, *itertools.accumulate(found.count for found in maps)]
        return replace(
            maps[0],
            inputs=torch.cat([found.inputs for found in maps]),
            outputs=torch.cat([found.outputs for found in maps]),
            operator=torch.cat([m.operator + n for m, n in zip(maps, first, strict=False)]),
            count=first[-1],
            taps=max(found.taps for found in maps) if all(m.taps for m in maps) else 0,
            stochastic=False,
            classes=tuple(classes),
        )

    def _classes(self, everything: Tensor) -> list[Tensor]:
        """Return classes of channels, in each of which they are answered in channels of their own.

        Channels that are not answered are left out.
        """
        classes: list[tuple[list[int], Tensor]] = []
        for channel in everything:
            energy = (
                (self.run(self.values + self._noise(channel[None])) - self.base).square().sum(0)
            )
            answers = energy > max(_ANSWERED * float(energy.max()), 1e-12 * float(self.base.norm()))
            if not bool(answers.any()):
                continue
            for members, taken in classes:
                if not bool((taken & answers).any()):
                    members.append(int(channel))
                    taken |= answers
                    break
            else:
                classes.append(([int(channel)], answers))
            if len(classes) > _CLASSES:
                raise Unreadable("too many of its channels are answered in the same ones.")
        return [torch.tensor(members) for members, _ in classes]

    def _noise(self, channels: Tensor, positions: slice = slice(None)) -> Tensor:
        """Return a change (L, C) of some channels at some positions."""
        noise = torch.randn(self.length, len(channels), generator=self.generator)
        change = torch.zeros_like(self.values)
        rows = torch.arange(self.length)[positions]
        change[rows[:, None], channels] = (self.scale * noise[rows]).to(change)
        return change

    def _choose_result(self) -> None:
        """Choose the first result in which later positions respond to an early one."""
        at = self.length // 3
        before = self.run.outputs(self.values)
        everything = torch.arange(self.channels)
        after = self.run.outputs(self.values + self._noise(everything, slice(at, at + 1)))
        for index, x in enumerate(before):
            axis = time_axis(x, self.length, self.length + self.padding)
            y = after[index]
            if axis is None or not x.is_floating_point() or x.shape != y.shape:
                continue
            self.run.result, self.run.result_axis = index, axis
            self.run.padded_before = is_padded_before(x, y, axis, self.length, at)
            self.run.streams = (self.run.streams[0], streams_of(x.shape[axis], self.length))
            difference = (self.run.flat(y) - self.run.flat(x)).norm(dim=-1)
            if float(difference[at + 1 :].max()) > 1e-5 * float(
                self.run.flat(x).norm(dim=-1).max()
            ):
                return
        raise Unreadable("its result mixes no positions.")

    def _clean_blocks(self, everything: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return blocks of channels that carry values, with the channels that they answer in."""
        todo, accepted = [everything], []
        while todo and self.budget > 0:
            block = todo.pop(0)
            self.budget -= 1
            answered = self._clean(block)
            if answered is None:
                if len(block) > 1:
                    todo += [block[: len(block) // 2], block[len(block) // 2 :]]
            elif bool(answered.any()):
                accepted.append((block, answered))
        return accepted

    def _clean(self, block: Tensor, *, apart: bool = True) -> Tensor | None:
        """Return the result's channels (O) in which values answer, or None if they are no values.

        No channel answers if the block is affine but mixes no positions. With `apart`, channels
        that are answered in the same channels carry no values.
        """
        change = self._noise(block)
        one = self.run(self.values + change) - self.base
        two = self.run(self.values - change) - self.base
        size = float(one.norm())
        none = torch.zeros(one.shape[1], dtype=torch.bool, device=one.device)
        floor = 1e-6 * float(self.base.norm())
        if size <= floor:
            return none
        if not float((one + two).norm()) <= 1e-3 * size + floor:
            return None
        at = self.length // 3
        early = self.run(self.values + self._noise(block, slice(at, at + 1))) - self.base
        if not float(early[at + 1 :].norm()) > 1e-6 * float(early.norm()) + 1e-2 * floor:
            return none
        if float(early[:at].norm()) > 1e-4 * float(early.norm()):
            raise Unreadable("it is not causal: it looks ahead.")
        half = torch.rand(len(block), generator=self.generator) < 0.5
        change[:, block[half]] = 0
        rest = self.run(self.values + change) - self.base
        energies = torch.stack([rest.square().sum(0), (one - rest).square().sum(0)])
        answered = energies > max(_ANSWERED * float(energies.max()), 4 * floor**2 / len(none))
        if apart and len(block) > 1 and bool(answered.all(0).any()):
            return None
        return answered.any(0)

    def _without_conflicts(
        self, blocks: list[tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the blocks whose channels are answered in the fewest channels.

        Raises:
            Unreadable: if some of them are answered in the same channels.
        """

        def fan_out(entry: tuple[Tensor, Tensor]) -> float:
            return float(entry[1].sum()) / len(entry[0])

        kept: list[tuple[Tensor, Tensor]] = []
        for entry in sorted(blocks, key=fan_out):
            if fan_out(entry) > 1.5 * fan_out(kept[0] if kept else entry) + 1e-9:
                break
            if any(bool((entry[1] & other).any()) for _, other in kept):
                raise Unreadable("several channels of its values are answered in the same ones.")
            kept.append(entry)
        return sorted(kept, key=lambda entry: int(entry[0][0]))

    def _pairs(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return the channels of all pairs, found from the bits of the channels' numbers."""
        change = self._noise(chosen)
        everything = (self.run(self.values + change) - self.base).square().sum(0)
        code = torch.zeros(len(everything), dtype=torch.int64)
        for bit in range(max(1, (self.channels - 1).bit_length())):
            part = change.clone()
            part[:, chosen[(chosen >> bit) & 1 == 0]] = 0
            energy = (self.run(self.values + part) - self.base).square().sum(0)
            code += (energy > 0.25 * everything).cpu().long() << bit
        answering = everything > _ANSWERED * everything.max()
        answering = answering.cpu() & torch.isin(code, chosen)
        outputs = answering.nonzero().flatten()
        return code[outputs], outputs

    def _operators(self, inputs: Tensor, outputs: Tensor) -> ValueMap:
        """Read the operators of all pairs, and join those that are equal."""
        blank = self.values.clone()
        blank[:, inputs] = 0
        base = self.run(blank)
        maps = torch.zeros(len(inputs), self.length, self.length, dtype=base.dtype)
        for j in range(self.length):
            impulse = blank.clone()
            impulse[j, inputs] = 1
            maps[:, :, j] = (self.run(impulse) - base)[:, outputs].T.cpu()
        if float(maps.triu(1).norm()) > TOLERANCE * float(maps.norm()):
            raise Unreadable("it is not causal: it looks ahead.")
        values = blank + self._noise(inputs.unique())
        _check(maps, values[:, inputs], (self.run(values) - base)[:, outputs], self.run.base.dtype)
        operator = _equal(maps)
        count = int(operator.max()) + 1
        first = torch.stack([(operator == g).nonzero()[0, 0] for g in range(count)])
        rows = maps[first]
        stochastic = bool((rows > -1e-6).all()) and bool(((rows.sum(-1) - 1).abs() < 1e-3).all())
        run = self.run
        return ValueMap(
            leaf=run.leaf,
            axis=run.axis,
            result=run.result,
            result_axis=run.result_axis,
            inputs=inputs,
            outputs=outputs,
            operator=operator,
            count=count,
            taps=_taps(rows),
            stochastic=stochastic,
            padded_before=run.padded_before,
            streams=run.streams,
        )


def _check(maps: Tensor, values: Tensor, outputs: Tensor, dtype: torch.dtype) -> None:
    """Raise an error if maps (K, L, L) of values (L, K) do not give outputs (L, K)."""
    expected = torch.einsum("kij,jk->ik", maps.double(), values.double().cpu())
    difference = (expected - outputs.double().cpu()).norm()
    error = float(difference / outputs.double().norm().clamp_min(1e-300))
    limit = max(TOLERANCE, 8 * torch.finfo(dtype).eps)
    if not error <= limit:
        raise Unreadable(f"its operator predicts its response with an error of {error:.0e} only.")


def _equal(maps: Tensor) -> Tensor:
    """Return for each of the maps (K, L, L) the index of the distinct map that it equals.

    After many distinct maps, every further one counts as distinct.
    """
    flat = maps.reshape(len(maps), -1)
    operator = torch.full((len(maps),), -1)
    count = 0
    while bool((operator < 0).any()):
        if count == _DISTINCT:
            rest = (operator < 0).nonzero().flatten()
            operator[rest] = count + torch.arange(len(rest))
            break
        first = int((operator < 0).nonzero()[0, 0])
        open_ = (operator < 0).nonzero().flatten()
        near = (flat[open_] - flat[first]).norm(dim=-1) <= _SAME * flat[first].norm()
        operator[open_[near]] = count
        operator[first] = count
        count += 1
    return operator


def _taps(maps: Tensor) -> int:
    """Return the number of taps if the maps (G, L, L) are convolutions with few taps, or 0."""
    length = maps.shape[-1]
    column = maps[:, :, 0]
    size = column.abs().amax()
    known = (column.abs() > 1e-6 * size).any(0).nonzero().flatten()
    count = int(known[-1]) + 1 if len(known) else 1
    if count > length // 2:
        return 0
    lag = torch.arange(length)[:, None] - torch.arange(length)
    toeplitz = column[:, lag.clamp_min(0)] * (lag >= 0)
    return count if float((maps - toeplitz).norm()) <= _SAME * float(maps.norm()) else 0
