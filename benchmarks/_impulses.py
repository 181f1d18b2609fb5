"""Obtain the operators at a place where tokens are mixed, from impulses through the model's code.

The code between a value tensor and an output is run on the recorded values plus an impulse. The
channels of the values that answer linearly, in output channels of their own, have operators, of
which an impulse at each position gives one column in all channels at once.

Nothing here is shared with `gramian.analysis`, whose operators this module is there to check.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._calls import (
    Call,
    clone,
    is_static,
    named_arguments,
    replaced,
    tensors,
    time_axis,
    with_argument,
)
from benchmarks._perturbation import Site, place

__all__ = ["Response", "operators_at"]

_LARGEST = 1024  # the largest number of value channels
_VALUES = ("value", "values", "value_states", "v", "hidden_states", "x", "u", "inputs", "input")
_AFTER = ("z", "gate", "activation")  # what some functions apply to their result


Way = tuple[str, Tensor, Callable[[Tensor], list[Tensor]]]
"""A name, values, and the function from such values to the answers."""


class NoOperator(Exception):
    """The code does not map these values linearly."""


@dataclass(frozen=True)
class Response:
    """The answer of a piece of code to changes of its values.

    Attributes:
        label: what the values are and where the answer is taken.
        maps: the operators, (channels, L, L).
        values: random values, (L, channels), one column for each operator.
        answers: the answer to these values, (L, channels).
        error: relative difference of the answer from what the maps predict.
    """

    label: str
    maps: Tensor
    values: Tensor
    answers: Tensor
    error: float

    def errors(self, maps: Tensor) -> Tensor:
        """Return how far the answers are from what other maps predict.

        Args:
            maps: (h, L, L).

        Returns:
            Relative differences, (h, channels).
        """
        expected = torch.einsum("hij,jc->hci", maps.to(self.values.dtype), self.values)
        size = self.answers.norm(dim=0).clamp_min(1e-300)
        return (expected - self.answers.T).norm(dim=-1) / size


def operators_at(site: Site) -> Iterator[Response]:
    """Yield the operators at a site, for every choice of values that has some."""
    if not site.name:
        yield from _responses(_of_code(site), site.call.length)
        return
    found = _responses(_of_function(site.call), site.call.length)
    inner = next(found, None)
    if inner is None:
        return
    outer = _around(site, inner)
    if outer is not None and not _same_rows(outer.maps, inner.maps, scaled=True):
        yield outer  # the module combines parts that the function returns
        return
    yield inner
    yield from found
    if outer is not None and _same_rows(outer.maps, inner.maps, scaled=False):
        yield outer  # the module adds the values themselves


def _responses(ways: Iterator[Way], length: int) -> Iterator[Response]:
    for label, values, answer in ways:
        with contextlib.suppress(Exception):  # any code may raise anything on other values
            yield _respond(label, values, answer, length)


def _around(site: Site, inner: Response) -> Response | None:
    """Return the operators from the same values to what the module does with a function's result.

    Where a value enters two heads, and the module adds what they return, the operator is the sum. A
    gate after the function only scales the rows of operators, which is no combination.

    Args:
        site: The place of the function.
        inner: The operators of the function.
    """
    length = site.call.length
    if site.outer.length != length:
        return None
    own = Site(site.path, "", site.outer, site.module, site.outer, (site.name,))
    values = next((v for label, v, _ in _of_function(site.call) if label == inner.label), None)
    assert values is not None
    given = _over_time(values, length)
    for label, source, answer in _of_code(own):
        columns = _over_time(source, length)
        apart = (given.T[:, None] - columns.T[None]).abs().amax(-1).amin(1)  # (given channels)
        if label.startswith(f"{site.name}()") or float(apart.max()) > 1e-9:
            continue
        with contextlib.suppress(Exception):
            few_maps = _respond(label, source, answer, length, most=4).maps
            if _same_rows(few_maps, inner.maps, scaled=True) and not _same_rows(
                few_maps, inner.maps, scaled=False
            ):
                return None
            outer = _respond(label, source, answer, length)
            # Where the values also choose what is attended to, only a part of them is linear.
            few = len(outer.maps) < given.shape[1]
            return None if few or outer.error > 10 * inner.error + 1e-9 else outer
    return None


def _same_rows(maps: Tensor, others: Tensor, *, scaled: bool) -> bool:
    """Return whether every one of some maps has, before the diagonal, the rows of another one.

    Args:
        maps: (a, L, L).
        others: (b, L, L).
        scaled: Whether each row may be multiplied by a number.
    """
    rows, candidates = (x.double().tril(-1) for x in (maps, others))
    if scaled:
        rows, candidates = (
            x / x.norm(dim=-1, keepdim=True).clamp_min(1e-30) for x in (rows, candidates)
        )
        cosines = torch.einsum("aij,bij->abi", rows, candidates).abs()
        present = (rows.norm(dim=-1) > 0.5)[:, None] & (candidates.norm(dim=-1) > 0.5)[None]
        return bool((torch.where(present, 1 - cosines, 0.0).amax(-1).amin(1) < 1e-4).all())
    apart = torch.cdist(rows.flatten(1), candidates.flatten(1)).amin(1)
    return bool((apart < 1e-4 * rows.flatten(1).norm(dim=1)).all())


def _respond(
    label: str,
    values: Tensor,
    answer: Callable[[Tensor], list[Tensor]],
    length: int,
    most: int | None = None,
) -> Response:
    """Return the operators from values to an answer, of at most some number of channels.

    Raises:
        NoOperator: if no channel has one.
    """
    axis = time_axis(values, length)
    if axis is None:
        raise NoOperator("no time axis")
    series = values.detach().movedim(axis, 0)
    shape, channels = series.shape, series[0].numel()
    if channels > _LARGEST:
        raise NoOperator("too many channels")
    scale = float(series.std().clamp_min(1e-2))

    def run(change: Tensor) -> list[Tensor]:
        moved = (series + change.reshape(shape)).movedim(0, axis)
        return [_over_time(x, length) for x in answer(moved)]

    base = run(torch.zeros(length, channels, dtype=values.dtype))
    chosen = _answering(run, base, (length, channels), scale)
    pairs = _own_channels(run, base, chosen, (length, channels), scale, most)
    only = torch.tensor(sorted(pairs))
    inputs = torch.tensor([c for c, outs in pairs.items() for _ in outs])
    outputs = torch.tensor([o for outs in pairs.values() for o in outs])
    maps = torch.zeros(len(inputs), length, length, dtype=values.dtype)
    for j in range(length):
        change = torch.zeros(length, channels, dtype=values.dtype)
        change[j, only] = scale
        maps[:, :, j] = (run(change)[chosen] - base[chosen])[:, outputs].T / scale
    generator = torch.Generator().manual_seed(7)
    change = torch.zeros(length, channels, dtype=values.dtype)
    change[:, only] = scale * torch.randn(length, len(only), generator=generator).to(values.dtype)
    found = (run(change)[chosen] - base[chosen])[:, outputs]
    expected = torch.einsum("cij,jc->ic", maps, change[:, inputs])
    error = float((found - expected).norm() / found.norm().clamp_min(1e-300))
    if not error < 1e-2:
        raise NoOperator(f"not predicted: {error:.1e}")
    mixing = (maps.tril(-1) + maps.triu(1)).flatten(1).any(1)
    return Response(label, maps[mixing], change[:, inputs][:, mixing], found[:, mixing], error)


def _over_time(x: Tensor, length: int) -> Tensor:
    axis = time_axis(x, length)
    assert axis is not None
    return x.detach().movedim(axis, 0).reshape(length, -1)


def _answering(
    run: Callable[[Tensor], list[Tensor]], base: list[Tensor], shape: tuple[int, int], scale: float
) -> int:
    """Return the number of the first output that mixes tokens."""
    generator = torch.Generator().manual_seed(3)
    for at in (place(shape[0]), 2, shape[0] // 2):
        change = torch.zeros(shape, dtype=base[0].dtype)
        change[at] = scale * torch.randn(shape[1], generator=generator).to(change.dtype)
        for number, (x, y) in enumerate(zip(run(change), base, strict=True)):
            other = (x - y).abs()
            other[at] = 0
            if float(other.max()) > 1e-5 * float(y.abs().max().clamp_min(1e-9)):
                return number
    raise NoOperator("does not mix")


def _own_channels(
    run: Callable[[Tensor], list[Tensor]],
    base: list[Tensor],
    chosen: int,
    shape: tuple[int, int],
    scale: float,
    most: int | None,
) -> dict[int, list[int]]:
    """Return the value channels that answer linearly, with the output channels of each.

    Channels that answer in the fewest output channels carry values: keys answer in all of a head.
    """
    # Some code computes in single precision whatever its inputs are.
    tight = 1e-4 if base[chosen].dtype == torch.float64 else 1e-3
    generator = torch.Generator().manual_seed(11)
    change = scale * torch.randn(shape, generator=generator).to(base[chosen].dtype)
    once, twice = (run(times * change)[chosen] - base[chosen] for times in (1, 2))
    linear = float((twice - 2 * once).norm()) <= tight * float(once.norm())
    found: dict[int, list[int]] = {}
    for c in range(shape[1]):
        if most is not None and (len(found) == most or c == 3 * most):
            break
        change = torch.zeros(shape, dtype=base[chosen].dtype)
        change[:, c] = scale * torch.randn(shape[0], generator=generator).to(change.dtype)
        once = run(change)[chosen] - base[chosen]
        size = float(once.norm())
        if not size > 1e-9 * float(base[chosen].norm()):
            continue
        if not linear:
            twice = run(2 * change)[chosen] - base[chosen]
            if float((twice - 2 * once).norm()) > tight * size:
                continue
        energy = once.square().sum(0)
        found[c] = (energy > tight * 1e-5 * energy.max()).nonzero().flatten().tolist()
    if not found:
        raise NoOperator("no channel answers linearly")
    least = min(map(len, found.values()))
    found = {c: outs for c, outs in found.items() if len(outs) == least}
    answered = [o for outs in found.values() for o in outs]
    if len(set(answered)) < len(answered):
        raise NoOperator("channels answer in the same output channels")
    return found


def _of_function(call: Call) -> Iterator[Way]:
    """Yield the arguments of a function that may be values, the likely ones first."""
    arguments = named_arguments(call)
    after = [name for name in _AFTER if arguments.get(name) is not None]
    for name in _ordered(arguments, call.length):
        for without in (after, []) if after else ([],):
            kept = Call(call.target, call.args, call.kwargs, None, call.length)
            for option in without:
                kept.args, kept.kwargs = with_argument(kept, option, None)

            def answer(values: Tensor, kept: Call = kept, name: str = name) -> list[Tensor]:
                output = kept.again(*with_argument(kept, name, values))
                return _series(output, call.length)

            yield name, arguments[name], answer


def _ordered(arguments: dict[str, Any], length: int) -> list[str]:
    names = [
        name
        for name, value in arguments.items()
        if not is_static(name) and _series((value,), length) and isinstance(value, Tensor)
    ]
    return sorted(names, key=lambda n: _VALUES.index(n) if n in _VALUES else len(_VALUES))


def _series(value: Any, length: int) -> list[Tensor]:
    return [
        x
        for x in tensors(value)
        if time_axis(x, length) is not None and x.is_floating_point() and x.ndim >= 2
    ]


class _Reached(Exception):
    """The code has reached the place where the answer is taken."""


def _of_code(site: Site) -> Iterator[Way]:
    """Yield the tensors in a module's own code that may be values, and where they are answered.

    Values are an argument of the module, or what a child returns; the answer is what a later child
    or a mixing function receives, or the module's output.
    """
    call, length = site.call, site.call.length
    events = _events(site)
    returned = [name for kind, name, _ in events if kind == "out"]
    for source in reversed(list(dict.fromkeys(returned))):
        first = next(i for i, e in enumerate(events) if e[:2] == ("out", source))
        values = events[first][2]
        later = [name for kind, name, _ in events[first:] if kind == "in"]
        for target in (*dict.fromkeys(later), None):
            for number, value in enumerate(_series(values, length)):
                yield (
                    f"{source} to {target or 'output'}",
                    value,
                    _Segment(site, source, number, target),
                )
    for name in _ordered(named_arguments(call), length):
        for target in (None, *dict.fromkeys(n for kind, n, _ in events if kind == "in")):
            yield (
                f"{name} to {target or 'output'}",
                named_arguments(call)[name],
                _Segment(site, None, name, target),
            )


def _children(site: Site) -> dict[str, nn.Module]:
    """Return the modules that a module's own code calls: the outermost of those that run."""
    return {p: m for p, m in site.module.named_modules() if p and next(m.children(), None) is None}


