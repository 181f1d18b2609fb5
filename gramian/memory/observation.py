"""Observe forward passes, to compute the operators that mixers apply to their inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from gramian.mixers import Mixer, Segments
from gramian.systems import System

__all__ = ["Observer", "some"]


class Observer:
    """An observer that keeps the inputs of mixers, to compute losses on the mixers' operators.

        observer = Observer(model, LinearRecurrence)
        …
        loss = model(ids, labels=ids).loss + 1e-3 * gate_regularizer(observer.operators())

    The inputs of the last forward pass, with their autograd graph, are kept until the next pass.
    `operators` and `sequences` make the operators from these inputs, and so compute projections,
    short convolutions and gates once more. They read parameters outside of `forward`, so an
    observer does not work for sharded models.

    Args:
        model: A mixer, or a module that contains mixers.
        kind: Class of the mixers to observe. By default, all mixers are observed.
        layers: Numbers of the mixers to observe, counted from 0 over all mixers of the model. In a
            language model, these are the numbers of its layers. By default, the mixers of all
            layers are observed.

    Raises:
        ValueError: if the model has no such mixer, or if `layers` is empty or has a number whose
            mixer does not exist or is of another class.
    """

    def __init__(
        self, model: nn.Module, kind: type = Mixer, *, layers: Sequence[int] | None = None
    ) -> None:
        mixers = [
            (path, module)
            for path, module in model.named_modules()
            if isinstance(module, Mixer) and module.core is module
        ]
        right = [isinstance(module, kind) for _, module in mixers]
        if not any(right):
            raise ValueError(f"{type(model).__name__} has no {kind.__name__} to observe.")
        accepted = [index for index, fits in enumerate(right) if fits]
        wrong = [index for index in layers or () if index not in accepted]
        if wrong or (layers is not None and not layers):
            numbers = ", ".join(map(str, accepted))
            raise ValueError(
                f"layers must be numbers of layers with a {kind.__name__}, of which "
                f"{type(model).__name__} has {numbers}; got {list(layers or ())}."
            )
        self.mixers = dict(mixers[index] for index in sorted(set(layers or accepted)))
        self._read: dict[str, tuple[Tensor, Segments | None]] = {}
        self._hooks = [model.register_forward_pre_hook(self._begin)]
        for path, mixer in self.mixers.items():
            hook = mixer.register_forward_pre_hook(partial(self._keep, path), with_kwargs=True)
            self._hooks.append(hook)

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._read.clear()

    def _keep(self, path: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["x"]
        mask = args[2] if len(args) > 2 else kwargs.get("mask")
        self._read[path] = x, Segments.of(mask)

    def inputs(self) -> dict[str, tuple[Tensor, Segments | None]]:
        """Return a mapping from the path of every mixer that ran to its input.

        An input is a pair: a tensor (batch, length, width), and the positions of its tokens, which
        are None if there is no padding.
        """
        return dict(self._read)

    def operators(
        self, *, sequences: int | None = None, channels: int | None = None
    ) -> list[System]:
        """Return `mixer.operator(x)` for every mixer that ran in the last forward pass.

        Here x is the input of the mixer in that pass. Padding is skipped, as in the pass. With
        packed rows a mixer has several operators, each of them for sequences of similar length.

        Args:
            sequences: Maximal number of sequences of an operator. If there are more, the first are
                used. By default, all are used.
            channels: Maximal number of heads or channels of a layer. If there are more, every n-th
                is used, beginning at random. By default, all are used.

        Raises:
            RuntimeError: if no mixer has run since the observer was created.
            ValueError: if a number is below 1, or if a mixer is not causal.
        """
        found: list[System] = []
        for mixer, x, segments, chosen in self._observed(sequences, channels):
            for part, real in _unpacked(x, segments):
                real = None if real is None else real[:sequences]
                found.append(mixer.operator(part[:sequences], chosen, real))
        return found

    def sequences(
        self, *, sequences: int | None = None, channels: int | None = None
    ) -> list[tuple[System, int, int]]:
        """Return the operators on sequences without padding, in batches of equal length.

        Args:
            sequences: Maximal number of sequences to use from a pass. If there are more, the first
                are used. By default, all are used.
            channels: As for `operators`.

        Returns:
            For every mixer that ran, and for every length of a sequence: the operator, the length,
            and the number of sequences of that length.

        Raises:
            RuntimeError: if no mixer has run since the observer was created.
            ValueError: if a number is below 1, or if a mixer is not causal.
        """
        found = []
        for mixer, x, segments, chosen in self._observed(sequences, channels):
            for alone in _alone(x, segments, sequences):
                count, length = alone.shape[:2]
                found.append((mixer.operator(alone, chosen), length, count))
        return found

    def _observed(
        self, sequences: int | None, channels: int | None
    ) -> Iterator[tuple[Mixer, Tensor, Segments | None, slice]]:
        """Yield each mixer that ran, its input, its segments, and the channels to use."""
        for name, number in (("sequences", sequences), ("channels", channels)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1 or None; got {number}.")
        if not self._read:
            raise RuntimeError(
                "no mixer has run: call the model first, with use_cache=False if it generates."
            )
        for path, (x, segments) in self._read.items():
            mixer = self.mixers[path]
            yield mixer, x, segments, some(mixer.channels, channels)

    def close(self) -> None:
        """Stop observing, and drop the inputs."""
        for hook in self._hooks:
            hook.remove()
        self._read.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _unpacked(x: Tensor, segments: Segments | None) -> list[tuple[Tensor, Tensor | None]]:
    """Return batches whose rows are one sequence each, with the masks of their tokens."""
    if segments is None or not segments.packed:
        return [(x, None if segments is None else segments.real)]
    return [(part.take(x), part.real) for part in segments.parts]


def _alone(x: Tensor, segments: Segments | None, count: int | None) -> list[Tensor]:
    """Return the first `count` sequences, one batch (sequences, length, width) for each length."""
    if segments is None:
        return [x[:count]]
    tokens, begins, lengths = (part.to(x.device) for part in segments.sequences())
    begins, lengths = begins[:count], lengths[:count]
    found = []
    for length in sorted(set(lengths.tolist())):
        columns = begins[lengths == length, None] + torch.arange(length, device=x.device)
        found.append(x.flatten(0, 1)[tokens[columns]])
    return found


def some(count: int, at_most: int | None) -> slice:
    """Choose at most so many of `count` channels: every n-th, beginning at random."""
    step = 1 if at_most is None else math.ceil(count / at_most)
    first = int(torch.randint(step, ())) if step > 1 else 0
    return slice(first, None, step)
