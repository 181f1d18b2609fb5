"""Obtain operators where `benchmarks/_impulses.py` looks for none, from impulses as well.

A module may be given positions before the sequence, which a convolution uses up. Its channels may
be answered in the same output channels; then every pair has an operator. And functions of a
module may move integers, such as token ids, from position to position.

Nothing here is shared with `gramian.analysis`, whose operators this module is there to check.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks._calls import (
    Call,
    function_calls,
    is_static,
    named_arguments,
    tensors,
    with_argument,
)
from benchmarks._impulses import Response

__all__ = ["further_operators"]

_FURTHER = 12  # the largest number of positions before or after the sequence
_RUNS = 30_000  # the largest number of impulses

Answer = Callable[[Tensor], Tensor]
"""A function from values (L, C) to what answers them, (L, O)."""


def further_operators(module: nn.Module, call: Call, length: int) -> Iterator[Response]:
    """Yield the operators of a call of a module, for every choice of values that has some.

    Args:
        module: The module.
        call: A recorded call of it.
        length: The number of positions.
    """
    for name, values, answer in _ways(call, length, whole=False):
        with contextlib.suppress(Exception):  # any code may raise anything on other values
            yield _of_pairs(name, values, answer, float(values.std().clamp_min(1e-2)))
    moved = []
    for name, inner in function_calls(module, call):
        for label, values, answer in _ways(inner, length, whole=True):
            with contextlib.suppress(Exception):
                found = _of_pairs(f"{name} {label}", values, answer, 1.0)
                if bool(found.maps.tril(-1).any()):
                    moved.append(found)
    if moved:
        yield Response(
            "functions of integers",
            torch.cat([found.maps for found in moved]),
            torch.cat([found.values for found in moved], 1),
            torch.cat([found.answers for found in moved], 1),
            max(found.error for found in moved),
        )


def _axis(x: Tensor, length: int) -> int | None:
    sizes = [size if length <= size <= length + _FURTHER else length + 99 for size in x.shape]
    axis = min(range(x.ndim), key=sizes.__getitem__, default=None)
    return None if axis is None or sizes[axis] > length + _FURTHER else axis


def _ways(call: Call, length: int, *, whole: bool) -> Iterator[tuple[str, Tensor, Answer]]:
    """Yield name, values (L, C) and answer of the tensors that a call maps to others.

    Args:
        call: The call.
        length: The number of positions, L. Further ones lie before the values, and before or after
            the answers; before answers of integers.
        whole: Whether the tensors are of integers.
    """
    for name, given in named_arguments(call).items():
        if is_static(name) or not _is(given, whole) or (axis := _axis(given, length)) is None:
            continue
        rows = given.detach().movedim(axis, 0)
        before, values = rows[: len(rows) - length], rows[len(rows) - length :]
        for number, output in enumerate(tensors(call.output)):
            if not _is(output, whole) or (out := _axis(output, length)) is None:
                continue
            last = output.shape[out] - length
            for start in (last,) if whole else sorted({0, last}, reverse=True):

                def answer(
                    changed: Tensor,
                    name: str = name,
                    axis: int = axis,
                    number: int = number,
                    out: int = out,
                    start: int = start,
                    before: Tensor = before,
                    values: Tensor = values,
                ) -> Tensor:
                    series = changed.reshape(values.shape).to(values.dtype)
                    whole_series = torch.cat([before, series]).movedim(0, axis)
                    found = call.again(*with_argument(call, name, whole_series))
                    answered = list(tensors(found))[number].detach().narrow(out, start, length)
                    return answered.movedim(out, 0).reshape(length, -1).double()

                yield f"{name} to {number} from {start}", values.reshape(length, -1), answer


def _is(x: object, whole: bool) -> bool:
    if not isinstance(x, Tensor) or x.dtype == torch.bool or x.is_complex():
        return False
    return x.is_floating_point() != whole


def _of_pairs(label: str, values: Tensor, answer: Answer, scale: float) -> Response:
    """Return the operators of all pairs of a channel of values and one that answers it.

    Raises:
        ValueError: if the answer is not linear, or there are too many channels.
    """
    length, channels = values.shape
    if length * channels > _RUNS:
        raise ValueError("too many channels")
    given = values.double()
    base = answer(given)
    generator = torch.Generator().manual_seed(7)
    random = scale * torch.randint(1, 4, given.shape, generator=generator).to(given)
    maps, inputs, answers = [], [], []
    for c in range(channels):
        columns = []
        for j in range(length):
            change = torch.zeros_like(given)
            change[j, c] = scale
            columns.append((answer(given + change) - base) / scale)
        found = torch.stack(columns, -1).permute(1, 0, 2)  # (O, L, L)
        mixing = found.flatten(1).norm(dim=1) > 1e-9 * found.norm()
        change = torch.zeros_like(given)
        change[:, c] = random[:, c]
        maps.append(found[mixing])
        inputs += [random[:, c]] * int(mixing.sum())
        answers.append((answer(given + change) - base)[:, mixing])
    operators, series = torch.cat(maps), torch.stack(inputs, 1)
    answered = torch.cat(answers, 1)
    expected = torch.einsum("kij,jk->ik", operators, series)
    error = float((expected - answered).norm() / answered.norm().clamp_min(1e-300))
    whole = answer(given + random) - base
    parts = sum(_spread(answer, given, random, base, c) for c in range(channels))
    error = max(error, float((whole - parts).norm() / whole.norm().clamp_min(1e-300)))
    if not error < 1e-2 or bool(operators.triu(1).any()) or not bool(operators.tril(-1).any()):
        raise ValueError(f"not linear: {error:.1e}")
    return Response(label, operators, series, answered, error)


def _spread(answer: Answer, given: Tensor, random: Tensor, base: Tensor, channel: int) -> Tensor:
    change = torch.zeros_like(given)
    change[:, channel] = random[:, channel]
    return answer(given + change) - base
