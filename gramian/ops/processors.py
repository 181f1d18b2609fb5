"""Leave the processors that other processes use to them.

PyTorch divides most operations among as many threads as there are processors, and an operation ends
with the last thread. If another process takes a processor from one of them, all others wait, at
every operation, and fewer threads are faster.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["adapt_threads", "adaptive_threads"]

_STATISTICS = Path("/proc/stat")

_INTERVAL = 0.25
"""The shortest time between two measurements, in seconds."""


@contextmanager
def adaptive_threads() -> Iterator[None]:
    """Let the number of PyTorch's threads follow the number of processors that are free.

    While other processes use one of two processors, the calling thread then computes with one
    thread instead of two. Gramian's operators, models and parallel tasks measure at most four times
    a second how much time other processes take of the processors that this process may use, and
    change the number of threads. It never exceeds the number at the beginning, which is restored at
    the end. Processes that this one has started, such as the workers of a data loader, count as
    others. Kernels that `torch.compile` has made keep the number of threads they were made for.

    The order of sums depends on the number of threads, so results may differ between runs by
    rounding errors. On systems other than Linux nothing changes. The same is true inside another
    such block, and while another thread is in one.
    """
    global _meter
    meter = None
    with _lock:
        if _meter is None and _STATISTICS.exists():
            meter = _meter = _Meter()
    if meter is None:
        yield
        return
    try:
        yield
    finally:
        _meter = None
        torch.set_num_threads(meter.most)


def adapt_threads() -> None:
    """Change the number of threads, in a thread that is in `adaptive_threads`, if it is time.

    Long computations call this between operations.
    """
    if not torch.compiler.is_compiling() and _meter is not None:
        _meter.update()


class _Meter:
    """Measures how many processors other processes use, and sets the number of threads.

    Attributes:
        most: The largest number of threads.
    """

    def __init__(self) -> None:
        self.most = torch.get_num_threads()
        self._owner = threading.get_ident()
        self._processors = sorted(os.sched_getaffinity(0))
        self._ticks = os.sysconf("SC_CLK_TCK")
        self._last = self._read()
        self._wanted = self.most

    def update(self) -> None:
        moment, busy, own = self._last
        if time.monotonic() - moment < _INTERVAL or threading.get_ident() != self._owner:
            return
        self._last = now = self._read()
        others = (now[1] - busy - (now[2] - own)) / (now[0] - moment)
        before, self._wanted = self._wanted, self._threads(others)
        threads = torch.get_num_threads()
        # More threads are taken only if two measurements agree.
        chosen = min(self._wanted, max(before, threads))
        if chosen != threads:
            torch.set_num_threads(chosen)

    def _threads(self, others: float) -> int:
        """Return how many threads suit, if others use so many processors."""
        free = len(self._processors) - others
        return max(1, min(self.most, int(free + 0.5)))

    def _read(self) -> tuple[float, float, float]:
        """Return the time, the processors' busy time, and that of this process, in seconds."""
        busy = 0
        wanted = {f"cpu{number}" for number in self._processors}
        for line in _STATISTICS.read_text().splitlines():
            name, *fields = line.split()
            if name in wanted:
                user, nice, system, _, _, *interrupts = map(int, fields[:8])
                busy += user + nice + system + sum(interrupts)
        return time.monotonic(), busy / self._ticks, time.process_time()


_lock = threading.Lock()
_meter: _Meter | None = None
