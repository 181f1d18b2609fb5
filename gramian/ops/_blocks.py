"""Divide tensor rows that share an operand into blocks that fit into the processor's cache."""

import itertools
import math
from typing import NamedTuple

from torch import Tensor

Block = tuple[slice, ...]


class Task(NamedTuple):
    """One block of the shared operand's rows, and the blocks of the tensor's rows that share it."""

    shared: Block
    blocks: list[Block]


def cut(
    rows: Tensor, shared: Tensor, points: int, cpu_elements: int, cpu_rows: int
) -> tuple[int, list[Task]]:
    """Divide the rows of a tensor into blocks.

    On a CPU, a block has `cpu_elements // points` rows, but at least `cpu_rows`. On other devices
    the block size only bounds the memory. Rows that are neighbors in memory belong to one block, so
    that whole cache lines are used. If rows are interleaved (the last dimension is not contiguous),
    a block has `cpu_rows` of them, since more rows would evict each other from the cache.

    Args:
        rows: (*S, …): the tensor.
        shared: (*S or 1, …): the operand that the rows share.
        points: The number of elements in a row.
        cpu_elements: The number of elements in a block on a CPU.
        cpu_rows: The smallest number of rows in a block on a CPU.

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
    tasks = []
    for outer in itertools.product(*own_cuts):
        blocks = [
            tuple(i if size == 1 else o for i, o, size in zip(inner, outer, own, strict=True))
            for inner in itertools.product(*other_cuts)
        ]
        tasks.append(Task(outer, blocks))
    return math.prod(steps), tasks
