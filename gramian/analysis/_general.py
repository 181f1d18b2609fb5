r"""Read the operator of any call from its responses.

A tensor in the arguments of a call carries values if the call's result is affine in it, if later
positions respond to it, and if every channel of it is answered in output channels of its own. Then
the result is `y = T v + b` for each pair of such channels. Column j of T is the response to a unit
impulse at position j, and one evaluation gives this column for all channels. Channels with the same
operator form a head. If N channels form a head, each of them can be given an impulse at another
position, so that the whole operator takes L / N evaluations. An operator is accepted only if it
predicts the response to random values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gramian.analysis._tracing import Call
from gramian.analysis._values import (
    copied,
    leaves_of,
    sequences_in,
    time_axis,
    window,
    with_leaf,
)

__all__ = ["TOLERANCE", "Responses", "Unreadable", "ValueMap", "find_values", "measure_operators"]

TOLERANCE = 1e-4
"""The largest relative error with which an operator may predict a response in single precision."""

_SAME = 3e-5
"""The largest relative difference between the operators of the channels of one head."""

_ANSWERED = 1e-10
"""The least energy, relative to that of all channels, with which a channel answers."""


class Unreadable(Exception):
    """The sentence that says why no operator can be read."""


class Responses:
    """The result of a call as a function of the values in one of its arguments.

    Args:
        call: The call.
        leaf: Index of the argument among the leaves of the call's inputs.
        axis: Axis of time of the argument.
        length: The number of positions.
        result: Index of the result among the leaves of the call's result.
        result_axis: Axis of time of the result. It may have more than `length` positions, of which
            the first `length` count.
    """

    def __init__(
        self, call: Call, leaf: int, axis: int, length: int, result: int = 0, result_axis: int = 0
    ) -> None:
        self.call, self.leaf, self.axis, self.length = call, leaf, axis, length
        self.result, self.result_axis = result, result_axis
        self.base: Tensor = leaves_of(call.inputs)[leaf]
        rows = self.base.movedim(axis, 0)
        self._shape, self._padding = rows.shape, len(rows) - length
        self.dtype = torch.promote_types(self.base.dtype, torch.float32)

    @property
    def values(self) -> Tensor:
        """Return the values of the call itself, (L, C)."""
        rows = window(self.base, self.axis, self.length, padded_before=True)
        return rows.reshape(self.length, -1).to(self.dtype)

    def outputs(self, values: Tensor) -> list[Tensor]:
        """Return all leaves of the result for values (L, C)."""
        rows = values.to(self.base.dtype)
        if self._padding:
            before = self.base.movedim(self.axis, 0)[: self._padding]
            rows = torch.cat([before.reshape(self._padding, -1), rows])
        given = rows.reshape(self._shape).movedim(0, self.axis).contiguous()
        args, kwargs = copied(with_leaf(self.call.inputs, self.leaf, given))
        return leaves_of(self.call.function(*args, **kwargs))

    def __call__(self, values: Tensor) -> Tensor:
        """Return the result (L, O) for values (L, C)."""
        return self.flat(self.outputs(values)[self.result])

    def flat(self, output: Tensor) -> Tensor:
        """Return a result as (L, O)."""
        rows = window(output.detach(), self.result_axis, self.length, padded_before=False)
        return rows.reshape(self.length, -1).to(self.dtype)


@dataclass(frozen=True)
class ValueMap:
    """Where the values of a call are, and in which channels they are answered.

    Attributes:
        leaf: index of the argument among the leaves of the call's inputs.
        axis: axis of time of the argument.
        result: index of the result among the leaves of the call's result.
        result_axis: axis of time of the result.
        inputs: channel of the argument of each of the K pairs, (K).
        outputs: channel of the result of each pair, (K).
        operator: index of the operator of each pair, (K).
        count: the number of operators.
        taps: if all operators are convolutions, the number of their taps; 0 otherwise.
        stochastic: whether the rows of all operators are probabilities.
    """

    leaf: int
    axis: int
    result: int
    result_axis: int
    inputs: Tensor
    outputs: Tensor
    operator: Tensor
    count: int
    taps: int
    stochastic: bool

    def of(self, call: Call, length: int) -> Responses:
        """Return the responses of another call of the same kind."""
        leaves, results = leaves_of(call.inputs), leaves_of(call.result)
        for found, index, axis in (
            (leaves, self.leaf, self.axis),
            (results, self.result, self.result_axis),
        ):
            if index >= len(found) or not isinstance(found[index], Tensor):
                raise Unreadable("its arguments differ from those on the first tokens.")
            x = found[index]
            if x.ndim <= axis or x.shape[axis] < length:
                raise Unreadable(
                    f"it works on {x.shape[axis] if x.ndim > axis else 1} positions instead of the "
                    f"{length} of the text."
                )
        return Responses(call, self.leaf, self.axis, length, self.result, self.result_axis)


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
        Responses(call, leaf, axis, length)
        for leaf, _, axis in sequences_in(call.inputs, length, length + padding)
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

    def _clean(self, block: Tensor) -> Tensor | None:
        """Return the result's channels (O) in which values answer, or None if they are no values.

        No channel answers if the block is affine but mixes no positions.
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
        if len(block) > 1 and bool(answered.all(0).any()):
            return None
        return answered.any(0)

    def _without_conflicts(
        self, blocks: list[tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the blocks whose channels are answered in the fewest channels, without overlap."""

        def fan_out(entry: tuple[Tensor, Tensor]) -> float:
            return float(entry[1].sum()) / len(entry[0])

        kept: list[tuple[Tensor, Tensor]] = []
        for entry in sorted(blocks, key=fan_out):
            if fan_out(entry) > 1.5 * fan_out(kept[0] if kept else entry) + 1e-9:
                break
            if not any(bool((entry[1] & other).any()) for _, other in kept):
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
    """Return for each of the maps (K, L, L) the index of the distinct map that it equals."""
    flat = maps.reshape(len(maps), -1)
    operator = torch.full((len(maps),), -1)
    count = 0
    while bool((operator < 0).any()):
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


def measure_operators(responses: Responses, found: ValueMap, operators: Sequence[int]) -> Tensor:
    """Measure some operators at full length, and check them.

    Args:
        responses: The responses of the call.
        found: The map of the values.
        operators: Indices of the operators.

    Returns:
        The matrices (len(operators), L, L), or their taps (len(operators), K) if `found.taps` is
        not 0.

    Raises:
        Unreadable: if the operators do not predict the response to random values, or that to the
            call's own values.
    """
    length = responses.length
    blank = responses.values.clone()
    blank[:, found.inputs.unique()] = 0
    base = responses(blank)
    if found.taps:
        result = _measured_taps(responses, found, operators, blank, base)
    else:
        result = _measured_matrices(responses, found, operators, blank, base)
    wanted = torch.isin(found.operator, torch.as_tensor(list(operators)))
    inputs, outputs = found.inputs[wanted], found.outputs[wanted]
    index = {g: n for n, g in enumerate(operators)}
    rows = torch.tensor([index[int(g)] for g in found.operator[wanted]])
    scale = float(responses.values.std(unbiased=False).clamp_min(1e-2))
    noise = torch.randn(blank.shape, generator=torch.Generator().manual_seed(1))
    random = blank.clone()
    channels = found.inputs.unique()
    random[:, channels] = (scale * noise[:, channels]).to(random)
    limit = max(TOLERANCE, 8 * torch.finfo(responses.base.dtype).eps)
    for values in (random, responses.values):
        answer = (responses(values) - base)[:, outputs]
        expected = _applied(result, rows, values[:, inputs], found.taps, length)
        error = float((answer - expected).norm() / answer.norm().clamp_min(1e-30))
        if not error <= limit:
            raise Unreadable(
                f"its operator predicts its response with an error of {error:.0e} only."
            )
    return result


def _applied(result: Tensor, rows: Tensor, values: Tensor, taps: int, length: int) -> Tensor:
    """Apply operators to values (L, K): (L, K)."""
    if taps:
        kernels = result[rows].unsqueeze(1)  # (K, 1, taps)
        padded = torch.nn.functional.pad(values.T[None], (kernels.shape[-1] - 1, 0))
        return torch.nn.functional.conv1d(padded, kernels.flip(-1).to(padded), groups=len(rows))[
            0
        ].T
    outputs = torch.empty_like(values)
    for n in range(len(result)):
        mine = rows.to(values.device) == n
        outputs[:, mine] = result[n] @ values[:, mine]
    return outputs


def _measured_taps(
    responses: Responses,
    found: ValueMap,
    operators: Sequence[int],
    blank: Tensor,
    base: Tensor,
) -> Tensor:
    impulse = blank.clone()
    impulse[0, found.inputs.unique()] = 1
    answer = responses(impulse) - base
    first = [int((found.operator == g).nonzero()[0, 0]) for g in operators]
    return answer[: found.taps, found.outputs[first]].T.contiguous()


def _measured_matrices(
    responses: Responses,
    found: ValueMap,
    operators: Sequence[int],
    blank: Tensor,
    base: Tensor,
) -> Tensor:
    """Measure matrices by impulses, one position for each channel of a head at a time."""
    length = responses.length
    pairs = []  # of each operator, its input and output channels
    for g in operators:
        mine = (found.operator == g).nonzero().flatten()
        distinct: dict[int, int] = {}
        for k in mine.tolist():
            distinct.setdefault(int(found.inputs[k]), int(found.outputs[k]))
        pairs.append((list(distinct), list(distinct.values())))
    packed = min(len(inputs) for inputs, _ in pairs)
    places: dict[int, int] = {}
    for inputs, _ in pairs:
        for place, channel in enumerate(inputs[:packed]):
            if places.setdefault(channel, place) != place:
                packed = 1  # heads share some channels, but not all
    result = base.new_zeros(len(pairs), length, length)
    for start in range(0, length, packed):
        width = min(packed, length - start)
        columns = torch.arange(start, start + width)
        impulses = blank.clone()
        for inputs, _ in pairs:
            impulses[columns, inputs[:width]] = 1
        answer = responses(impulses) - base
        for n, (_, outputs) in enumerate(pairs):
            result[n, :, start : start + width] = answer[:, outputs[:width]]
    above = float(result.triu(1).norm())
    if math.isfinite(above) and above > TOLERANCE * float(result.norm()):
        raise Unreadable("it is not causal: it looks ahead.")
    return result.tril()
