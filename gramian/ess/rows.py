r"""Products with the Hankel blocks of an operator that is given by its rows.

A tile of the lower triangle has entries of the blocks `T[i:, :i]` of all positions i between its
first column and its last row. If the positions are sorted, these are neighbours. So a vector for
each position is stored beside those of the other positions, and one product of matrices applies a
tile to all blocks that have a part of it.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Blocks", "RowOperator"]

_SIDE = 512
"""Largest number of rows and of columns of a tile."""

_TOGETHER = 2**28
"""The largest number of bytes of the vectors of all positions that are measured together."""


@dataclasses.dataclass(frozen=True)
class RowOperator:
    """A causal operator that is given by its rows, which are computed when they are needed.

    Attributes:
        rows: A function of a channel and a slice of n rows, which returns a matrix (n, k) with at
            least as many columns as the last of these rows has entries up to the diagonal. Entries
            above the diagonal are not read. It must return the same numbers whenever it is called,
            and it is called from several threads.
        length: The number L of rows.
        channels: The number of channels.
        device: The device of the rows.
    """

    rows: Callable[[int, slice], Tensor]
    length: int
    channels: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    def to(self, device: torch.device) -> RowOperator:
        """Return the operator with rows that move to a device when they are computed."""
        return dataclasses.replace(
            self, rows=lambda channel, rows: self.rows(channel, rows).to(device), device=device
        )

    def __post_init__(self) -> None:
        if self.length < 1 or self.channels < 1:
            raise ValueError(
                f"length and channels must be at least 1; got {self.length} and {self.channels}."
            )


class Blocks:
    """The blocks `T[i:horizon, :i]` of one channel at some positions, which multiply vectors.

    The vectors of all positions are one tensor Z, (P, N, horizon). For position i, `Z[..., :i]`
    belongs to the columns of its block, and `Z[..., i:]` to the rows. The smaller of the two is the
    *small side* of the block, and the other one is its *large side*.

    Args:
        rows: A function that maps a slice of rows to the rows of T, as in `RowOperator`.
        horizon: The position at which the blocks end.
        positions: Positions in 1 … horizon - 1, ascending, without repetitions.
        device: The device of the rows.
        memory: The largest number of bytes of rows to keep. If the lower triangle needs more, its
            rows are computed again for every product.
    """

    def __init__(
        self,
        rows: Callable[[slice], Tensor],
        horizon: int,
        positions: list[int],
        device: torch.device,
        memory: int,
    ) -> None:
        self.rows, self.horizon, self.device = rows, horizon, device
        self._bands = list(range(0, horizon, _SIDE))
        self._kept: dict[int, Tensor] | None = {} if 2 * horizon * horizon <= memory else None
        self.choose(positions)

    def normalize(self) -> None:
        """Divide the operator by its largest entry, so that single precision can hold squares.

        Raises:
            ValueError: if an entry is NaN or infinite.
        """
        given = self.rows

        def entries(rows: slice) -> Tensor:
            return given(rows)[:, : rows.stop].double().tril(rows.start)

        largest = 0.0
        for start in self._bands:
            band = entries(slice(start, min(start + _SIDE, self.horizon))).abs()
            if not bool(band.isfinite().all()):
                raise ValueError(
                    "an operator to be measured must be finite; got NaN or infinite values."
                )
            largest = max(largest, float(band.amax()))
        if largest > 0:
            self.rows = lambda rows: entries(rows) / largest
            self.forget()

    def groups(self, some: Sequence[int], width: int) -> list[list[int]]:
        """Divide positions so that `width` vectors of each fit into memory together."""
        size = max(1, _TOGETHER // (4 * self.horizon * width))
        return [[*some[k : k + size]] for k in range(0, len(some), size)]

    def forget(self) -> None:
        """Let go of the rows that are kept. They are computed again when they are needed."""
        if self._kept is not None:
            self._kept = {}

    def choose(self, positions: list[int]) -> None:
        """Choose other positions for all further products."""
        self.positions = positions
        self._early = sum(i <= self.horizon - i for i in positions)

    def small(self, p: int) -> slice:
        """Return where the small side of position number p is."""
        i = self.positions[p]
        return slice(0, i) if p < self._early else slice(i, self.horizon)

    def large(self, p: int) -> slice:
        """Return where the large side of position number p is."""
        i = self.positions[p]
        return slice(i, self.horizon) if p < self._early else slice(0, i)

    def small_sizes(self) -> Tensor:
        """Return the lengths of the small sides, (P), float64."""
        sizes = [min(i, self.horizon - i) for i in self.positions]
        return torch.tensor(sizes, dtype=torch.float64, device=self.device)

    def band(self, start: int) -> Tensor:
        """Return the rows from `start`, a multiple of the side of a tile, up to the diagonal."""
        if self._kept is not None and start in self._kept:
            return self._kept[start]
        stop = min(start + _SIDE, self.horizon)
        rows = self.rows(slice(start, stop))[:, :stop].float().tril(start)
        if self._kept is not None:
            self._kept[start] = rows
        return rows

    def to_large(self, Z: Tensor) -> Tensor:
        """Multiply vectors on the small sides by the blocks: vectors on the large sides.

        The vectors must be 0 on the large sides.
        """
        result = self._apply(Z, self._early)
        for p in range(len(self.positions)):
            result[p, :, self.small(p)] = 0
        return result

    def to_small(self, Z: Tensor) -> Tensor:
        """Multiply vectors on the large sides by the transposed blocks.

        The vectors must be 0 on the small sides.
        """
        result = self._apply(Z, self._early, transposed=True)
        for p in range(len(self.positions)):
            result[p, :, self.large(p)] = 0
        return result

    def _apply(self, Z: Tensor, early: int, transposed: bool = False) -> Tensor:
        """Multiply vectors by all of T that has a part of their blocks.

        What is outside of the blocks reaches only the sides that the vectors come from.
        """
        width = Z.shape[1]
        source, result = Z.flatten(0, 1), torch.zeros_like(Z).flatten(0, 1)
        for top in self._bands:
            band = self.band(top)
            rows = slice(top, top + len(band))
            last = bisect.bisect_left(self.positions, rows.stop)
            for left in range(0, rows.stop, _SIDE):
                columns = slice(left, min(left + _SIDE, rows.stop))
                first = bisect.bisect_right(self.positions, left)
                middle = min(max(early, first), last)
                tile = band[:, columns].to(Z.dtype)
                down, up = slice(first * width, middle * width), slice(middle * width, last * width)
                if transposed:
                    down, up = up, down
                if down.start < down.stop:
                    result[down, rows].addmm_(source[down, columns], tile.mT)
                if up.start < up.stop:
                    result[up, columns].addmm_(source[up, rows], tile)
        return result.reshape(Z.shape)

    def project(self, Z: Tensor, vectors: list[Tensor]) -> None:
        """Subtract from Z, in place, its part in the span of orthonormal vectors.

        Args:
            Z: (P, N, horizon).
            vectors: For every position, vectors (r, n) on its small side.
        """
        for p, V in enumerate(vectors):
            z = Z[p, :, self.small(p)]
            z -= (z @ V.mT) @ V

    def energies(self) -> tuple[Tensor, Tensor]:
        """Compute ‖H_i‖_F² at every position, (P), and ‖T‖_F², in float64."""
        cuts = sorted({0, self.horizon, *self._bands, *self.positions})
        parts = torch.zeros(len(cuts), len(cuts), dtype=torch.float64, device=self.device)
        ends = list(itertools.pairwise(cuts))
        for top in self._bands:
            squares = self.band(top).square()
            for j, (first, last) in enumerate(ends):
                if top <= first < top + len(squares):
                    rows = squares[first - top : last - top]
                    for k, (left, right) in enumerate(ends[: j + 1]):
                        parts[j, k] = rows[:, left:right].sum(dtype=torch.float64)
        # of all rows from a cut on, up to a column
        below = parts.flip(0).cumsum(0).flip(0).cumsum(1)
        at = [cuts.index(i) for i in self.positions]
        return below[at, [k - 1 for k in at]], parts.sum()

    def matrix(self, p: int) -> Tensor:
        """Return the block of position number p, with its small side last, in float64."""
        i = self.positions[p]
        parts = []
        for start in self._bands:
            if start + _SIDE > i:
                parts.append(self.band(start)[max(i - start, 0) :, :i].double())
        block = torch.cat(parts)
        return block if p < self._early else block.mT
