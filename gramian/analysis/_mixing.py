"""Find the modules that mix positions by themselves, and how the operators of each can be read.

While the model runs on a short sequence, every module runs again on changed inputs when it ends.
The modules inside it that mix positions return what they returned before. If a later position of
its result changes, or of what it passes to such an inner module, then the module mixes positions by
itself. A layer of which an earlier position changes looks ahead and is refused. Names of classes,
architectures or functions play no role.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gramian.analysis._keeping import Buffers
from gramian.analysis._responses import ValueMap
from gramian.analysis._tracing import Frame, Key, Replay, Tracer
from gramian.analysis._values import (
    changed_positions,
    copied,
    is_padded_before,
    leaves_of,
    perturbed,
    sequences_in,
    sharing,
    window,
)

__all__ = ["Finder", "Leftover", "NotFinite", "mixing_of", "short_lengths"]

_LENGTHS = (37, 41, 31, 43, 29, 47, 53, 59, 61, 23, 67, 71, 73, 79, 83, 97, 101, 103, 107, 109)
"""Lengths of the short sequence, in the order of preference."""

_SHORTER = (22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7)
"""Lengths for models that read no longer sequences."""

_PADDINGS = (12, 4, 0)
"""Numbers of positions that convolutions may add to the short sequence."""


def short_lengths(model: nn.Module, longest: int) -> list[tuple[int, int]]:
    """Return how many positions the short sequence may have, the best numbers first.

    Each is followed by the number of positions that convolutions may add to it. No parameter has a
    size in between, so that the axis of time of a tensor can be told from its shape. The sequence
    reaches past the dilations of all convolutions, or else of those that reach into a sequence of
    the `longest` length, which is that of the input.
    """
    sizes = {size for tensor in model.parameters() for size in tensor.shape}
    reach = max((_dilation(m) for m in model.modules() if _dilation(m) < longest), default=0)
    least = 3 * reach // 2 + 8  # what changes first is at a sixth of the sequence
    far = range(least, least + 200) if reach > 1 else ()
    fitting = [
        (length, padding)
        for lengths in ((*_LENGTHS, *far), _SHORTER)
        for padding in _PADDINGS
        for length in lengths
        if length >= least
        and not sizes.intersection(range(length, length + padding + 1))
        and not sizes.intersection((2 * length, 3 * length, 4 * length))
    ]
    return fitting or [(max(_LENGTHS[0], least), 0)]


def _dilation(module: nn.Module) -> int:
    """Return the distance between the taps of a convolution over time, or 0."""
    if isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1:
        return module.dilation[0]
    return 0


class NotFinite(ValueError):
    """Raised when a module makes NaN values from inputs without them."""


@dataclass
class Leftover:
    """The mixing of positions that remains in a module when some of its calls are frozen.

    Attributes:
        later: whether later positions respond.
        earlier: whether earlier positions respond.
        keys: the keys of what responds: of frozen calls and children whose arguments respond, or
            ("output", "", 0).
        padded_before: whether further positions of the output come before the sequence.
    """

    later: bool = False
    earlier: bool = False
    keys: list[Key] = field(default_factory=list)
    padded_before: bool = False

    @property
    def mixes(self) -> bool:
        """Return whether any other positions respond."""
        return self.later or self.earlier


def mixing_of(
    tracer: Tracer,
    frame: Frame,
    length: int,
    frozen: dict[Key, Any] | None = None,
    known: dict[Key, Any] | None = None,
    read: Mapping[Key, ValueMap] | None = None,
) -> Leftover:
    """Return how a module mixes positions by itself, with some of its calls frozen.

    The results of frozen calls and of the modules inside it change at the same positions as its
    inputs, so that mixing before and after them is found.

    Args:
        tracer: The tracer that is installed.
        frame: The run of the module.
        length: The number of positions.
        frozen: The calls whose results are given, and these results.
        known: What the module returned and passed to children and frozen calls with its own inputs,
            by their keys; by default, it runs once more to tell.
        read: Where the values of the frozen calls are that the general reader reads.
    """
    generator = torch.Generator().manual_seed(5)
    positions = (length // 6, length // 3)

    longest = length + tracer.padding

    def other(value: Any, padded_before: bool = False) -> Any:
        return perturbed(value, length, longest, positions, generator, padded_before)

    frozen, read = frozen or {}, read or {}
    operations = any(key[0] == "operation" for key in frozen)
    if known is None:
        known = Replay(tracer, frame, length, frozen, operations=operations).run().answers()
    changed_frozen: dict[Key, Any] = {}
    for key, result in frozen.items():
        padded_before = key in read and read[key].padded_before
        changed_frozen[key] = other(result, padded_before)
        if key in read and read[key].integers:
            changed_frozen[key] = _other_integers(result, read[key], length, positions, generator)
    found = Leftover()

    def compare(key: Key, two: Any) -> None:
        if key not in known:
            return
        one = known[key]
        output = key[0] == "output"
        changed, padded_before = _changes(one, two, length, longest, positions, output)
        found.padded_before |= padded_before
        if key in read and read[key].integers:
            rows = [
                window(leaves_of(x)[read[key].leaf], read[key].axis, length, padded_before=True)
                for x in (one, two)
            ]
            changed |= changed_positions(*rows)
        changed -= set(positions)
        if changed:
            found.keys.append(key)
            found.later |= max(changed) > positions[0]
            found.earlier |= min(changed) < positions[0]

    # What children are given is compared when they are called, and their results are changed then,
    # so that neither is held for all layers of a model.
    after = Replay(
        tracer,
        frame,
        length,
        changed_frozen,
        operations=operations,
        vary=lambda child, result: other(result, child in frame.padded_before),
        watch=compare,
    )
    after.run(other(frame.inputs, padded_before=True))
    for key, two in after.answers().items():
        compare(key, two)
    return found


def _changes(
    one: Any, other: Any, length: int, longest: int, positions: Sequence[int], output: bool
) -> tuple[set[int], bool]:
    """Return where sequences in two nested values differ, and if one of them is padded before.

    The values are an output after changes at some positions, or arguments.
    """
    others = leaves_of(other)
    changed: set[int] = set()
    padded = False
    for index, x, axis in sequences_in(one, length, longest):
        y = others[index] if index < len(others) else None
        if isinstance(y, Tensor) and y.shape == x.shape:
            before = not output or is_padded_before(x, y, axis, length, positions[0])
            padded |= before and output
            rows = (window(values, axis, length, before) for values in (x, y))
            changed |= changed_positions(*rows)
    return changed, padded


def _other_integers(
    result: Any,
    found: ValueMap,
    length: int,
    positions: Sequence[int],
    generator: torch.Generator,
) -> Any:
    """Return a result with other integers at some positions of the sequence that was moved."""
    size = leaves_of(result)[found.result].shape[found.result_axis]
    first = size - length if found.padded_before else 0
    return perturbed(result, size, size, [first + at for at in positions], generator)


class Finder:
    """The search for the modules that mix positions, during one run on a short sequence.

    Args:
        tracer: The tracer of the model.
        length: The number of positions of the short sequence.
        visit: A function that is called with the frame of every module that mixes positions by
            itself, and with how it does, right after it has run.
        whole: A function that returns whether a module is read as a whole, whatever is inside it.
        shared: A function that returns whether a module mixes positions by itself just as one
            before it, so that it need not be examined.
        quick: Whether modules that are like one that mixes no positions are never examined.

    Attributes:
        notes: for every module that could not be tested, its path and the reason.
    """

    def __init__(
        self,
        tracer: Tracer,
        length: int,
        visit: Callable[[Frame, Leftover], None],
        whole: Callable[[nn.Module], bool],
        shared: Callable[[Frame], bool],
        quick: bool = False,
    ) -> None:
        self.tracer, self.length, self.visit, self.whole = tracer, length, visit, whole
        self.shared, self.quick = shared, quick
        self._alike: set[Any] = set()  # what modules are like that mix no positions
        self.notes: dict[str, str] = {}
        self._frames: list[Frame] = []
        self._mixes: dict[int, bool] = {}
        self._padded_before: set[nn.Module] = set()
        self._inside = 0  # the number of running modules that are read as a whole

    def take_as_mixing(self, module: nn.Module) -> None:
        """Take a module for one that mixes positions and is known, so that it is not examined."""
        self._mixes[id(module)] = True

    @contextmanager
    def finding(self) -> Iterator[None]:
        """Search during the forward pass of the model within this context."""
        with self.tracer.installed(self._enter, self._leave):
            try:
                yield
            finally:
                self._frames.clear()
                self._inside = 0
                self.tracer.stack.clear()

    def _enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._inside or self.whole(module):
            self._inside += 1
        random = torch.get_rng_state()
        frame = Frame(path, module, copied((args, kwargs)), random, Buffers(module))
        self._frames.append(frame)

    def _leave(self, path: str, module: nn.Module, output: Any) -> None:
        frame = self._frames.pop()
        self._inside -= bool(self._inside)
        if self._inside:
            return
        if id(module) not in self._mixes:
            if self._frames and self._is_like_others(frame):
                frame.output = copied(output)
                self._frames[-1].skipped.append((frame, frame.output))
            else:
                self._mixes[id(module)] = self._examined(frame, output)
        if self._mixes.get(id(module), False) and self._frames:
            outer = self._frames[-1]
            # A layer is often given what the last one returned, and the same masks as the last one.
            before = [outer.children[-1][1], outer.given[-1]] if outer.children else []
            outer.given.append(sharing(frame.inputs, before))
            outer.children.append((module, sharing(copied(output), [outer.given[-1]])))
            outer.padded_before |= self._padded_before & {module}

    def _is_like_others(self, frame: Frame) -> bool:
        """Return whether a module is like one that mixes no positions."""
        if frame.children or self.whole(frame.module):
            return False
        return _likeness(frame) in self._alike

    def _examined(self, frame: Frame, output: Any) -> bool:
        """Return whether a module mixes positions, and visit it if it does by itself.

        If it does, or cannot be tested, the modules inside it that were skipped are examined first.
        """
        frame.output = output
        skipped, frame.skipped = frame.skipped, []
        if self.quick:
            return self._quickly_examined(frame, output, skipped)
        found = self._examine(frame, output)
        if found is not None and found.mixes and not self.whole(frame.module):
            if self.shared(frame):
                return True
            found = self._confirmed(frame, found)
        if (found is None or found.mixes) and skipped:
            mixing = [inner for inner, result in skipped if self._late(inner, result)]
            frame.children += [(inner.module, inner.output) for inner in mixing]
            frame.given += [inner.inputs for inner in mixing]
            if mixing:
                found = self._confirmed(frame, self._examine(frame, output))
        if found is not None and found.mixes:
            self.visit(frame, found)
            return True
        if found is not None and not frame.children:
            self._alike.add(_likeness(frame))
        return bool(frame.children)

    def _quickly_examined(
        self, frame: Frame, output: Any, skipped: list[tuple[Frame, Any]]
    ) -> bool:
        """Return whether a module mixes positions, without running those that were skipped."""
        still = [(inner.module, result) for inner, result in skipped]
        given = [inner.inputs for inner, _ in skipped]
        some = replace(frame, children=frame.children + still, given=frame.given + given)
        found = self._examine(some, output)
        if found is not None and found.mixes and not self.whole(frame.module):
            found = self._confirmed(frame, found)  # they may treat the positions in another order
        if found is not None and found.mixes:
            self.visit(frame, found)
        elif found is not None and not frame.children:
            self._alike.add(_likeness(frame))
        return bool(frame.children) or (found is not None and found.mixes)

    def _late(self, frame: Frame, output: Any) -> bool:
        """Return whether a module that was skipped mixes positions."""
        if id(frame.module) not in self._mixes:
            self._mixes[id(frame.module)] = self._examined(frame, output)
        return self._mixes[id(frame.module)]

    def _examine(self, frame: Frame, output: Any) -> Leftover | None:
        """Return how a module mixes positions by itself, or None if this cannot be told."""
        if self.whole(frame.module):
            return Leftover(later=True)
        if _has_nan(output) and not _has_nan(frame.inputs):
            name = frame.path or type(frame.module).__name__
            raise NotFinite(f"{name}: an operator to be measured must be finite; got NaN values.")
        found = self._tested(frame, frame.answers())
        if found is not None and found.padded_before:
            self._padded_before.add(frame.module)
        return found

    def _tested(self, frame: Frame, known: dict[Key, Any] | None) -> Leftover | None:
        try:
            return mixing_of(self.tracer, frame, self.length, known=known)
        except Exception as error:  # whatever a module of others raises
            if any(sequences_in(frame.inputs, self.length)):
                self.notes[frame.path] = f"it cannot be run alone: {type(error).__name__}."
            return None

    def _confirmed(self, frame: Frame, found: Leftover | None) -> Leftover | None:
        """Return how a module mixes positions if it runs twice, without what others add to it."""
        if found is None or not found.mixes or self.whole(frame.module):
            return found
        return self._tested(frame, None)


def _likeness(frame: Frame) -> Any:
    """Return what modules and their inputs have in common if the modules compute the same."""
    sizes = [tensor.shape for tensor in frame.module.state_dict().values()]
    given = [getattr(x, "shape", None) for x in leaves_of(frame.inputs)]
    return plain_parts(frame.module), tuple(sizes), tuple(given)


def plain_parts(module: nn.Module) -> tuple[Any, ...]:
    """Return the classes and the plain values of a module and of all modules inside it."""
    return tuple(
        (path, type(part), tuple((k, v) for k, v in vars(part).items() if _is_plain(v)))
        for path, part in module.named_modules()
    )


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _has_nan(value: Any) -> bool:
    """Return whether a floating-point tensor in nested values has NaN entries."""
    return any(
        isinstance(x, Tensor) and x.is_floating_point() and bool(x.isnan().any())
        for x in leaves_of(value)
    )
