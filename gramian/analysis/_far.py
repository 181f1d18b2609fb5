"""Find the modules that mix only positions that are far apart.

Layers are examined on a short sequence (`gramian.analysis._mixing`). A shift by 70 positions mixes
nothing there. So the model runs once more on the text itself, and what mixes no positions of the
short sequence is tested again.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from gramian.analysis._inputs import ModelInputs, run_model
from gramian.analysis._mixing import Finder, Leftover, plain_parts
from gramian.analysis._tracing import Frame, Tracer
from gramian.analysis._values import copied

__all__ = ["far_mixers"]

_LONGEST = 1024
"""The largest number of tokens on which modules are tested."""


def far_mixers(
    tracer: Tracer, inputs: ModelInputs, planned: Set[nn.Module], short: int
) -> dict[str, str]:
    """Return the paths of modules that mix positions of a text, but not those of its beginning.

    The test reaches as far as the text, but no further than 1,024 tokens. It is one more run of the
    model, in which layers that are alike run once, and one of every kind of its modules.

    Args:
        tracer: The tracer of the model.
        inputs: The whole text.
        planned: The modules that are known to mix positions. They are not tested.
        short: The number of positions on which the others mix none.

    Returns:
        The reason why each of these modules is not read, by its path.
    """
    sizes = {size for tensor in tracer.model.parameters() for size in tensor.shape}
    lengths = range(min(inputs.length, _LONGEST), short, -1)
    length = next((n for n in lengths if n not in sizes), 0)
    reasons: dict[str, str] = {}
    if not length:
        return reasons

    def visit(frame: Frame, found: Leftover) -> None:
        if frame.module not in planned:
            reasons[frame.path] = (
                f"it mixes tokens that are far apart: over {length} tokens, but not over {short}, "
                "on which layers are examined."
            )

    tracer.padding = 0
    finder = Finder(tracer, length, visit, planned.__contains__, lambda frame: False, quick=True)
    twins = list(_twins(tracer.model, planned))
    with ExitStack() as stack:
        outputs: dict[nn.Module, Any] = {}
        for module, first in twins:
            if first not in outputs:
                outputs[first] = None
                handle = first.register_forward_hook(partial(_keep, outputs))
                stack.callback(handle.remove)
            stack.enter_context(tracer.patched(module, partial(_repeat, outputs, first)))
            finder.take_as_mixing(module)
        stack.enter_context(finder.finding())
        run_model(tracer.model, inputs.first(length))
    for module, first in twins:
        place, before = tracer.paths[id(module)], tracer.paths[id(first)]
        for path in [path for path in reasons if f"{path}.".startswith(f"{before}.")]:
            reasons[place + path.removeprefix(before)] = reasons[path]
    return {path: reasons[path] for path in tracer.paths.values() if path in reasons}


def _twins(model: nn.Module, planned: Set[nn.Module]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield layers that compute what a layer before them computes, and the first such layer.

    Layers are the members of a list of modules. Numbers that equal a layer's place in the list are
    taken for its number.
    """
    for stack in model.modules():
        if not isinstance(stack, nn.ModuleList):
            continue
        firsts: list[tuple[int, nn.Module]] = []
        for place, layer in enumerate(stack):
            if not any(module in planned for module in layer.modules()):
                continue
            found = (first for at, first in firsts if _alike(layer, place, first, at, planned))
            first = next(found, None)
            if first is None:
                firsts.append((place, layer))
            elif first is not layer:
                yield layer, first


def _alike(
    layer: nn.Module, place: int, other: nn.Module, at: int, planned: Set[nn.Module]
) -> bool:
    """Return whether two layers have the same parts, but for their numbers."""
    if [p.shape for p in layer.state_dict().values()] != [
        p.shape for p in other.state_dict().values()
    ]:
        return False
    ours, theirs = plain_parts(layer), plain_parts(other)
    if len(ours) != len(theirs):
        return False
    pairs = zip(layer.modules(), other.modules(), strict=True)
    if any((one in planned) != (two in planned) for one, two in pairs):
        return False
    return all(
        path == path_there
        and kind is kind_there
        and len(values) == len(values_there)
        and all(
            name == name_there and (value == value_there or (value, value_there) == (place, at))
            for (name, value), (name_there, value_there) in zip(values, values_there, strict=True)
        )
        for (path, kind, values), (path_there, kind_there, values_there) in zip(
            ours, theirs, strict=True
        )
    )


def _keep(outputs: dict[nn.Module, Any], module: nn.Module, args: Any, output: Any) -> None:
    outputs[module] = copied(output)


def _repeat(
    outputs: dict[nn.Module, Any], first: nn.Module, former: Any, *args: Any, **kwargs: Any
) -> Any:
    """Return what the first of several layers that are alike has returned."""
    if outputs[first] is None:
        return former(*args, **kwargs)
    return copied(outputs[first])
