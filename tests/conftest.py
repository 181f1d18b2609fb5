"""What every test shares."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from tests.covering import covering

# For the processes that the tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Kernels run on the CPU, in Triton's interpreter, which has to be chosen before Triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_sessionstart() -> None:
    """Leave the garbage collector off while modules are imported, which leaves little garbage."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()


FIRST = ("export", "docs", "shrinking", "training")
"""The folders with the files that take longest, though they have few tests."""


def pytest_configure(config: pytest.Config) -> None:
    """Keep the order of the files, which pytest-xdist would sort by their numbers of tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no worker is left with it at the end."""
    items.sort(key=lambda item: item.path.parent.name not in FIRST)
    for mark, strength in {"each": 1, "pairs": 2}.items():
        grids: dict[str, list[pytest.Function]] = {}
        for item in items:
            if item.get_closest_marker(mark) and not item.get_closest_marker("slow"):
                assert isinstance(item, pytest.Function)
                grids.setdefault(item.nodeid.partition("[")[0], []).append(item)
        for grid in grids.values():
            keep(grid, strength)


def keep(grid: list[pytest.Function], strength: int) -> None:
    """Mark the tests of a grid as slow, but for some that have every option or pair of options."""
    # The same object is given to every test of an option.
    rows = [[id(option) for option in item.callspec.params.values()] for item in grid]
    kept = covering(rows, strength)
    for i in set(range(len(grid))).difference(kept):
        grid[i].add_marker("slow")


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_collect() -> None:
    """Take what lives at a file's start out of the garbage collector's sight.

    Those are a million objects of imported packages and of the tests themselves. A full collection
    walks over all of them in a third of a second, and transformers' `Trainer` asks for one in every
    run.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Keep PyTorch to one thread.

    On tensors as small as the tests' more threads only wait for each other, and every worker has a
    core of its own. What runs on several threads has tests that ask for them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For a test of what runs on several threads."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def simulated() -> torch.device:
    """The simulated device, where PyTorch can have one, which the lowest accepted one cannot."""
    from gramian.testing import simulated_device

    try:
        return simulated_device()
    except RuntimeError as error:
        if "needs a newer PyTorch" not in str(error):
            raise
        pytest.skip(str(error))


class LargestAllocation:
    """Bytes of the largest tensor that an operation allocated inside a ``with`` block, also inside
    of operators that are opaque to PyTorch's dispatch modes.
    """

    bytes = 0

    def __enter__(self) -> LargestAllocation:
        self._profile = torch.autograd.profiler.profile(profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._profile.__exit__(*exception)
        events = self._profile.function_events or []
        self.bytes = max(event.self_cpu_memory_usage for event in events)


@pytest.fixture
def largest_allocation() -> type[LargestAllocation]:
    return LargestAllocation
