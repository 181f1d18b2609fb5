"""What systems of a number of steps share: when all are taken, there are no more."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

from gramian.systems._system import System

__all__ = ["FiniteSystem"]


@dataclasses.dataclass(frozen=True, eq=False)
class FiniteSystem(System):
    """A system of L steps, which its states count."""

    _kind: ClassVar[str]
    """What messages call it."""

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """L, the number of steps."""

    def _check_steps(self, start: int, length: int) -> None:
        """Raise a ValueError unless there are ``length`` steps from ``start`` on."""
        if start + length > self.length:
            taken = f" of which {start} are taken" if start else ""
            raise ValueError(
                f"this {self._kind} has {self.length} steps{taken}; {length} were asked for."
            )

    def _parted(self, length: int | None, at: int | None) -> tuple[int, int]:
        """A horizon, by default L, and where past and future part, by default in its middle."""
        length = self.length if length is None else length
        self._check_steps(0, length)
        at = length // 2 if at is None else at
        if not 0 < at < length:
            raise ValueError(f"`at` must lie in 1 … {length - 1} for length {length}, got {at}.")
        return length, at

    def _check_form(self, form: str | None, only: str) -> None:
        if form not in (None, only):
            raise ValueError(f'a {self._kind} has the recurrence form "{only}" only, got {form!r}.')
