"""Treat the part of a module between two of the modules inside it as a call.

The call's argument is the result of the first of them, the source. Its result is what the second,
the target, is given; or the whole module's result, if there is no target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from gramian.analysis._single import single_frame
from gramian.analysis._tracing import Call, Frame, Replay, Tracer
from gramian.analysis._values import copied, sequences_in

__all__ = ["segment_call", "segments_of"]


class _Reached(Exception):
    """Raised to end a run when the target is reached."""


def segments_of(tracer: Tracer, frame: Frame, length: int) -> Iterator[tuple[str, str]]:
    """Yield source and target of the segments of a module, those with late sources first.

    Modules that run more than once are left out.
    """
    events: list[tuple[str, str]] = []
    patches: dict[nn.Module, Callable[..., Any]] = {}
    mixing = {child for child, _ in frame.children}
    for path, module in frame.module.named_modules():
        if not path or module in mixing or isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue

        def forward(former: Any, *args: Any, path: str = path, **kwargs: Any) -> Any:
            events.append(("in", path))
            result = former(*args, **kwargs)
            if any(sequences_in(result, length)):
                events.append(("out", path))
            return result

        patches[module] = forward
    Replay(tracer, frame, length).run(patches=patches)
    entered = [path for what, path in events if what == "in"]
    once = {path for path in entered if entered.count(path) == 1}
    for at in range(len(events) - 1, -1, -1):
        what, source = events[at]
        if what == "out" and source in once:
            later = [p for e, p in events[at + 1 :] if e == "in" and p in once]
            for target in [*later, ""]:
                yield source, target


def segment_call(tracer: Tracer, frame: Frame, length: int, source: str, target: str) -> Call:
    """Return the segment of a module as a call of the values that its source returns.

    A module in half precision is run in single precision.
    """
    frame = single_frame(frame)
    modules = dict(frame.module.named_modules())
    first = modules[source]
    box: dict[str, Any] = {}

    def noted(former: Any, *args: Any, **kwargs: Any) -> Any:
        box["source"] = copied(former(*args, **kwargs))
        return copied(box["source"])

    def stop(former: Any, *args: Any, **kwargs: Any) -> Any:
        box["target"] = copied((args, kwargs))
        raise _Reached

    def run(patch: Callable[..., Any]) -> Any:
        patches = {first: patch}
        if target:
            patches[modules[target]] = stop
        replay = Replay(tracer, frame, length)
        try:
            replay.run(patches=patches)
        except _Reached:
            return box.pop("target")
        return replay.output

    def evaluate(values: Any) -> Any:
        return run(lambda former, *args, **kwargs: values)

    result = run(noted)
    return Call(("segment", f"{source} -> {target}", 0), evaluate, ((box["source"],), {}), result)
