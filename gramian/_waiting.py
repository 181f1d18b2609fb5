"""Let threads that wait for others give up their processor soon.

An operation that several threads share ends when the last of them has finished. GNU OpenMP lets the
others wait in a loop of 300,000 rounds before they sleep. If other processes use the processors,
the last thread then waits for a processor on which another one waits for it, at every operation.
"""

from __future__ import annotations

import os
import sys

__all__ = ["wait_briefly"]

_ROUNDS = "1000"
"""Rounds of the loop. GNU OpenMP itself takes 1,000 where it has more threads than processors."""

_CHOSEN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


def wait_briefly() -> None:
    """Limit how long OpenMP's threads wait in a loop, unless the user has chosen it.

    OpenMP reads the limit when PyTorch is imported, so this changes nothing later.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in _CHOSEN):
        os.environ["GOMP_SPINCOUNT"] = _ROUNDS