def _events(site: Site) -> list[tuple[str, str, Any]]:
    """Return what the children and mixing functions of a module receive and return, in order."""
    events: list[tuple[str, str, Any]] = []

    def make(name: str, function: Any) -> Any:
        if name not in site.inside:
            return None

        def noted(*args: Any, **kwargs: Any) -> Any:
            events.append(("in", f"{name}()", None))
            output = function(*args, **kwargs)
            events.append(("out", f"{name}()", clone(output)))
            return output

        return noted

    with contextlib.ExitStack() as stack:
        for path, child in _children(site).items():

            def before(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                events.append(("in", path, None))

            def after(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
                events.append(("out", path, clone(output)))

            stack.callback(child.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(child.register_forward_hook(after).remove)
        stack.enter_context(replaced(site.module, make))
        site.call.again()
    return events


class _Segment:
    """The function from values at a source to the answer at a target, in a module's own code.

    Args:
        site: The place.
        source: The child or function whose output holds the values; None for an argument.
        which: The number of the tensor in that output, or the name of the argument.
        target: The child or function that receives the answer; None for the module's output.
    """

    def __init__(self, site: Site, source: str | None, which: Any, target: str | None) -> None:
        self.site, self.source, self.which, self.target = site, source, which, target
        self.children = _children(site)

    def __call__(self, values: Tensor) -> list[Tensor]:
        """Return the tensors at the target, for values at the source."""
        self.values, self.started = values, self.source is None
        self.answer: list[Tensor] = []
        call = self.site.call
        with contextlib.ExitStack() as stack:
            if self.source in self.children:
                hook = self.children[self.source].register_forward_hook(
                    lambda module, args, output: self._put(output)
                )
                stack.callback(hook.remove)
            if self.target in self.children:
                other = self.children[self.target].register_forward_pre_hook(
                    lambda module, args, kwargs: self._take((args, kwargs)), with_kwargs=True
                )
                stack.callback(other.remove)
            stack.enter_context(replaced(self.site.module, self._function))
            try:
                if self.source is None:
                    output = call.again(*with_argument(call, self.which, values))
                else:
                    output = call.again()
            except _Reached:
                return self.answer
        return _series(output, call.length) if self.target is None else []

    def _put(self, output: Any) -> Any:
        if self.started:
            return output
        self.started = True
        return _with_series(output, self.which, self.values, self.site.call.length)

    def _take(self, args: Any) -> None:
        if self.started:
            self.answer = _series(args, self.site.call.length)
            raise _Reached

    def _function(self, name: str, function: Any) -> Any:
        """Return what replaces a function that is the source or the target."""
        if f"{name}()" not in (self.source, self.target):
            return None

        def followed(*args: Any, **kwargs: Any) -> Any:
            if self.target == f"{name}()":
                self._take((args, kwargs))
            output = function(*args, **kwargs)
            return self._put(output) if self.source == f"{name}()" else output

        return followed


def _with_series(value: Any, number: int, replacement: Tensor, length: int) -> Any:
    """Return an output with its n-th series replaced."""
    if isinstance(value, Tensor):
        return replacement
    left = [number]

    def visit(entry: Any) -> Any:
        if isinstance(entry, Tensor) and _series((entry,), length):
            left[0] -= 1
            return replacement if left[0] == -1 else entry
        return entry

    return type(value)(visit(entry) for entry in value)
