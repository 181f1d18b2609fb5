"""Partition of rows that share an operand into blocks that fit into the cache."""

import itertools
import math
from typing import NamedTuple

from torch import Tensor

Block = tuple[slice, ...]


class Task(NamedTuple):
    """A block of the shared operand's rows, and the blocks of rows to which it applies."""

    shared: Block
    blocks: list[Block]


def cut(
    rows: Tensor, shared: Tensor, points: int, cpu_elements: int, cpu_rows: int
) -> tuple[int, list[Task]]:
    """Cut the rows of a tensor (*S, …) whose operand is `shared` (*S or 1, …) into blocks.

    On a CPU a block has `cpu_elements // points` rows, at `points` numbers per row, but at least
    `cpu_rows`; on other devices the block size only bounds the memory. Rows that are neighbors in
    memory fall into one block, so that whole cache lines are used. Where rows are interleaved (the
    last dimension is not contiguous), a block takes `cpu_rows` of them, since more would evict each
    other from the cache.

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
