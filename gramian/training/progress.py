"""Show the progress of `train` and `sweep`. Their argument `progress` has the same meaning."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

__all__ = ["Lines", "Progress", "StepCallback"]

Progress = bool | Callable[[float, int], None]
"""Whether to show progress on standard error, or a function called as `progress(done, total)`."""

SILENCE = 30.0
"""Largest number of seconds between two lines."""


class Lines:
    """A function that prints progress on standard error, one line for every finished part.

    A call also prints a line if the last line is at least 30 seconds old.

    Args:
        what: name of the parts, such as `"runs"`.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._done = -1
        self._told = -math.inf

    def __call__(self, done: float, total: int) -> None:
        """Print how many of `total` parts are done, unless the call comes too soon."""
        now = time.monotonic()
        whole = math.floor(done)
        if whole == self._done and now - self._told < SILENCE:
            return
        self._done, self._told = whole, now
        shown = f"{whole} of {total} {self.what} done"
        if done > whole:
            shown += f", {done - whole:.0%} of the work of one more"
        print(f"gramian: {shown}", file=sys.stderr, flush=True)


class StepCallback(TrainerCallback):
    """A callback that calls a function with the number of steps done and the number of all steps.

    The function is called at the start of training and after every step, in the main process only.
    """

    def __init__(self, progress: Callable[[float, int], None]) -> None:
        self.progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell(state)

    def _tell(self, state: Any) -> None:
        if state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps)
