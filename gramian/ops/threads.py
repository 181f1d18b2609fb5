"""Parallel execution of tasks that consist of many small tensor operations."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from gramian.ops.processors import adapt_threads

__all__ = ["work"]

Item = TypeVar("Item")
Result = TypeVar("Result")

# With OpenMP, each calling thread has its own limit on the number of threads of an operation.
_OPENMP = torch.backends.openmp.is_available()

_lock = threading.Lock()


def work(function: Callable[[Item], Result], tasks: Sequence[Item], like: Tensor) -> list[Result]:
    """Return the function's results for all tasks, in order, using several threads on a CPU.

    Each thread runs the tensor operations of its tasks single-threaded. The operations are many and
    small, and each would otherwise wake all of PyTorch's threads and wait for them. The threads end
    with the call. If they stayed, the process would have more threads than processors, and OpenMP's
    own threads would then wait less eagerly for each other. Concurrent calls run one after the
    other, because MKL has one number of threads for the whole process.
    """
    adapt_threads()
    threads = torch.get_num_threads()
    workers = min(threads, len(tasks))
    if like.device.type != "cpu" or workers < 2 or not _OPENMP:
        return [function(task) for task in tasks]
    inference = torch.is_inference_mode_enabled()

    def run(task: Item) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return function(task)

    with _lock:
        return _work(run, tasks, workers, threads)


def _work(
    run: Callable[[Item], Result], tasks: Sequence[Item], workers: int, threads: int
) -> list[Result]:
    try:
        with ThreadPoolExecutor(workers, "gramian", lambda: torch.set_num_threads(1)) as executor:
            return list(executor.map(run, tasks))
    finally:
        torch.set_num_threads(threads)  # otherwise threads that start later would inherit 1
