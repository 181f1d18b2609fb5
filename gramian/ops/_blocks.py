"""Blocks of rows that share an operand, cut to stay in cache and worked on by several threads."""

import itertools
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Block = tuple[slice, ...]
Item = TypeVar("Item")
Result = TypeVar("Result")


_WORTHWHILE = 2**20
"""Numbers from which several threads are faster than one: waking them, and waiting in turn for
Python between operations, takes as long as transforming this many."""


class Task(NamedTuple):
    """A block of the shared operand's rows and blocks of rows to which it applies."""

    shared: Block
    blocks: list[Block]


def cut(
    rows: Tensor, shared: Tensor, points: int, cpu_elements: int, cpu_rows: int
) -> tuple[int, list[Task]]:
    """Cuts the rows of a tensor (*S, …) whose operand is `shared` (*S or 1, …).

    On a processor a block has as many rows as `cpu_elements` numbers hold, at `points` a row, and
    at least `cpu_rows`; on other devices it only bounds the memory taken. Neighbours in memory
    fall into one block, so that whole cache lines are used; where they are interleaved (the last
    dimension is not contiguous), `cpu_rows` of them, for more would evict each other. Where there
    are fewer blocks of the operand than would keep the threads busy, several tasks share one.

    Returns:
        The largest number of rows in a block, and the tasks.
    """
    shape, own = rows.shape[:-1], shared.shape[:-1]
    on_cpu = rows.device.type == "cpu"
    wanted = max(cpu_elements // points, cpu_rows) if on_cpu else max(2**27 // points, 1)
    steps = [1] * len(shape)
    most = cpu_rows if on_cpu and rows.stride(-1) != 1 else wanted
    for axis in sorted(range(len(shape)), key=rows.stride):
        steps[axis] = max(min(shape[axis], wanted, most), 1)
        wanted //= steps[axis]
        if steps[axis] > 1:
            most = wanted

    cuts = [
        [slice(start, min(start + step, size)) for start in range(0, size, step)]
        for size, step in zip(shape, steps, strict=True)
    ]
    everything = [slice(None)]
    own_cuts = [c if size != 1 else everything for c, size in zip(cuts, own, strict=True)]
    other_cuts = [c if size == 1 else everything for c, size in zip(cuts, own, strict=True)]
    parts = 1
    if on_cpu:
        parts = math.ceil(2 * torch.get_num_threads() / max(math.prod(map(len, own_cuts)), 1))
    tasks = []
    for outer in itertools.product(*own_cuts):
        blocks = [
            tuple(i if size == 1 else o for i, o, size in zip(inner, outer, own, strict=True))
            for inner in itertools.product(*other_cuts)
        ]
        size = max(math.ceil(len(blocks) / parts), 1)
        tasks += [Task(outer, blocks[i : i + size]) for i in range(0, len(blocks), size)]
    return math.prod(steps), tasks


def work(
    function: Callable[[Item], Result],
    tasks: Sequence[Item],
    like: Tensor,
    numbers: float = math.inf,
) -> list[Result]:
    """The function's results for all tasks, in order; on a processor by several threads, unless all
    of them together transform only a few ``numbers``.

    Each thread runs the tensor operations of its tasks alone: many small operations that each wake
    and await all threads cost more, and on a busy machine many times more.
    """
    threads = torch.get_num_threads()
    alone = min(threads, len(tasks)) == 1 or numbers < _WORTHWHILE or not _OPENMP
    if like.device.type != "cpu" or alone:
        return [function(task) for task in tasks]
    inference = torch.is_inference_mode_enabled()

    def run(task: Item) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return function(task)

    with _pool.lock:
        executor = _pool.of(threads)
        # MKL has one number of threads for the whole process: matrix decompositions of every thread
        # would wake all of them.
        torch.set_num_threads(1)
        try:
            futures = [executor.submit(run, task) for task in tasks]
            return [future.result() for future in futures]
        finally:
            torch.set_num_threads(threads)


# With OpenMP the number of threads that an operation uses belongs to the thread that calls it.
_OPENMP = torch.backends.openmp.is_available()


class _Pool:
    """Threads that run tensor operations single-threaded, started when first needed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._size = 0

    def of(self, threads: int) -> ThreadPoolExecutor:
        if self._executor is None or self._size != threads:
            if self._executor is not None:
                self._executor.shutdown(wait=False)
            started = threading.Barrier(threads + 1)

            def start() -> None:
                torch.set_num_threads(1)
                started.wait()

            self._size = threads
            self._executor = ThreadPoolExecutor(threads, "gramian", initializer=start)
            for _ in range(threads):
                self._executor.submit(int)  # a thread starts with each of the first tasks
            started.wait()
            torch.set_num_threads(threads)  # new threads would inherit 1 otherwise
        return self._executor


_pool = _Pool()


def _renew_pool() -> None:
    """Threads do not survive a fork."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_pool)
