"""Find what mixes tokens in a model, by perturbation alone.

One forward pass is recorded: the arguments and outputs of every module, and of every function of a
modeling file that a module calls. Then each is called again by itself with another token at one
position. It mixes tokens if its outputs differ at other positions. A module mixes by itself if it
still does so while the mixing parts inside it return what they returned before, or if it mixes on
the way to one of these parts.

Nothing here knows the name of an architecture, and nothing is shared with `gramian.analysis`.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._calls import (
    Call,
    clone,
    function_calls,
    is_static,
    named_arguments,
    replaced,
    tensors,
    time_axis,
    with_argument,
)

__all__ = ["Site", "find_sites", "place", "record_calls"]

_TOLERANCE = 1e-6  # the smallest relative change that counts, in double precision
_COARSE = 1e-4  # the same in single precision


@dataclass(eq=False)
class Site:
    """A place where tokens are mixed.

    Attributes:
        path: path of the module.
        name: name of the function of the modeling file; empty if it is the module's own code.
        call: the recorded call of the function or the module.
        module: the module.
        outer: the recorded call of the module.
        inside: the mixing calls inside the module's own code, by their names.
        number: which of the calls of this function in the module it is, from 1.
        run: which of the runs of the module it belongs to, from 1.
        selects: whether it returns no values, but indices or maps: which tokens to attend to.
    """

    path: str
    name: str
    call: Call
    module: nn.Module
    outer: Call
    inside: tuple[str, ...] = ()
    selects: bool = False
    number: int = 1
    run: int = 1

    def __str__(self) -> str:
        """Return the path, the name and, where there are several, the numbers."""
        text = f"{self.path} {self.name}".strip()
        text += f" (call {self.number})" if self.number > 1 else ""
        return text + (f" (run {self.run})" if self.run > 1 else "")


def place(length: int) -> int:
    """Return the position whose token is changed."""
    return min(9, length // 2)


def changed(before: Any, after: Any, length: int) -> set[int] | None:
    """Return the positions at which outputs differ, or None if no output has a time axis."""
    positions: set[int] = set()
    compared = False
    for x, y in zip(tensors(before), tensors(after), strict=False):
        axis = time_axis(x, length)
        if axis is None or x.shape != y.shape or not x.numel():
            continue
        compared = True
        tolerance = _TOLERANCE if x.dtype == torch.float64 else _COARSE
        finite = [_finite(v) for v in (x, y)]
        difference = (finite[0] - finite[1]).abs().movedim(axis, 0).reshape(length, -1).amax(1)
        scale = finite[0].abs().max().clamp_min(1e-12)
        positions |= set((difference > tolerance * scale).nonzero().flatten().tolist())
    return positions if compared else None


def _finite(x: Tensor) -> Tensor:
    x = torch.view_as_real(x) if x.is_complex() else x
    return torch.nan_to_num(x.detach().double(), 0.0, 0.0, 0.0)


def perturbed(name: str, value: Any, length: int) -> Any:
    """Return an argument with another token at one position, or None if it holds no tokens."""
    if isinstance(value, MutableMapping):
        inner = {key: perturbed(str(key), entry, length) for key, entry in value.items()}
        if all(entry is None for entry in inner.values()):
            return None
        copied = clone(value)
        copied.update({key: entry for key, entry in inner.items() if entry is not None})
        return copied
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        entries = [perturbed(name, entry, length) for entry in value]
        if all(entry is None for entry in entries):
            return None
        return type(value)(v if e is None else e for v, e in zip(value, entries, strict=True))
    if is_static(name) or not isinstance(value, Tensor) or value.dtype == torch.bool:
        return None
    if not value.is_floating_point() and ("ids" not in name or "position" in name):
        return None
    axis = time_axis(value, length)
    if axis is None:
        return None
    y = value.detach().clone()
    token = y.select(axis, place(length))
    if value.is_floating_point():
        noise = torch.randn(token.shape, generator=torch.Generator().manual_seed(5))
        spread = token.std(unbiased=False).clamp_min(0.1) if token.numel() > 1 else 1.0
        token.add_(spread * noise.to(value.dtype))
    else:
        token.copy_((token + 17) % 97 + 3)
    return y


def variants(call: Call, length: int) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield the arguments of a call with one of them perturbed."""
    for name, value in named_arguments(call).items():
        if is_static(name):
            continue
        other = perturbed(name, value, length)
        if other is not None:
            yield with_argument(call, name, other)


def mixes(call: Call, length: int) -> bool:
    """Return whether a call, made again by itself, mixes tokens."""
    try:
        base = call.again()
        if changed(call.output, base, length) != set():
            return False  # it depends on more than its arguments
        for args, kwargs in variants(call, length):
            if (changed(base, call.again(args, kwargs), length) or set()) - {place(length)}:
                return True
    except Exception:
        return False
    return False


def find_sites(model: nn.Module, run: Callable[[], Any], lengths: tuple[int, ...]) -> list[Site]:
    """Return the places where a model mixes tokens, in the order of its modules.

    Args:
        model: The model.
        run: A function that runs the model once on tokens.
        lengths: Number of tokens, and other lengths that sequences have inside the model.
    """
    calls = record_calls(model, run)
    mixing: dict[str, list[Call]] = {}
    for path, runs in calls.items():
        for length in lengths:
            for call in runs:
                call.length = length
            if mixes(runs[0], length):
                mixing[path] = runs
                break
    sites: list[Site] = []
    for path, runs in mixing.items():
        module = model.get_submodule(path)
        for number, call in enumerate(runs):
            # What the modules inside returned in the same run, if each ran once in it.
            within = {
                inner: others[number if len(others) == len(runs) else 0]
                for inner, others in mixing.items()
                if inner.startswith(f"{path}.")
            }
            for site in _sites_of(path, module, call, within, call.length):
                site.run = number + 1
                sites.append(site)
    return sites


