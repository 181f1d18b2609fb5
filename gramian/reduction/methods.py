"""The methods of `gramian.reduce`, and the options of each."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

from torch import Tensor

from gramian._checks import check_choice
from gramian.reduction.balanced import balanced
from gramian.reduction.descent import Descent
from gramian.reduction.gradient import modal_interpolation
from gramian.reduction.modal_truncation import modal_truncation
from gramian.reduction.problem import INITIALIZATIONS, OBJECTIVES, Problem
from gramian.reduction.residues import ModalFit

__all__ = ["METHODS", "Balanced", "Gradient", "Method", "ModalTruncation", "method_of"]


class Method(abc.ABC):
    """A method that finds poles and residues of a given order."""

    name: ClassVar[str]
    """The name that selects the method, with its default options, in `reduce`."""

    @abc.abstractmethod
    def solve(self, problem: Problem, order: Tensor, rows: Tensor) -> ModalFit:
        """Fit the channels `rows` of a problem.

        Args:
            problem: The kernels and the settings.
            order: (len(rows)), integers: the largest order of every fit.
            rows: The indices of the channels.
        """


@dataclasses.dataclass(frozen=True)
class Balanced(Method):
    """Take the poles of a balanced truncation (S. Kung, 1978) and refine them.

    Args:
        refine: Whether to refine the poles by variable projection. Without refinement, the
            reduction has a closed form and takes a fraction of the time.
    """

    name = "balanced"
    refine: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.refine, bool):
            raise ValueError(f"refine must be true or false; got {self.refine!r}.")

    def solve(self, problem: Problem, order: Tensor, rows: Tensor) -> ModalFit:
        return balanced(problem, order, rows)


@dataclasses.dataclass(frozen=True)
class ModalTruncation(Method):
    """Keep the modes with the most energy."""

    name = "modal"

    def solve(self, problem: Problem, order: Tensor, rows: Tensor) -> ModalFit:
        return modal_truncation(problem, order, rows)


@dataclasses.dataclass(frozen=True)
class Gradient(Descent, Method):
    """Optimize poles and residues with Adam (arXiv 2310.18780, section 3.2).

    Args:
        steps: The number of steps, at least 1.
        learning_rate: The learning rate of the first step, above 0.
        objective: "l2", the error over the taps, or "h2", the error of the transfer function on
            roots of unity. None chooses "h2" if the tail counts as silence, and "l2" otherwise.
        initialization: "even" places poles at evenly spaced angles close to the unit circle, and
            "ring" at random places there.
        seed: The seed of the initialization.
        schedule: "cosine" anneals the learning rate to 0, and "constant" keeps it.
        weight_decay: The decoupled weight decay of AdamW, at least 0, of poles and residues.

    Raises:
        ValueError: if an option is out of range.
    """

    name = "gradient"
    objective: str | None = None
    initialization: str = "even"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, accepted in (
            ("objective", (None, *OBJECTIVES)),
            ("initialization", INITIALIZATIONS),
        ):
            check_choice(option, getattr(self, option), accepted)
        if not isinstance(self.seed, int):
            raise ValueError(f"seed must be an integer; got {self.seed!r}.")

    def solve(self, problem: Problem, order: Tensor, rows: Tensor) -> ModalFit:
        return modal_interpolation(problem, order, rows, self)


METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Balanced, ModalTruncation, Gradient)
}
"""The methods by name."""


def method_of(method: str | Method) -> Method:
    """Return `method` unchanged or, if it is a name, the method with its default options.

    Raises:
        ValueError: if no method has the name.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(map(repr, METHODS))} or a "
            f"gramian.reduction.Method; got {method!r}."
        )
    return METHODS[method]()
