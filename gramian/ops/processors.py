"""Leave the processors that other processes use to them.

PyTorch divides most operations among as many threads as there are processors, and an operation ends
with the last thread. If another process takes a processor from one of them, all others wait, at
every operation, and fewer threads are faster.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch

__all__ = ["adapt_threads", "adaptive_threads"]

_STATISTICS = Path("/proc/stat")
_GROUPS = Path("/proc/self/cgroup")
_CONTROL = Path("/sys/fs/cgroup")

_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")

_INTERVAL = 0.25
"""The shortest time between two measurements, in seconds."""


@contextmanager
def adaptive_threads() -> Iterator[None]:
    """Let the number of PyTorch's threads follow the number of processors that are free.

    While other processes use one of two processors, the calling thread then computes with one
    thread instead of two. Gramian's operators, models and parallel tasks measure at most four times
    a second how much time other processes take of the processors that this process may use, and
    change the number of threads. It never exceeds the number at the beginning, which is restored at
    the end, nor the time of processors that a container may use (`docker run --cpus`). Processes
    that this one has started, such as the workers of a data loader, count as others, and are not in
    the block, even if they are made by `os.fork`. Kernels that `torch.compile` has made keep the
    number of threads they were made for. Threads that start within the block begin with the number
    of that moment, and keep it.

    The order of sums depends on the number of threads, so results may differ between runs by
    rounding errors. On systems other than Linux nothing changes. The same is true inside another
    such block, while another thread is in one, and if the environment binds each thread of OpenMP
    to processors of its own (`OMP_PROC_BIND`, for example).
    """
    global _meter
    meter = None
    with _lock, suppress(OSError):  # no statistics, or none that this process may read
        if _meter is None and _can_adapt():
            meter = _meter = _Meter()
    if meter is None:
        yield
        return
    try:
        yield
    finally:
        if _meter is meter:  # not in a copy of the process, which is outside
            _meter = None
        torch.set_num_threads(meter.most)


def adapt_threads() -> None:
    """Change the number of threads, in a thread that is in `adaptive_threads`, if it is time.

    Long computations call this between operations.
    """
    if torch.compiler.is_compiling():
        return
    meter = _meter  # another thread may leave the block at any time
    if meter is not None:
        meter.update()


def _can_adapt() -> bool:
    """Return whether there are statistics, and OpenMP does not bind this thread to a processor."""
    bound = (os.environ.get(name, "").lower() for name in _BINDING)
    return _STATISTICS.exists() and all(value in ("", "false", "none") for value in bound)


class _Moment(NamedTuple):
    """A measurement.

    Attributes:
        time: When it was made, in seconds.
        processors: The number of processors that the calling thread may use.
        quota: How many processors' time the control groups of this process may use, or infinity.
        busy: How long each of them has been busy since the system started, in seconds.
        own: How long this process has used processors, in seconds.
    """

    time: float
    processors: int
    quota: float
    busy: dict[str, float]
    own: float


class _Meter:
    """Measures how many processors other processes use, and sets the number of threads.

    Attributes:
        most: The largest number of threads.
    """

    def __init__(self) -> None:
        self.most = torch.get_num_threads()
        self._owner = threading.get_ident()
        self._limits = _limits()
        self._last = _read(self._limits)
        self._wanted = self.most

    def update(self) -> None:
        last = self._last
        if time.monotonic() - last.time < _INTERVAL or threading.get_ident() != self._owner:
            return
        try:
            self._last = now = _read(self._limits)
        except OSError:  # too many files are open, for example
            return
        # Processors may have been taken from this process, or given to it, since the last time.
        busy = sum(now.busy[name] - last.busy[name] for name in now.busy.keys() & last.busy.keys())
        others = (busy - (now.own - last.own)) / (now.time - last.time)
        # Past a quota, all threads wait for the rest of a period. So part of a processor is none.
        free = min(now.processors - others, math.floor(min(now.quota, self.most)))
        before, self._wanted = self._wanted, self._threads(free)
        threads = torch.get_num_threads()
        # More threads are taken only if two measurements agree.
        chosen = min(self._wanted, max(before, threads))
        if chosen != threads:
            torch.set_num_threads(chosen)

    def _threads(self, free: float) -> int:
        """Return how many threads suit, if so many processors are free."""
        return max(1, min(self.most, int(free + 0.5)))


def _limits() -> list[Path]:
    """Return the files that limit the time of this process, in the hierarchy of control groups.

    They are those of the process's group and of all groups around it. Inside a container, the file
    may name a group whose folder is outside.
    """
    found = []
    with suppress(OSError, ValueError):
        for line in _GROUPS.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            root = _CONTROL / controllers
            name = "cpu.cfs_quota_us" if controllers else "cpu.max"  # versions 1 and 2
            group = PurePosixPath(path.lstrip("/"))
            found += [root / place / name for place in (group, *group.parents)]
    return [file for file in dict.fromkeys(found) if file.is_file()]


def _quota(files: Iterable[Path]) -> float:
    """Return how many processors' time the limits in the files allow, or infinity."""
    smallest = math.inf
    for file in files:
        with suppress(OSError, ValueError):
            words = file.read_text(encoding="utf-8").split()
            if len(words) == 1:  # version 1
                words.append(file.with_name("cpu.cfs_period_us").read_text(encoding="utf-8"))
            if words[0] not in ("max", "-1"):
                smallest = min(smallest, int(words[0]) / int(words[1]))
    return smallest


def _read(limits: Iterable[Path] = ()) -> _Moment:
    processors = os.sched_getaffinity(0)
    ticks = os.sysconf("SC_CLK_TCK")
    busy = {}
    names = {f"cpu{number}" for number in processors}
    for line in _STATISTICS.read_text(encoding="utf-8").splitlines():
        name, _, fields = line.partition(" ")
        if name in names:
            # user, nice, system, idle, waiting for disks, interrupts of two kinds, stolen
            times = [int(field) for field in fields.split()[:8]]
            busy[name] = (sum(times) - sum(times[3:5])) / ticks
    return _Moment(time.monotonic(), len(processors), _quota(limits), busy, time.process_time())


_lock = threading.Lock()
_meter: _Meter | None = None


def _leave() -> None:
    """Leave the block in a copy of the process, whose own time and number of threads differ."""
    global _lock, _meter
    _lock, _meter = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave)
