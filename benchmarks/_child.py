"""Run measurements in processes of their own, with limits of memory and time."""

import json
import os
import resource
import subprocess
import sys
from typing import Any

_NO_ROOM = ("can't allocate memory", "MemoryError", "out of memory", "not enough memory", "killed")


def run(command: list[str], what: str, timeout: float | None = None) -> dict[str, Any] | None:
    """Run a script, and return the JSON on its last line, or None if memory or time ran out.

    Any other failure ends this process with a message: `what` and the script's last line.
    """
    try:
        process = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return None
    if process.returncode:
        if process.returncode > 0 and not any(word in process.stderr for word in _NO_ROOM):
            last = (process.stderr.strip().splitlines() or ["killed"])[-1]
            raise SystemExit(f"{what}: {last}")
        return None
    return json.loads(process.stdout.splitlines()[-1])


def bound_memory() -> None:
    """Limit this process to three quarters of the machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_AS, (3 * memory // 4, 3 * memory // 4))


def resident_peak() -> float:
    """Return the largest resident memory that this process has had, in MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
