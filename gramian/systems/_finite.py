"""The base class of systems that have a fixed number of steps and refuse to take more."""

from __future__ import annotations

import abc
import dataclasses

from gramian.systems._state import StateT
from gramian.systems._system import System

__all__ = ["FiniteSystem"]


@dataclasses.dataclass(frozen=True, eq=False)
class FiniteSystem(System[StateT]):
    """A system of L steps. Its state counts the steps that have been taken."""

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Return L, the number of steps."""

    def check_steps(self, start: int, length: int) -> None:
        """Raise a ValueError if the system has fewer than `length` steps from step `start` on."""
        if start + length > self.length:
            taken = f" of which {start} are taken" if start else ""
            raise ValueError(
                f"this {self._kind} has {self.length} steps{taken}; {length} were asked for."
            )

    def _parted(self, length: int | None, at: int | None) -> tuple[int, int]:
        """Check a horizon and the position that splits it into past and future, and return both.

        Args:
            length: The horizon, by default L.
            at: The first step of the future, 1 … length - 1; by default `length // 2`.
        """
        length = self.length if length is None else length
        self.check_steps(0, length)
        at = length // 2 if at is None else at
        if not 0 < at < length:
            raise ValueError(f"`at` must lie in 1 … {length - 1} for length {length}; got {at}.")
        return length, at

    def _check_form(self, form: str | None, only: str) -> None:
        if form not in (None, only):
            raise ValueError(f'a {self._kind} has the recurrence form "{only}" only; got {form!r}.')
