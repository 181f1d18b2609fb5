"""Define what can take the place of attention heads: kinds of replacements, by name.

A kind is one class in one file of this package. It computes the outputs of replaced heads from the
queries, keys and values that they would have attended with, and says how large its state is.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from gramian._nearest import unknown
from gramian._registry import registering

__all__ = ["KINDS", "Fitted", "Replacement", "kind_of", "register", "window_words"]

KINDS: dict[str, type[Replacement]] = {}
"""The registered kinds of replacements by name."""

_Kind = TypeVar("_Kind", bound="type[Replacement]")


def register(name: str) -> Callable[[_Kind], _Kind]:
    """Return a class decorator that registers a kind of replacement.

    Raises:
        ValueError: if another class is registered under that name.
    """
    return registering(KINDS, name, "kind", "kind of replacement")


def kind_of(name: str) -> type[Replacement]:
    """Return the class of a kind.

    Raises:
        ValueError: if no class is registered under that name.
    """
    if name not in KINDS:
        raise ValueError(unknown("kind of replacement", name, KINDS))
    return KINDS[name]


@dataclass(frozen=True)
class Fitted:
    """What fitting replacements to a model's layers found.

    Attributes:
        parameters: the parameters of all layers by name, each path followed by a slash and a name.
        errors: relative error of the output of each head on text that was not fitted, (H), by path.
        state_bytes: bytes of what each layer stores beside the tokens in its window, by path.
        refused: why other layers cannot have a replacement of this kind, by path.
    """

    parameters: Mapping[str, Tensor]
    errors: Mapping[str, tuple[float, ...]]
    state_bytes: Mapping[str, int]
    refused: Mapping[str, str]


class Replacement(abc.ABC):
    """What computes the outputs of replaced heads, from a memory of fixed size.

    Args:
        window: Number w of the last tokens that a replaced head sees, its own included.
        sinks: Number of the first tokens that it sees, too.
        state: Number n of states of a recurrence.
        parameters: What `fit` found.
    """

    kind: ClassVar[str]
    """The name of the kind."""

    criterion: ClassVar[str]
    """The criterion by which layers are chosen for it by default."""

    fitted: ClassVar[bool] = False
    """Whether it has parameters, which `fit` finds."""

    def __init__(
        self, window: int, sinks: int, state: int, parameters: Mapping[str, Tensor]
    ) -> None:
        self.window = window
        self.sinks = sinks
        self.state = state
        self.parameters = parameters

    @property
    def tokens(self) -> int:
        """The number of tokens whose keys and values are stored."""
        return self.window + self.sinks

    @abc.abstractmethod
    def applied(
        self, model: nn.Module, heads: Mapping[str, Sequence[int] | None]
    ) -> AbstractContextManager[None]:
        """Return a context in which some heads of a model are replaced.

        Args:
            model: The model.
            heads: The replaced heads of every layer by its path; None for all heads of the layer.
        """

    @abc.abstractmethod
    def description(self) -> str:
        """Return what replaced heads do, as the predicate of a sentence."""

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        rows: Tensor,
        paths: Sequence[str],
        *,
        window: int,
        sinks: int,
        state: int,
        steps: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Fitted:
        """Fit replacements to the attention of layers on a text; a window has nothing to fit.

        Args:
            model: The model, whose weights are not changed.
            rows: Tokens, (sequences, length). Some sequences are kept for measuring errors.
            paths: The paths of the layers.
            window: Number of the last tokens that replaced heads see.
            sinks: Number of the first tokens that they see, too.
            state: Number n of states.
            steps: Number of steps of the optimizer for each layer.
            seed: Seed of the random choices.
            progress: A function that is called as `progress(done, total)` with numbers of layers.
        """
        return Fitted({}, {}, {}, {})


def window_words(window: int, sinks: int) -> str:
    """Return the words for the tokens that a window holds."""
    last = "the last token" if window == 1 else f"the last {window} tokens"
    return last + (f" and the first {sinks}" if sinks else "")
