"""Run calls as tasks of a Ray cluster, which starts each call when it has the resources.

The machines of the cluster have Gramian installed, and share the file system and the caller's
working directory. Every call has its own process, so that one that dies does not affect the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

__all__ = ["Call", "Lost", "run_calls"]

POLL = 0.5  # seconds between two checks of the calls
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Call(Generic[_Result]):
    """A call of a function, and what it needs.

    Attributes:
        name: name of the task in Ray.
        function: function of a module that the machines of the cluster can import.
        arguments: its arguments.
        threads: number of cores that the call requests, and of threads that PyTorch uses.
        accelerator: whether the call requests an accelerator, if the cluster has any.
    """

    name: str
    function: Callable[..., _Result]
    arguments: tuple[Any, ...]
    threads: int = 1
    accelerator: bool = False


@dataclass(frozen=True)
class Lost:
    """The outcome of a call that returned nothing, because it raised or its process died.

    Attributes:
        reason: one line that says why.
    """

    reason: str


def run_calls(
    calls: Sequence[Call[_Result]], address: str | None
) -> Iterator[tuple[Call[_Result], _Result | Lost] | None]:
    """Run calls on a cluster, and yield each with its outcome when it ends.

    Args:
        calls: the calls. They start in this order.
        address: address of the cluster, or `"auto"` for the cluster of this machine.

    Yields:
        A call and what it returned; or None, if a moment has passed in which no call ended.

    Raises:
        ImportError: if Ray is not installed.
        ConnectionError: if there is no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            'work on many machines needs Ray: pip install "gramian[ray]".', name="ray"
        ) from error

    here = not ray.is_initialized()
    if here:
        ray.init(address=address, log_to_driver=False)
    try:
        accelerators = ray.cluster_resources().get("GPU", 0) >= 1
        remote = ray.remote(max_calls=1, max_retries=0)(_run_there)
        under_way: dict[Any, Call[_Result]] = {}
        for call in calls:
            task = remote.options(
                num_cpus=call.threads,
                num_gpus=int(call.accelerator and accelerators),
                name=call.name,
            )
            arguments = (call.threads, os.getcwd(), call.function, call.arguments)
            under_way[task.remote(*arguments)] = call
        while under_way:
            ended, _ = ray.wait(list(under_way), timeout=POLL)
            for one in ended:
                yield under_way.pop(one), _fetched(ray, one)
            if under_way and not ended:
                yield None
    finally:
        if here:
            ray.shutdown()


def _run_there(
    threads: int, directory: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    """Run a call in a Ray worker, in the caller's working directory."""
    import torch

    os.chdir(directory)
    torch.set_num_threads(threads)
    return function(*arguments)


def _fetched(ray: Any, one: Any) -> Any:
    try:
        return ray.get(one)
    except ray.exceptions.RayError as error:
        return Lost(f"{type(error).__name__}: {' '.join(str(error).split())}")
