"""Measure the operator of a call from its responses to impulses, once its values are known.

The values are found by `gramian.analysis._general`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gramian.analysis._tracing import Call
from gramian.analysis._values import copied, leaves_of, window, with_leaf

__all__ = [
    "TOLERANCE",
    "Responses",
    "Unreadable",
    "ValueMap",
    "measure_operators",
    "moves",
    "sources",
]

TOLERANCE = 1e-4
"""The largest relative error with which an operator may predict a response in single precision."""


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
        result_axis: Axis of time of the result. It may have more than `length` positions.
        padded_before: Whether the last `length` of them count, instead of the first.
        streams: How many sequences lie one after the other along the axis of the argument, and
            along that of the result. They count as channels.
    """

    def __init__(
        self,
        call: Call,
        leaf: int,
        axis: int,
        length: int,
        result: int = 0,
        result_axis: int = 0,
        padded_before: bool = False,
        streams: tuple[int, int] = (1, 1),
    ) -> None:
        self.call, self.leaf, self.axis, self.length = call, leaf, axis, length
        self.result, self.result_axis = result, result_axis
        self.padded_before, self.streams = padded_before, streams
        self.base: Tensor = leaves_of(call.inputs)[leaf]
        rows = self.base.movedim(axis, 0)
        self._shape, self._padding = rows.shape, len(rows) - length
        numbers = torch.float32 if self.base.is_floating_point() else torch.float64
        self.dtype = torch.promote_types(self.base.dtype, numbers)

    @property
    def values(self) -> Tensor:
        """Return the values of the call itself, (L, C)."""
        rows = window(self.base, self.axis, self.length, True, self.streams[0])
        return rows.reshape(self.length, -1).to(self.dtype)

    def outputs(self, values: Tensor) -> list[Tensor]:
        """Return all leaves of the result for values (L, C)."""
        rows = values.to(self.base.dtype)
        if self.streams[0] > 1:
            series = rows.unflatten(-1, (self.streams[0], -1))  # (L, streams, channels)
            rows = series.movedim(1, 0).flatten(0, 1)
        elif self._padding:
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
        rows = window(
            output.detach(), self.result_axis, self.length, self.padded_before, self.streams[1]
        )
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
        classes: if several channels of the argument are answered in the same channels of the
            result, the channels of the argument in classes: those of one class are answered in
            channels of their own. Then each pair of channels has an operator.
        padded_before: whether further positions of the result come before the sequence.
        integers: whether the values are integers, which are moved.
        streams: how many sequences lie one after the other in the argument, and in the result.
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
    classes: tuple[Tensor, ...] = ()
    padded_before: bool = False
    integers: bool = False
    streams: tuple[int, int] = (1, 1)

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
            streams = self.streams[found is results]
            if x.ndim <= axis or x.shape[axis] < streams * length:
                raise Unreadable(
                    f"it works on {x.shape[axis] if x.ndim > axis else 1} positions instead of the "
                    f"{length} of the text."
                )
        places = (self.leaf, self.axis, length, self.result, self.result_axis)
        return Responses(call, *places, self.padded_before, self.streams)


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
    if not responses.base.is_floating_point():
        return _measured_moves(responses, found)
    if not found.classes:
        return _measured(responses, found, operators)
    order = {g: n for n, g in enumerate(operators)}
    wanted = torch.isin(found.operator, torch.as_tensor(list(operators)))
    shape = (found.taps,) if found.taps else (responses.length, responses.length)
    result = responses.values.new_zeros(len(operators), *shape)
    chosen = [c[torch.isin(c, found.inputs[wanted])] for c in found.classes]
    chosen = [channels for channels in chosen if len(channels)]
    for channels in chosen:
        mine = torch.isin(found.inputs, channels)
        own = sorted(order.keys() & set(found.operator[mine].tolist()))
        part = replace(
            found,
            inputs=found.inputs[mine],
            outputs=found.outputs[mine],
            operator=found.operator[mine],
            classes=(),
        )
        result[[order[g] for g in own]] = _measured(responses, part, own)
    _check_sums(responses, chosen)
    return result


def _check_sums(responses: Responses, classes: Sequence[Tensor]) -> None:
    """Check that the response to several classes of channels is the sum of the responses to each.

    Raises:
        Unreadable: if it is not.
    """
    base = responses(responses.values)
    scale = float(responses.values.std(unbiased=False).clamp_min(1e-2))
    generator = torch.Generator().manual_seed(3)
    noise = scale * torch.randn(responses.values.shape, generator=generator)
    changes = []
    for channels in classes:
        change = torch.zeros_like(responses.values)
        change[:, channels] = noise[:, channels].to(change)
        changes.append(change)
    parts = sum(responses(responses.values + change) - base for change in changes)
    whole = responses(responses.values + sum(changes)) - base
    error = float((whole - parts).norm() / whole.norm().clamp_min(1e-30))
    if not error <= max(TOLERANCE, 8 * torch.finfo(responses.base.dtype).eps):
        raise Unreadable(f"its response is no sum over its channels: the error is {error:.0e}.")


def sources(responses: Responses) -> Tensor:
    """Return from which position the integer at each position of a result comes, (L); -1 if none.

    Every bit of the number of a position is asked for by one run, in which the positions with this
    bit have other integers. Integers are only replaced by others of the same sequence, which are
    known to be valid.

    Raises:
        Unreadable: if the call does not only move integers from position to position.
    """
    given = responses.values[:, 0]
    order = given.unique()
    other = order[(torch.searchsorted(order, given) + 1) % len(order)]
    base = responses(given[:, None])[:, 0]
    everything = responses(other[:, None])[:, 0] != base
    code = torch.zeros(len(given), dtype=torch.int64)
    positions = torch.arange(len(given))
    for bit in range(max(1, (len(given) - 1).bit_length())):
        changed = ((positions >> bit) & 1 == 1).to(given.device)
        answer = responses(torch.where(changed, other, given)[:, None])[:, 0]
        code += (answer != base).cpu().long() << bit
    code[code >= len(given)] = 0  # what changes in another way fails the check
    code = torch.where(everything.cpu(), code, -1)
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):
        random = order[torch.randint(len(order), (len(given),), generator=generator)]
        expected = torch.where(code.to(given.device) < 0, base, random[code])
        if not torch.equal(responses(random[:, None])[:, 0], expected):
            raise Unreadable("it does more than to move integers from position to position.")
    return code


def moves(source: Tensor) -> Tensor:
    """Return the operator of a move of integers, (1, L, L), from their sources (L)."""
    operator = torch.zeros(1, len(source), len(source))
    rows = (source >= 0).nonzero().flatten()
    operator[0, rows, source[rows]] = 1
    return operator


def _measured_moves(responses: Responses, found: ValueMap) -> Tensor:
    operator = moves(sources(responses))
    if bool(operator.triu(1).any()):
        raise Unreadable("it is not causal: it looks ahead.")
    if not found.taps:
        return operator
    taps = operator[:, : found.taps, 0]
    lag = torch.arange(len(operator[0]))[:, None] - torch.arange(len(operator[0]))
    inside = (lag >= 0) & (lag < found.taps)
    if not torch.equal(operator, torch.where(inside, taps[:, lag.clamp(0, found.taps - 1)], 0.0)):
        raise Unreadable("it moves integers in another way than on the first tokens.")
    return taps


def _measured(responses: Responses, found: ValueMap, operators: Sequence[int]) -> Tensor:
    """Measure operators of channels that are answered in channels of their own, and check them."""
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
