r"""Products with the Hankel blocks of an operator that is given by its rows.

A tile of the lower triangle, the rows R and the columns C, belongs to the blocks `T[i:, :i]` of all
positions i with C < i ≤ R. If the positions are sorted, these are neighbours. So a vector for each
position is stored beside those of the other positions, and one product of matrices applies a tile
to all blocks that contain it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["Blocks", "RowOperator"]

_SIDE = 512
"""Largest number of rows and of columns of a tile."""


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

    def __post_init__(self) -> None:
        if self.length < 1 or self.channels < 1:
            raise ValueError(
                f"length and channels must be at least 1; got {self.length} and {self.channels}."
            )


class Blocks:
    """The blocks `T[i:horizon, :i]` of one channel at some positions, which multiply vectors.

    The vectors of all positions are one tensor Z, (horizon, P, N). For position i, `Z[:i]` belongs
    to the columns of its block, and `Z[i:]` to the rows. The smaller of the two is the *small side*
    of the block, and the other one is its *large side*.

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
            if self._kept is not None:
                self._kept = {}

    def choose(self, positions: list[int]) -> None:
        """Choose other positions for all further products."""
        self.positions = positions
        self.cuts = sorted({0, self.horizon, *self._bands, *positions})
        self._early = sum(i <= self.horizon - i for i in positions)
        self._upto = [sum(i <= cut for i in positions) for cut in self.cuts]

    def small(self, p: int) -> slice:
        """Return where the small side of position number p is."""
        i = self.positions[p]
        return slice(0, i) if p < self._early else slice(i, self.horizon)

    def small_sizes(self) -> Tensor:
        """Return the lengths of the small sides, (P), float64."""
        sizes = [min(i, self.horizon - i) for i in self.positions]
        return torch.tensor(sizes, dtype=torch.float64, device=self.device)

    def small_mask(self) -> Tensor:
        """Return 1 at the small sides and 0 at the large sides, (horizon, P, 1), float32."""
        mask = torch.zeros(self.horizon, len(self.positions), 1, device=self.device)
        for p in range(len(self.positions)):
            mask[self.small(p), p] = 1
        return mask

    def band(self, start: int) -> Tensor:
        """Return the rows from `start`, a multiple of the side of a tile, up to the diagonal."""
        if self._kept is not None and start in self._kept:
            return self._kept[start]
        stop = min(start + _SIDE, self.horizon)
        rows = self.rows(slice(start, stop))[:, :stop].float()
        if self._kept is not None:
            if rows.untyped_storage().nbytes() > 2 * rows.nbytes:  # a view of something larger
                rows = rows.clone()
            self._kept[start] = rows
        return rows

    def _tiles(self) -> Iterator[tuple[slice, slice, int, int, Tensor]]:
        """Yield rows, columns, the first and the last position (exclusive) of a tile, and it."""
        inside = 0
        for start in self._bands:
            band = self.band(start)
            while inside + 1 < len(self.cuts) and self.cuts[inside] < start + len(band):
                top, bottom = self.cuts[inside], self.cuts[inside + 1]
                last = self._upto[
                    inside
                ]  # the blocks of the positions before this one have these rows
                for k in range(inside):
                    left, right = self.cuts[k], self.cuts[k + 1]
                    first = self._upto[k]  # and the blocks from this position on have these columns
                    if first < last:
                        tile = band[top - start : bottom - start, left:right]
                        yield slice(top, bottom), slice(left, right), first, last, tile
                inside += 1

    def to_large(self, Z: Tensor) -> Tensor:
        """Multiply vectors on the small sides by the blocks: vectors on the large sides."""
        return self._apply(Z, self._early)

    def to_small(self, Z: Tensor) -> Tensor:
        """Multiply vectors on the large sides by the transposed blocks."""
        return self._apply(Z, self._early, transposed=True)

    def _apply(self, Z: Tensor, early: int, transposed: bool = False) -> Tensor:
        width = Z.shape[-1]
        source, result = Z.flatten(1), torch.zeros_like(Z).flatten(1)
        for rows, columns, first, last, tile in self._tiles():
            middle = min(max(early, first), last)
            tile = tile.to(Z.dtype)
            down, up = slice(first * width, middle * width), slice(middle * width, last * width)
            if transposed:
                down, up = up, down
            if down.start < down.stop:
                result[rows, down].addmm_(tile, source[columns, down])
            if up.start < up.stop:
                result[columns, up].addmm_(tile.mT, source[rows, up])
        return result.reshape(Z.shape)

    def energies(self) -> tuple[Tensor, Tensor]:
        """Compute ‖H_i‖_F² at every position, (P), and ‖T‖_F², in float64."""
        cuts = torch.tensor(self.cuts, device=self.device)
        blocks = torch.zeros(len(self.cuts), len(self.cuts), dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for start in self._bands:
            band = self.band(start).double().tril(start)
            total += band.square().sum()
            sums = torch.nn.functional.pad(band.square().cumsum(1), (1, 0))
            inner = cuts[(cuts <= start + len(band))]
            for row in range(len(self.cuts) - 1):
                if start <= self.cuts[row] < start + len(band):
                    at = slice(self.cuts[row] - start, self.cuts[row + 1] - start)
                    blocks[row, : len(inner)] = sums[at][:, inner].sum(0).cpu()
        below = blocks.flip(0).cumsum(0).flip(0)  # of all rows from a cut on, up to a column
        where = [self.cuts.index(i) for i in self.positions]
        return below[where, where].to(self.device), total

    def matrix(self, p: int) -> Tensor:
        """Return the block of position number p, with its small side last, in float64."""
        i = self.positions[p]
        parts = []
        for start in self._bands:
            if start + _SIDE > i:
                parts.append(self.band(start)[max(i - start, 0) :, :i].double())
        block = torch.cat(parts)
        return block if p < self._early else block.mT
