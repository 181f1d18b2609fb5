"""Base class of systems with a fixed number of steps; stepping past the last is an error."""

from __future__ import annotations

import abc
import dataclasses

from gramian.systems._state import StateT
from gramian.systems._system import System

__all__ = ["FiniteSystem"]


@dataclasses.dataclass(frozen=True, eq=False)
class FiniteSystem(System[StateT]):
    """A system of L steps, which its states count."""

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Return L, the number of steps."""

    def _check_steps(self, start: int, length: int) -> None:
        """Raise a ValueError unless there are `length` steps from `start` on."""
        if start + length > self.length:
            taken = f" of which {start} are taken" if start else ""
            raise ValueError(
                f"this {self._kind} has {self.length} steps{taken}; {length} were asked for."
            )

    def _parted(self, length: int | None, at: int | None) -> tuple[int, int]:
        """Return a horizon (default: L) and where past and future part (default: its middle)."""
        length = self.length if length is None else length
        self._check_steps(0, length)
        at = length // 2 if at is None else at
        if not 0 < at < length:
            raise ValueError(f"`at` must lie in 1 … {length - 1} for length {length}; got {at}.")
        return length, at

    def _check_form(self, form: str | None, only: str) -> None:
        if form not in (None, only):
            raise ValueError(f'a {self._kind} has the recurrence form "{only}" only; got {form!r}.')
