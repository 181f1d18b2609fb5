"""Blocks of rows that share an operand, cut so that a block's work stays in cache."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

Block = tuple[slice, ...]


def block_rows(device: torch.device, elements: int, cpu_elements: int, cpu_rows: int) -> int:
    """How many rows of `elements` numbers to work on at once.

    On a processor as many as `cpu_elements` numbers hold, at least `cpu_rows`; on other devices
    the block only bounds the memory taken.
    """
    if device.type == "cpu":
        return max(cpu_elements // elements, cpu_rows)
    return max(2**27 // elements, 1)


def shared_blocks(
    shape: Sequence[int], shared: Sequence[int], rows: int, nearness: Callable[[int], int]
) -> tuple[list[int], Iterator[tuple[Block, Iterator[Block]]]]:
    """Cuts rows of `shape` into blocks of about `rows`, grouped by the shared operand's blocks.

    Args:
        shape: of the rows.
        shared: the same number of dimensions, 1 wherever the operand is shared.
        rows: wanted per block; dimensions with the smallest `nearness` (stride) are filled first,
            so that neighbours in memory fall into one block.

    Returns:
        The largest block's shape, and pairs of a block of the shared operand and the blocks of
        rows to which it applies.
    """
    steps = [1] * len(shape)
    for axis in sorted(range(len(shape)), key=nearness):
        steps[axis] = max(min(shape[axis], rows), 1)
        rows //= steps[axis]

    def cuts(axis: int) -> list[slice]:
        size, step = shape[axis], steps[axis]
        return [slice(start, min(start + step, size)) for start in range(0, size, step)]

    axes = range(len(shape))

    def pairs() -> Iterator[tuple[Block, Iterator[Block]]]:
        own = [cuts(axis) if shared[axis] != 1 else [slice(None)] for axis in axes]
        for outer in itertools.product(*own):
            inner = [[outer[axis]] if shared[axis] != 1 else cuts(axis) for axis in axes]
            yield outer, itertools.product(*inner)

    return steps, pairs()
