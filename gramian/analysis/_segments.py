"""Treat the part of a module between two of the modules inside it as a call.

The call's argument is the result of the first of them, the source. Its result is what the second,
the target, is given; or the whole module's result, if there is no target.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from gramian.analysis._single import single_frame
from gramian.analysis._tracing import Call, Frame, Key, Replay, Tracer
from gramian.analysis._values import copied, sequences_in

__all__ = ["segment_call", "segments_of"]


class _Reached(Exception):
    """Raised to end a run when the target is reached."""


def segments_of(tracer: Tracer, frame: Frame, length: int) -> Iterator[Key]:
    """Yield the keys of the segments of a module, those with late sources first.

    The number of a key is that of the source's run. A source returns a sequence in one run only,
    and a target runs only once.
    """
    events: list[tuple[str, str]] = []
    runs: Counter[str] = Counter()
    returned: dict[str, list[int]] = {}
    patches: dict[nn.Module, Callable[..., Any]] = {}
    mixing = {child for child, _ in frame.children}
    for path, module in frame.module.named_modules():
        if not path or module in mixing or isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue

        def forward(former: Any, *args: Any, path: str = path, **kwargs: Any) -> Any:
            events.append(("in", path))
            run = runs[path]
            runs[path] += 1
            result = former(*args, **kwargs)
            if any(sequences_in(result, length)):
                events.append(("out", path))
                returned.setdefault(path, []).append(run)
            return result

        patches[module] = forward
    Replay(tracer, frame, length).run(patches=patches)
    once = {path for path, count in runs.items() if count == 1}
    for at in range(len(events) - 1, -1, -1):
        what, source = events[at]
        if what == "out" and len(returned[source]) == 1:
            later = [p for e, p in events[at + 1 :] if e == "in" and p in once]
            for target in [*later, ""]:
                yield "segment", f"{source} -> {target}", returned[source][0]


def segment_call(tracer: Tracer, frame: Frame, length: int, key: Key) -> Call:
    """Return the segment of a module with a key as a call of the values that its source returns.

    A module in half precision is run in single precision.
    """
    frame = single_frame(frame)
    modules = dict(frame.module.named_modules())
    source, target = key[1].split(" -> ")
    box: dict[str, Any] = {}

    def noted(former: Any, *args: Any, **kwargs: Any) -> Any:
        box["source"] = copied(former(*args, **kwargs))
        return copied(box["source"])

    def stop(former: Any, *args: Any, **kwargs: Any) -> Any:
        box["target"] = copied((args, kwargs))
        raise _Reached

    def run(patch: Callable[..., Any]) -> Any:
        number = itertools.count()

        def in_turn(former: Any, *args: Any, **kwargs: Any) -> Any:
            chosen = next(number) == key[2]
            return patch(former, *args, **kwargs) if chosen else former(*args, **kwargs)

        patches: dict[nn.Module, Callable[..., Any]] = {modules[source]: in_turn}
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
    return Call(key, evaluate, ((box["source"],), {}), result)
