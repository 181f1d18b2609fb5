r"""The smallest time-varying recurrence of a causal matrix.

From one position to the next, a Hankel block loses its first row and gains a column. Let
`H_i = O_i R_i`, where the rows of R_i are orthonormal. Then the next block is

    `H_{i+1} = [O_i[1:], T[i+1:, i]] diag(R_i, 1)`,

so its singular values and right factor are those of the matrix in brackets. The right singular
vectors of that matrix are `[A_i, B_i]`. Their rows are orthonormal, so the recurrence is
contractive. `C_i` is the first row of O_i. A part of the matrix that is dropped does not enter
later steps. The parts that are dropped at different steps are orthogonal:
`‖T - T̂‖_F² = Σ_i Σ_dropped σ²`, exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gramian.ess._reading import Reading
from gramian.ops.precision import full_precision
from gramian.ops.threads import work
from gramian.systems import DenseOperator, TimeVarying

__all__ = ["realize"]

_GRAM = 1e-5
"""Smallest tolerance with which right singular vectors may come from Gram matrices."""


@full_precision()
@torch.no_grad()
def realize(matrix: Tensor | DenseOperator | TimeVarying, tol: float) -> TimeVarying:
    """Find the smallest recurrence that computes a causal matrix to a tolerance.

    For an attention map, this is the recurrence with the smallest state that reproduces the map.
    The state before step i has the rank of `T[i:, :i]` to the tolerance. The order is the largest
    of these ranks over all steps and channels. Smaller states are padded with zeros. The ranks are
    computed from blocks that are already truncated. So they may differ from ESS, and the states are
    minimal only up to earlier truncations. With `tol=0` each state has the numerical rank of its
    block.

    Args:
        matrix: Lower-triangular matrices (*C, L, L), or a system of L steps. Entries above the
            diagonal are not read.
        tol: The tolerance in `‖T - T̂‖_F ≤ tol ‖T‖_F`, which holds for every channel, up to
            rounding. At most `tol² ‖T‖_F² / L` of energy is dropped at a step.

    Returns:
        A `TimeVarying` with dense A, channels (*C), in the dtype of the input (float32 for half
        precision). Each row of `[A_i, B_i]` is zero, or it has length 1 and is orthogonal to the
        others.

    Raises:
        TypeError: if the input is neither a tensor nor a system of L steps.
        ValueError: if the tolerance is outside of 0 … 1, or if a value is NaN or infinite. The
            message then names the channel.
    """
    if not isinstance(matrix, Tensor | DenseOperator | TimeVarying):
        raise TypeError(
            "realize takes matrices (*channels, L, L), a DenseOperator or a TimeVarying system; "
            f"got {type(matrix).__name__}."
        )
    if not 0 <= tol < 1:
        raise ValueError(f"tol must be at least 0 and below 1; got {tol!r}.")
    reading = Reading(matrix, None, None, None)
    T = reading.matrices()
    parts = work(lambda g: _realized(T[g].double().tril(), tol), range(len(T)), T)
    order = max((part[0].shape[-1] for part in parts), default=0)
    length = reading.horizon
    A = T.new_zeros(len(T), length, order, order, dtype=torch.float64)
    B, C = T.new_zeros(2, len(T), length, order, dtype=torch.float64)
    for g, (a, b, c) in enumerate(parts):
        own = a.shape[-1]
        A[g, :, :own, :own], B[g, :, :own], C[g, :, :own] = a, b, c
    system = TimeVarying(A, B, C, T.diagonal(dim1=-2, dim2=-1).double())
    dtype = reading.dtype if reading.dtype in (torch.float32, torch.float64) else torch.float32
    return system.reshape_channels(*reading.shape).to(dtype)


def _realized(T: Tensor, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute A (L, n, n), B and C (L, n) for one matrix (L, L)."""
    length = len(T)
    energy = T.square().sum()
    # Even tol = 0 drops parts that are rounding errors of the matrix as a whole.
    floor = torch.finfo(T.dtype).eps * math.sqrt(length)
    budget = float(energy) * max(tol, floor) ** 2 / length
    observe = T.new_zeros(length, 0)  # O_i: (L - i, r_i)
    steps: list[tuple[Tensor, Tensor]] = []  # [A_i, B_i]: (r_{i+1}, r_i + 1), and C_i: (r_i)
    for i in range(length):
        extended = torch.cat([observe[1:], T[i + 1 :, i : i + 1]], dim=-1)  # (L - i - 1, r_i + 1)
        vectors, dropped = _right_vectors(extended, squared=tol >= _GRAM)
        kept = vectors[:, : int((dropped > budget).sum())]
        steps.append((kept.mT, observe[0]))
        observe = extended @ kept
    order = max((len(row) for _, row in steps), default=0)
    A, B, C = (
        T.new_zeros(length, order, order),
        T.new_zeros(length, order),
        T.new_zeros(length, order),
    )
    for i, (transition, row) in enumerate(steps):
        new, old = transition.shape[0], len(row)
        A[i, :new, :old], B[i, :new], C[i, :old] = transition[:, :old], transition[:, old], row
    return A, B, C


def _right_vectors(matrix: Tensor, squared: bool) -> tuple[Tensor, Tensor]:
    """Compute the right singular vectors (r, k) of a matrix (m, r), the largest first.

    The second result is, for each vector, the energy that is lost if this vector and all after it
    are dropped.
    """
    if squared:
        energies, vectors = torch.linalg.eigh(matrix.mT @ matrix)
        energies, vectors = energies.flip(0).clamp_min(0), vectors.flip(-1)
    else:
        _, values, rows = torch.linalg.svd(matrix, full_matrices=False)
        energies, vectors = values.square(), rows.mT
    return vectors, energies.flip(0).cumsum(0).flip(0)
