"""Run a model over windows of a text, and read or compare its recurrences on the way.

The calls of one layer at a time are held, and dropped when the layer returns.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gramian._labels import IGNORED
from gramian.shrinking._balancing import Basis, Gramians, changed
from gramian.shrinking._family import Call, Layer
from gramian.shrinking._recurrence import gram
from gramian.shrinking._texts import Windows

__all__ = [
    "Change",
    "Importance",
    "Scores",
    "compare",
    "measure_importance",
    "window_scores",
]

_TOKENS = 2**12  # tokens of one forward pass
_AGREEMENT = 1e-3  # how far the energy of the read outputs may be from that of the scan's
_HALF_AGREEMENT = 5e-2  # the same for scans in half precision


@dataclass
class Importance:
    """What a text needs of the state of a layer.

    Attributes:
        gram: the Gram matrices of what the coordinates contribute, (groups, n, n), in double
            precision.
        keys: sum of the squares of the keys, (groups, n).
        queries: sum of the squares of the queries, (groups, n).
        tokens: number of tokens.
        basis: the basis of the coordinates; None if they are those of the model.
        due: the Gram matrices of the positions that have an answer alone; None if all count.
    """

    gram: Tensor
    keys: Tensor
    queries: Tensor
    tokens: int = 0
    basis: Basis | None = None
    due: Tensor | None = None

    def __add__(self, other: Importance) -> Importance:
        """Return the importance for two texts in the same coordinates."""
        return Importance(
            self.gram + other.gram,
            self.keys + other.keys,
            self.queries + other.queries,
            self.tokens + other.tokens,
            self.basis,
            self.due if self.due is None or other.due is None else self.due + other.due,
        )

    @property
    def energies(self) -> tuple[Tensor, Tensor]:
        """The mean squares of keys and queries, (groups, n) each."""
        return self.keys / self.tokens, self.queries / self.tokens


@dataclass
class Change:
    """The squared errors of a layer's scan and output on a text, and the squared sizes of both."""

    scan: float = 0.0
    scan_size: float = 0.0
    output: float = 0.0
    output_size: float = 0.0

    @property
    def scan_error(self) -> float:
        """The relative error of the scan's outputs."""
        return (self.scan / self.scan_size) ** 0.5 if self.scan_size else 0.0

    @property
    def output_error(self) -> float:
        """The relative error of the layer's output."""
        return (self.output / self.output_size) ** 0.5 if self.output_size else 0.0


@torch.no_grad()
def measure_importance(
    model: nn.Module,
    layers: Sequence[Layer],
    windows: Windows,
    progress: Callable[[int], None] | None = None,
    bases: Mapping[str, Basis] | None = None,
    gramians: Mapping[str, Gramians] | None = None,
) -> dict[str, Importance]:
    """Return the importance of the states of some layers on a text, by the layers' paths.

    Args:
        model: the model.
        layers: the layers.
        windows: the windows. If they are labelled, the Gram matrices of the positions with an
            answer are measured, too.
        progress: a function that is called with the number of windows done.
        bases: bases of the states, by path, in which their coordinates are measured. The gates of
            these layers are scalar.
        gramians: sums, by the path of layers with scalar gates, to which the text is added.

    Raises:
        ValueError: if the outputs of a layer's scan are not those that its arguments say.
    """
    found: dict[str, Importance] = {}
    for layer in layers:
        groups, n = layer.shape.groups, layer.shape.states
        zeros = torch.zeros(groups, n, dtype=torch.float64)
        basis = None if bases is None else bases[layer.path]
        squares = torch.zeros(groups, n, n, dtype=torch.float64)
        due = torch.zeros_like(squares) if windows.labelled else None
        found[layer.path] = Importance(squares, zeros, zeros, basis=basis, due=due)

    def read(layer: Layer, calls: list[Call], *_: Any) -> None:
        one = found[layer.path]
        if gramians is not None and layer.path in gramians:
            (call,) = calls
            gramians[layer.path].add(call.recurrence)
        recurrences = [call.recurrence for call in calls]
        if one.basis is not None:
            recurrences = [changed(x, one.basis.keys, one.basis.queries) for x in recurrences]
        total = torch.cat([gram(each) for each in recurrences])
        if not one.tokens:  # one check is enough, because its outputs cost a scan
            _check(layer, float(total.sum()), calls)
        keys, queries = ([getattr(each, k) for each in recurrences] for k in ("keys", "queries"))
        one.gram = one.gram + total.cpu()
        if one.due is not None:
            rows = (windows.answers[done : done + len(recurrences[0].keys)] != IGNORED)[
                :, None, :, None
            ]
            some = [replace(x, queries=x.queries * rows.to(x.queries)) for x in recurrences]
            one.due = one.due + torch.cat([gram(each) for each in some]).cpu()
        one.keys = one.keys + _energy(keys)
        one.queries = one.queries + _energy(queries)
        one.tokens += keys[0].shape[0] * keys[0].shape[2]

    done = 0
    with _calling(layers, read):
        for done in _run(model, windows.ids, 1):  # one window is checked
            if progress is not None:
                progress(done)
    return found


