r"""Hankel spectra of a dense operator, at many positions.

If only a measure is needed, the singular values come from Gram matrices of the smaller side of each
block, in double precision. From the middle towards the start, blocks gain rows and lose columns.
From the middle towards the end, they gain columns and lose rows. So each Gram matrix is a corner of
the previous Gram matrix plus a product of the added rows or columns. Nothing is subtracted, and no
block is formed. If the squared condition number would affect the result, the singular values of the
block itself are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gramian.ess.measures import Measure
from gramian.ops.threads import work

__all__ = ["measure_blocks", "measure_hankel_blocks", "singular_values"]

_TOLERANCE = 9e-7
"""The largest relative error with which an entropy may come from a Gram matrix."""

_BATCH = 64
"""Number of spectra that are measured together."""

_BYTES = 2**26
"""The largest number of bytes of the spectra of several channels that are held at once."""

_COLUMNS = 128
"""The number of columns of a Gram matrix that are computed together, down to the diagonal."""


def singular_values(T: Tensor, at: int) -> Tensor:
    """Compute the singular values of `T[at:, :at]`, differentiably.

    Returns:
        (*C, min(at, L - at)), float64, descending.
    """
    return torch.linalg.svdvals(T[..., at:, :at].double())


def measure_blocks(T: Tensor, positions: list[int], measure: Measure, floor: Tensor) -> Tensor:
    """Compute the measure of `T[i:, :i]` at every position.

    Args:
        T: Lower-triangular matrices (G, L, L) of any floating-point dtype.
        positions: Positions in 1 … L - 1, ascending, without repetitions.
        measure: The measure to compute.
        floor: (G), float64: the norms up to which a block counts as zero.

    Returns:
        (G, len(positions)), float64.
    """
    middle = T.shape[-1] // 2
    early = [i for i in reversed(positions) if i <= middle]
    late = [i for i in positions if i > middle]
    column = {i: c for c, i in enumerate(positions)}
    sizes = torch.zeros(len(T), len(positions), dtype=torch.float64, device=T.device)

    def spectra(task: tuple[int, list[int]]) -> list[tuple[int, int, Tensor]]:
        g, half = task
        grams = _towards_the_start if half is early else _towards_the_end
        return [(g, i, torch.linalg.eigvalsh(gram, UPLO="U")) for i, gram in grams(T[g], half)]

    together = max(1, _BYTES // (8 * max(1, middle) * max(1, len(positions))))
    for first in range(0, len(T), together):
        some = range(first, min(first + together, len(T)))
        tasks = [(g, half) for g in some for half in (early, late) if half]
        found = [one for part in work(spectra, tasks, T) for one in part]
        for start in range(0, len(found), _BATCH):
            channels, at, values = zip(*found[start : start + _BATCH], strict=True)
            rows, columns = torch.tensor([channels, [column[i] for i in at]])
            sizes[rows, columns] = _measured(T, channels, at, values, measure, floor)
    return sizes


def _measured(
    T: Tensor,
    channels: Sequence[int],
    positions: Sequence[int],
    spectra: Sequence[Tensor],
    measure: Measure,
    floor: Tensor,
) -> Tensor:
    """Measure spectra from Gram matrices, or from blocks where necessary: (len(positions))."""
    eigenvalues = torch.nn.utils.rnn.pad_sequence([*spectra], batch_first=True)
    floor = floor[[*channels]]
    sizes = measure(eigenvalues.clamp_min(0).sqrt(), floor)
    counts = torch.tensor([len(spectrum) for spectrum in spectra], device=floor.device)
    unsafe = measure.unsafe_from_gram(eigenvalues, counts, _TOLERANCE)
    again: list[int] = unsafe.nonzero().flatten().tolist()

    def from_block(k: int) -> Tensor:
        return measure(singular_values(T[channels[k]], positions[k]), floor[k])

    for k, size in zip(again, work(from_block, again, T), strict=True):
        sizes[k] = size
    return sizes


def _towards_the_start(T: Tensor, positions: list[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield the upper triangle of `H_iᵀ H_i` for each of the descending positions i."""
    below = len(T)
    gram = T.new_zeros(positions[0], positions[0], dtype=torch.float64)
    for i in positions:
        gram = gram[:i, :i]
        _add_outer_products(gram, T[i:below, :i].double())
        below = i
        yield i, gram


def _towards_the_end(T: Tensor, positions: list[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield the upper triangle of `H_i H_iᵀ` for each of the ascending positions i."""
    before, first = 0, positions[0]
    gram = T.new_zeros(len(T) - first, len(T) - first, dtype=torch.float64)
    for i in positions:
        gram = gram[i - first :, i - first :]
        _add_outer_products(gram, T[i:, before:i].double().mT)
        before = first = i
        yield i, gram


def _add_outer_products(gram: Tensor, rows: Tensor) -> None:
    """Add `rowsᵀ rows` to the upper triangle of `gram`, in place."""
    for start in range(0, len(gram), _COLUMNS):
        stop = start + _COLUMNS
        gram[:stop, start:stop].addmm_(rows[:, :stop].mT, rows[:, start:stop])


def measure_hankel_blocks(
    taps: Tensor, positions: list[int], horizon: int, measure: Measure, floor: Tensor
) -> Tensor:
    """Compute the measure of the blocks `T[i:horizon, :i]` of convolutions from their taps.

    The block at i is the transpose of the block at `horizon - i`, so both have the same spectrum.
    All blocks that contain every tap also have the same spectrum.

    Args:
        taps: (G, K), float64: h_1 … h_K. Later taps are zero.
        positions: Positions in 1 … horizon - 1.
        horizon: The position at which the blocks end.
        measure: The measure to compute.
        floor: (G), float64: the norms up to which a block counts as zero.

    Returns:
        (G, len(positions)), float64.
    """
    if taps.shape[-1] == 0:
        return taps.new_zeros(len(taps), len(positions))
    shapes = []
    for i in positions:
        small, large = sorted((min(i, taps.shape[-1]), min(horizon - i, taps.shape[-1])))
        shapes.append((small, large))
    distinct = sorted(set(shapes))
    sizes = taps.new_zeros(len(taps), len(distinct))

    def run(task: tuple[int, int]) -> None:
        g, k = task
        small, large = distinct[k]
        missing = max(0, small + large - 1 - taps.shape[-1])
        row = torch.nn.functional.pad(taps[g], (0, missing))[: small + large - 1]
        block = row.unfold(-1, large, 1)  # (small, large)
        eigenvalues = torch.linalg.eigvalsh(block @ block.mT)
        values, count = eigenvalues.clamp_min(0).sqrt(), torch.tensor(small, device=taps.device)
        if bool(measure.unsafe_from_gram(eigenvalues, count, _TOLERANCE)):
            values = torch.linalg.svdvals(block)
        sizes[g, k] = measure(values, floor[g])

    work(run, [(g, k) for g in range(len(taps)) for k in range(len(distinct))], taps)
    return sizes[:, [distinct.index(shape) for shape in shapes]]