def record_calls(model: nn.Module, run: Callable[[], Any]) -> dict[str, list[Call]]:
    """Return the calls of every module but the model itself."""
    calls: dict[str, list[Call]] = {}
    opened: dict[str, tuple[Any, Any]] = {}

    def before(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        opened[path] = (clone(args), clone(kwargs))

    def after(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.setdefault(path, []).append(Call(module, *opened.pop(path), clone(output)))

    with contextlib.ExitStack() as stack, torch.no_grad():
        for path, module in model.named_modules():
            if path:
                first = module.register_forward_pre_hook(
                    functools.partial(before, path), with_kwargs=True
                )
                last = module.register_forward_hook(
                    functools.partial(after, path), with_kwargs=True
                )
                stack.callback(first.remove)
                stack.callback(last.remove)
        run()
    return {path: calls[path] for path, _ in model.named_modules() if path in calls}


def _sites_of(
    path: str, module: nn.Module, call: Call, within: dict[str, Call], length: int
) -> list[Site]:
    """Return the sites in a mixing module but outside of the mixing modules inside it."""
    called = function_calls(module, call)
    mixing = {id(inner) for _, inner in called if mixes(inner, length)}
    children = {p.removeprefix(f"{path}.") for p in within}
    functions = [
        (name, inner)
        for name, inner in called
        if id(inner) in mixing and not (any(inner.within(mixing)) or children & set(inner.modules))
    ]
    counts: Counter[str] = Counter()
    found: list[Site] = []
    for name, inner in functions:
        counts[name] += 1
        selects = _selects(inner, length)
        found.append(Site(path, name, inner, module, call, (), selects, counts[name]))
    names = tuple(counts)
    if _mixes_by_itself(module, call, within, set(names), length):
        own = Site(path, "", call, module, call, (*within, *names), _selects(call, length))
        return [own, *found]
    return found


def _selects(call: Call, length: int) -> bool:
    outputs = [x for x in tensors(call.output) if time_axis(x, length) is not None]
    maps = [x.ndim > 2 and x.shape[-2:] == (length, length) for x in outputs]
    return not any(
        x.is_floating_point() and not square for x, square in zip(outputs, maps, strict=True)
    )


class Frozen:
    """A module whose mixing parts return what they returned before, and note their arguments."""

    def __init__(self, module: nn.Module, within: dict[str, Call], names: set[str]) -> None:
        self.module, self.within, self.names = module, within, names
        self.inputs: list[Any] = []

    def run(self, call: Call, args: Any = None, kwargs: Any = None) -> tuple[Any, list[Any]]:
        """Run the module, and return its output and the arguments of the frozen parts."""
        self.inputs = []
        outputs: dict[str, list[Any]] = {}
        for name, inner in self._originals:
            outputs.setdefault(name, []).append(inner.output)
        counts: dict[str, int] = {}

        def make(name: str, function: Any) -> Any:
            if name not in self.names or name not in outputs:
                return None

            @functools.wraps(function)
            def frozen(*args: Any, **kwargs: Any) -> Any:
                index = counts.get(name, 0)
                counts[name] = index + 1
                self._note(Call(function, args, kwargs, None))
                return clone(outputs[name][min(index, len(outputs[name]) - 1)])

            return frozen

        with contextlib.ExitStack() as stack:
            for path, inner in self.within.items():
                child = inner.target
                assert isinstance(child, nn.Module)
                stack.enter_context(self._still(child, inner, path))
            stack.enter_context(replaced(self.module, make))
            return call.again(args, kwargs), list(self.inputs)

    def prepare(self, call: Call) -> None:
        """Record what the functions return."""
        self._originals = [
            (name, inner) for name, inner in function_calls(self.module, call) if name in self.names
        ]

    def _note(self, call: Call) -> None:
        self.inputs += [
            clone(value)
            for name, value in named_arguments(call).items()
            if not is_static(name) and isinstance(value, Tensor) and value.dtype != torch.bool
        ]

    @contextlib.contextmanager
    def _still(self, child: nn.Module, inner: Call, path: str) -> Iterator[None]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._note(Call(type(child).forward.__get__(child), args, kwargs, None))
            return clone(inner.output)

        before = child.__dict__.get("forward")
        child.__dict__["forward"] = forward
        try:
            yield
        finally:
            if before is None:
                child.__dict__.pop("forward")
            else:
                child.__dict__["forward"] = before


def _mixes_by_itself(
    module: nn.Module, call: Call, within: dict[str, Call], names: set[str], length: int
) -> bool:
    """Return whether a module mixes tokens outside of the mixing parts inside it."""
    frozen = Frozen(module, within, names)
    frozen.prepare(call)
    try:
        base, inputs = frozen.run(call)
        for args, kwargs in variants(call, length):
            output, others = frozen.run(call, args, kwargs)
            if (changed(base, output, length) or set()) - {place(length)}:
                return True
            if (changed(inputs, others, length) or set()) - {place(length)}:
                return True
    except Exception:
        return True
    return False
