"""Read the number of processes, which torchrun and similar launchers set in the environment."""

from __future__ import annotations

import os

__all__ = ["require_one_process", "world_size"]


def world_size() -> int:
    """Return `WORLD_SIZE`, or 1 if it is not set.

    Raises:
        ValueError: if `WORLD_SIZE` is not an integer of at least 1, or if it is above 1 and `RANK`
            is not set.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"WORLD_SIZE in the environment must be at least 1; got {text!r}.")
    if int(text) > 1 and "RANK" not in os.environ:
        raise ValueError(
            f"WORLD_SIZE is {text} in the environment but RANK is not set: start the processes "
            "with torchrun, or unset WORLD_SIZE."
        )
    return int(text)


def require_one_process(reason: str) -> None:
    """Raise a ValueError if this process is one of several.

    Args:
        reason: beginning of the message. It gives the reason for the refusal.

    Raises:
        ValueError: if the environment describes several processes, or is invalid.
    """
    processes = world_size()
    if processes > 1:
        raise ValueError(
            f"{reason}, so it cannot be one of {processes}: start it without torchrun."
        )
