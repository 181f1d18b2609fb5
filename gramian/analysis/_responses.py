"""Measure the operator of a call from its responses to impulses, once its values are known.

The values are found by `gramian.analysis._general`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gramian.analysis._tracing import Call
from gramian.analysis._values import copied, leaves_of, window, with_leaf

__all__ = ["TOLERANCE", "Responses", "Unreadable", "ValueMap", "measure_operators"]

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