@torch.no_grad()
def compare(
    model: nn.Module, layers: Sequence[Layer], cut: Mapping[str, Layer], windows: Tensor
) -> dict[str, Change]:
    """Return how much cut layers change what the layers of a model compute on a text.

    Every cut layer is given what the layer in the model is given.

    Args:
        model: the model.
        layers: the layers that were cut.
        cut: the cut layers, by path.
        windows: token ids, (count, length).
    """
    changes = {layer.path: Change() for layer in layers}

    def read(layer: Layer, calls: list[Call], args: Any, kwargs: Any, output: Any) -> None:
        other, change = cut[layer.path], changes[layer.path]
        after: list[Call] = []
        with other.family.watch(other.module, _inputs(args, kwargs), after.append):
            new = other.module(*args, **kwargs)
        factor = layer.family.scale(layer.module, other.shape.states)
        for one, two in zip(calls, after, strict=True):
            before, now = (call.outputs().double() for call in (one, two))
            weights = one.recurrence.weights(before)
            change.scan += float((weights * (before - factor * now)).square().sum())
            change.scan_size += float((weights * before).square().sum())
        before, now = (_first(x).double() for x in (output, new))
        change.output += float((before - now).square().sum())
        change.output_size += float(before.square().sum())

    with _calling(layers, read):
        for _ in _run(model, windows):
            pass
    return changes


@dataclass(frozen=True)
class Scores:
    """What a model predicts in some windows, in double precision.

    Attributes:
        losses: mean cross-entropy of the answers of every window, (count), in nats.
        accuracies: share of the answers that are the most probable token, (count).
    """

    losses: Tensor
    accuracies: Tensor

    def rank(self, measure: str) -> tuple[float, float]:
        """Return the mean loss, or the share of wrong answers and then the loss; NaN is the worst.

        Args:
            measure: "loss" or "accuracy".
        """
        loss = float(self.losses.mean())
        loss = math.inf if math.isnan(loss) else loss
        return (loss, loss) if measure == "loss" else (1 - float(self.accuracies.mean()), loss)

    def is_close_to(self, other: Scores) -> bool:
        """Return whether the accuracy is at most two standard errors below that of another model.

        The standard error is that of the mean difference over windows, which are the same for both.
        """
        lost = other.accuracies - self.accuracies
        error = float(lost.std()) / math.sqrt(len(lost)) if len(lost) > 1 else math.inf
        return float(lost.mean()) <= 2 * error


@torch.no_grad()
def window_scores(model: nn.Module, windows: Windows) -> Scores:
    """Return how well a causal language model predicts the answers of every window."""
    losses, accuracies = [], []
    for part in windows.split(max(1, _TOKENS // 2 // windows.length)):
        logits = model(part.ids.to(_device(model)), use_cache=False).logits
        for row, answers in zip(logits, part.answers.to(logits.device), strict=True):
            due = answers != IGNORED
            row, answers = row[due].float(), answers[due]
            losses.append(nn.functional.cross_entropy(row, answers).double().cpu())
            accuracies.append((row.argmax(-1) == answers).double().mean().cpu())
    return Scores(torch.stack(losses), torch.stack(accuracies))


def _check(layer: Layer, read: float, calls: Sequence[Call]) -> None:
    """Compare the energy of outputs that was computed from arguments with that of a scan."""
    energy = 0.0
    for call in calls:
        y = call.outputs().double()
        energy += float((call.recurrence.weights(y) * y).square().sum())
    half = calls[0].recurrence.values.dtype.itemsize < 4
    if not abs(read - energy) <= (_HALF_AGREEMENT if half else _AGREEMENT) * energy + 1e-12:
        raise ValueError(
            f"{layer.path}: the scan must apply the recurrence that its arguments describe; got "
            f"outputs of energy {energy:.6g} in place of {read:.6g}."
        )


def _run(model: nn.Module, windows: Tensor, first: int = 0) -> Iterator[int]:
    """Run a model over windows without a cache, and yield how many are done.

    Args:
        model: the model.
        windows: token ids, (count, length).
        first: number of windows in the first pass, if it is to be smaller than the others.
    """
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    done = 0
    rest = windows[first:].split(max(1, _TOKENS // windows.shape[1]))
    for part in (windows[:first], *rest):
        if not len(part):
            continue
        model(part.to(_device(model)), **options)
        done += len(part)
        yield done


@contextmanager
def _calling(layers: Sequence[Layer], read: Callable[..., None]) -> Iterator[None]:
    """Call `read(layer, calls, args, kwargs, output)` after every call of the layers."""
    running: dict[str, tuple[ExitStack, list[Call]]] = {}

    def enter(layer: Layer, module: nn.Module, args: Any, kwargs: Any) -> None:
        calls: list[Call] = []
        stack = ExitStack()
        watch: AbstractContextManager[object] = layer.family.watch(
            module, _inputs(args, kwargs), calls.append
        )
        stack.enter_context(watch)
        running[layer.path] = stack, calls

    def leave(layer: Layer, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        stack, calls = running.pop(layer.path)
        stack.close()
        if output is not None:  # the layer raised no exception
            read(layer, calls, args, kwargs, output)

    with ExitStack() as hooks:
        for layer in layers:
            before = layer.module.register_forward_pre_hook(partial(enter, layer), with_kwargs=True)
            after = layer.module.register_forward_hook(
                partial(leave, layer), with_kwargs=True, always_call=True
            )
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        try:
            yield
        finally:
            for stack, _ in running.values():
                stack.close()


def _inputs(args: Any, kwargs: Any) -> Tensor:
    found: Tensor = args[0] if args else next(iter(kwargs.values()))
    return found


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple | list) else output
    return found


def _energy(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares over rows and time of keys or queries, (groups, n)."""
    sums = [x.double().square().sum((0, 2)) for x in parts]
    return torch.cat(sums).cpu()


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
