"""Follow the calls inside a model's modules while it runs, and run single modules again.

A `Tracer` knows which module is running, and sends the calls of functions of the modeling files
through a handler. A `Replay` is such a handler: it runs one module again on given inputs, with
chosen calls and chosen children frozen to the results that they had.
"""

from __future__ import annotations

import functools
import itertools
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from gramian.analysis._keeping import Buffers, kept
from gramian.analysis._scans import SCANS
from gramian.analysis._values import copied, leaves_of, sequences_in, with_leaves

__all__ = ["Call", "Frame", "Handler", "Key", "Operations", "Replay", "Tracer", "own_methods"]

Key = tuple[str, str, int]
"""Kind ("function", "method", "operation", "module" or "segment"), name and number of a call."""

Handler = Callable[[str, str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""A function that is given a call's kind and name, the function, and its arguments. It returns the
result of the call."""

_POINTWISE = (
    "torch.nn.modules.linear",
    "torch.nn.modules.sparse",
    "torch.nn.modules.normalization",
    "torch.nn.modules.dropout",
    "torch.nn.modules.container",
)
"""Files whose modules treat every position alone. They are not followed."""


_TO_THE_END = " -> "
"""What the names of segments end with that have no target."""


@dataclass
class Call:
    """A call that can be repeated with other values.

    Attributes:
        key: kind, name and number of the call in its module.
        function: the function.
        inputs: its arguments and keyword arguments.
        result: what it returned.
        within: the keys of the calls during which it was made.
    """

    key: Key
    function: Callable[..., Any]
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    result: Any
    within: tuple[Key, ...] = ()


@dataclass
class Frame:
    """One run of a module.

    Attributes:
        path: path of the module in the model.
        module: the module.
        inputs: copies of its arguments and keyword arguments.
        random: state of the random numbers of the CPU when it began.
        buffers: the module's buffers when it began; None if it runs again with those it has.
        children: the outermost modules inside it that mix positions, with their results, in the
            order in which they ran.
        given: copies of the arguments of these children.
        padded_before: those of these children whose results have positions before the sequence.
        output: what the module returned, if it is known.
        skipped: the modules inside it that were not examined, because others like them mix no
            positions, with what each returned. They are examined if the module mixes positions.
    """

    path: str
    module: nn.Module
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    random: torch.Tensor
    buffers: Buffers | None = None
    children: list[tuple[nn.Module, Any]] = field(default_factory=list)
    given: list[Any] = field(default_factory=list)
    padded_before: set[nn.Module] = field(default_factory=set)
    output: Any = None
    skipped: list[tuple[Frame, Any]] = field(default_factory=list)

    def answers(self) -> dict[Key, Any]:
        """Return what the run itself returned and passed to its children, as in `Replay`."""
        paths = {id(module): path for path, module in self.module.named_modules()}
        counts: Counter[str] = Counter()
        answers = {("output", "", 0): self.output}
        for (child, _), given in zip(self.children, self.given, strict=True):
            path = paths[id(child)]
            answers["module", path, counts[path]] = given
            counts[path] += 1
        return answers


class Tracer:
    """A record of which modules of a model are running in this thread.

    Args:
        model: The model.

    Attributes:
        paths: paths of the modules by their `id`.
        padding: the number of positions that convolutions may add to a sequence.
        stack: the modules that are running, the innermost last.
        handler: what the calls go through; None if they are only made.
        operations: the mode that sends torch's own functions through the handler, if there is one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.padding = 0
        self.stack: list[nn.Module] = []
        self.handler: Handler | None = None
        self.operations: Operations | None = None
        self._thread = threading.get_ident()

    @property
    def here(self) -> bool:
        """Return whether the current thread is the one that the tracer follows."""
        return threading.get_ident() == self._thread

    def followed(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield path and module of all modules that may mix positions."""
        for path, module in self.model.named_modules():
            place = type(module).__module__
            simple = place == "torch.nn.modules.activation" and not isinstance(
                module, nn.MultiheadAttention
            )
            if not simple and place not in _POINTWISE:
                yield path, module

    @contextmanager
    def installed(
        self,
        enter: Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], None],
        leave: Callable[[str, nn.Module, Any], None],
    ) -> Iterator[None]:
        """Follow the model within this context.

        Args:
            enter: A function that is called with path, module, arguments and keyword arguments
                before a module runs, except during replays.
            leave: A function that is called with path, module and result after it has run.
        """
        with ExitStack() as stack:
            for path, module in self.followed():
                before = module.register_forward_pre_hook(
                    functools.partial(self._enter, path, enter), with_kwargs=True, prepend=True
                )
                after = module.register_forward_hook(functools.partial(self._leave, path, leave))
                stack.callback(before.remove)
                stack.callback(after.remove)
            stack.enter_context(self._functions())
            yield

    def _enter(
        self, path: str, then: Callable[..., None], module: nn.Module, args: Any, kwargs: Any
    ) -> None:
        if self.here:
            self.stack.append(module)
            if not isinstance(self.handler, Replay):
                then(path, module, args, kwargs)

    def _leave(
        self, path: str, then: Callable[..., None], module: nn.Module, args: Any, output: Any
    ) -> None:
        if self.here:
            if not isinstance(self.handler, Replay):
                then(path, module, output)
            self.stack.pop()

    @contextmanager
    def _functions(self) -> Iterator[None]:
        """Send the calls of the functions in the modeling files through the handler."""
        replaced: list[tuple[types.ModuleType, str, Any]] = []
        try:
            for place in self.places:
                for name, function in list(vars(place).items()):
                    if _is_function(function, name) and not name.startswith("__"):
                        replaced.append((place, name, function))
                        setattr(place, name, self.sent("function", name, function))
            yield
        finally:
            for place, name, function in replaced:
                setattr(place, name, function)

    @functools.cached_property
    def places(self) -> list[types.ModuleType]:
        """The files that define the classes of the model, without those of the libraries."""
        base: tuple[type, ...] = ()
        if "transformers" in sys.modules:
            from transformers import PreTrainedModel

            base = PreTrainedModel.__mro__
        names = {
            cls.__module__: None
            for module in self.model.modules()
            for cls in type(module).__mro__
            if not cls.__module__.startswith(("torch.", "gramian.", "builtins")) and cls not in base
        }
        return [sys.modules[name] for name in names if name in sys.modules]

    @contextmanager
    def patched(self, module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
        """Replace a module's `forward` in this context, for this thread only.

        The replacement is called with the module's former `forward` and the arguments.
        """
        own = module.__dict__.get("forward")
        former = module.forward

        def here_only(*args: Any, **kwargs: Any) -> Any:
            return forward(former, *args, **kwargs) if self.here else former(*args, **kwargs)

        module.__dict__["forward"] = here_only
        try:
            yield
        finally:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own

    def sent(self, kind: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls in this thread go through the handler."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.handler is None or not self.stack or not self.here:
                return function(*args, **kwargs)
            return self.handler(kind, name, function, args, kwargs)

        return call


@contextmanager
def own_methods(tracer: Tracer, module: nn.Module) -> Iterator[None]:
    """Send the calls of a module's own methods through the tracer's handler in this context."""
    files = {place.__name__ for place in tracer.places}
    names = {
        name
        for cls in type(module).__mro__
        if cls.__module__ in files
        for name, value in vars(cls).items()
        if isinstance(value, types.FunctionType) and not name.startswith("__") and name != "forward"
    }
    own = {
        name: value
        for name, value in vars(module).items()
        if name != "forward" and _is_function(value, name)
    }
    try:
        for name in names | own.keys():
            module.__dict__[name] = tracer.sent("method", name, getattr(module, name))
        yield
    finally:
        for name in names - own.keys():
            module.__dict__.pop(name, None)
        module.__dict__.update(own)


def _is_function(value: Any, name: str) -> bool:
    """Return whether a value that a layer may call is followed."""
    if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
        return True
    return name in SCANS and callable(value) and not isinstance(value, nn.Module)


class Operations(TorchFunctionMode):
    """A mode that sends the calls of torch's own functions through a tracer's handler."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __enter__(self) -> Operations:
        self._before, self.tracer.operations = self.tracer.operations, self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self.tracer.operations = self._before
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tracer, kwargs = self.tracer, kwargs or {}
        name = getattr(func, "__name__", "")
        active = tracer.operations is self and tracer.handler is not None and tracer.stack
        if not active or name.startswith("__get") or not name:
            return func(*args, **kwargs)
        assert tracer.handler is not None
        return tracer.handler("operation", name, func, args, kwargs)


class Replay:
    """One more run of a module, on the same or on other inputs.

    Args:
        tracer: The tracer that is installed.
        frame: The run to repeat.
        length: The number of positions.
        frozen: The calls whose results are given, and these results.
        keep: A function that returns whether calls of a kind and name are kept, with copies of
            their arguments.
        operations: Whether the calls of torch's own functions go through the handler, too.
        vary: A function that changes the result of a frozen child, given the child and the result.
        watch: A function that is given the key and the arguments of each call of a frozen child.
            By default, copies of them are kept in `watched`. The copies of all layers of a model
            need much memory.

    Attributes:
        output: what the module returned.
        watched: arguments of the frozen calls and of the frozen children, by their keys.
        calls: the calls that were kept.
    """

    def __init__(
        self,
        tracer: Tracer,
        frame: Frame,
        length: int,
        frozen: dict[Key, Any] | None = None,
        *,
        keep: Callable[[str, str], bool] | None = None,
        operations: bool = False,
        vary: Callable[[nn.Module, Any], Any] | None = None,
        watch: Callable[[Key, Any], None] | None = None,
    ) -> None:
        self.tracer, self.frame, self.length = tracer, frame, length
        self.frozen = frozen or {}
        self.keep, self.operations = keep, operations
        self.vary, self.watch = vary, watch
        self.output: Any = None
        self.watched: dict[Key, Any] = {}
        self.calls: list[Call] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self._open: tuple[Key, ...] = ()

    def run(self, inputs: Any = None, patches: dict[nn.Module, Any] | None = None) -> Replay:
        """Run the module.

        Args:
            inputs: Arguments and keyword arguments; by default those of the frame.
            patches: Functions that replace `forward` of some modules.

        Returns:
            The replay itself.
        """
        tracer, frame = self.tracer, self.frame
        args, kwargs = copied(inputs if inputs is not None else frame.inputs)
        depth, before, outer = len(tracer.stack), tracer.handler, tracer.operations
        with ExitStack() as stack:
            stack.enter_context(kept(frame.module))
            stack.callback(lambda: tracer.stack.__delitem__(slice(depth, None)))
            stack.callback(setattr, tracer, "handler", before)
            stack.callback(setattr, tracer, "operations", outer)
            tracer.handler, tracer.operations = self, None
            tracer.stack.append(frame.module)
            for child, results in self._by_child().items():
                stack.enter_context(tracer.patched(child, self._returning(child, results)))
            for module, forward in self._segments(patches or {}):
                stack.enter_context(tracer.patched(module, forward))
            stack.enter_context(own_methods(tracer, frame.module))
            if self.operations:
                stack.enter_context(Operations(tracer))
            torch.set_rng_state(frame.random)
            if frame.buffers is not None:
                frame.buffers.put_back()
            self.output = frame.module.forward(*args, **kwargs)
        for key, given in self.frozen.items():
            if key[0] == "segment" and key[1].endswith(_TO_THE_END):
                self.output = _given_like(given, self.output)
        return self

    def answers(self) -> dict[Key, Any]:
        """Return the output and what is watched, by their keys."""
        return {("output", "", 0): self.output, **self.watched}

    def __call__(
        self,
        kind: str,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self.tracer.stack[-1] is not self.frame.module:
            return function(*args, **kwargs)
        key = (kind, name, self._counts[kind, name])
        self._counts[kind, name] += 1
        if key in self.frozen:
            self.watched[key] = copied((args, kwargs))
            return copied(self.frozen[key])
        if self.keep is None or not self.keep(kind, name):
            return function(*args, **kwargs)
        given = (args, kwargs)
        longest = self.length + self.tracer.padding
        if kind == "operation" and not any(sequences_in(given, self.length, longest)):
            return function(*args, **kwargs)
        inputs, within = copied(given), self._open
        self._open = (*within, key)
        result = function(*args, **kwargs)
        self._open = within
        self.calls.append(Call(key, function, inputs, copied(result), within))
        return result

    def _by_child(self) -> dict[nn.Module, list[Any]]:
        results: dict[nn.Module, list[Any]] = {}
        for child, result in self.frame.children:
            results.setdefault(child, []).append(result)
        return results

    def _returning(self, child: nn.Module, results: list[Any]) -> Callable[..., Any]:
        number = iter(range(len(results)))
        path = next(p for p, m in self.frame.module.named_modules() if m is child)

        def forward(former: Any, *args: Any, **kwargs: Any) -> Any:
            index = next(number)
            if self.watch is None:
                self.watched["module", path, index] = copied((args, kwargs))
            else:
                self.watch(("module", path, index), (args, kwargs))
            result = results[index]
            return copied(result) if self.vary is None else self.vary(child, result)

        return forward

    def _segments(self, patches: dict[nn.Module, Any]) -> Iterator[tuple[nn.Module, Any]]:
        """Yield modules with what replaces their `forward`: the given ones, and frozen segments.

        What the source of a frozen segment returns is watched, and its target is given what it was
        given before.
        """
        yield from patches.items()
        for key, given in self.frozen.items():
            if key[0] != "segment":
                continue
            source, target = key[1].split(" -> ")
            modules = dict(self.frame.module.named_modules())
            runs = itertools.count()

            def watched(
                former: Any, *args: Any, key: Key = key, runs: Iterator[int] = runs, **kwargs: Any
            ) -> Any:
                result = former(*args, **kwargs)
                if next(runs) == key[2]:
                    self.watched[key] = copied(result)
                return result

            def fed(former: Any, *args: Any, given: Any = given, **kwargs: Any) -> Any:
                args, kwargs = _given_like(given, (args, kwargs))
                return former(*args, **kwargs)

            yield modules[source], watched
            if target:
                yield modules[target], fed


def _given_like(given: Any, like: Any) -> Any:
    """Return copies of nested values with the dtypes of other values of the same structure."""
    leaves = [
        x.to(y.dtype) if isinstance(x, torch.Tensor) else x
        for x, y in zip(leaves_of(copied(given)), leaves_of(like), strict=True)
    ]
    return with_leaves(given, iter(leaves))
