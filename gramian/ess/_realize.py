r"""The smallest time-varying recurrence of a causal matrix.

From one position to the next, a Hankel block loses its first row and gains a column. Let
`H_i = O_i R_i`, where the rows of R_i are orthonormal. Then the next block is

    `H_{i+1} = [O_i[1:], T[i+1:, i]] diag(R_i, 1)`,

so its singular values and right factor are those of the matrix in brackets. The right singular
vectors of that matrix are `[A_i, B_i]`. Their rows are orthonormal, so the recurrence is
contractive. `C_i` is the first row of O_i. A part of the matrix that is dropped does not enter
later steps. The parts that are dropped at different steps are orthogonal:
`‖T - T̂‖_F² = Σ_i Σ_dropped σ²`, exactly.

So the error of a recurrence of n states is known without the recurrence: once the state is full,
every step drops one direction, the smallest singular value of the matrix in brackets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gramian.ess._reading import Reading
from gramian.ops.devices import in_double_precision
from gramian.ops.precision import full_precision
from gramian.ops.threads import work
from gramian.systems import DenseOperator, TimeVarying

__all__ = ["realization_errors", "realize"]

_GRAM = 1e-5
"""Smallest tolerance with which right singular vectors may come from Gram matrices."""


@in_double_precision
@full_precision()
@torch.no_grad()
def realize(
    matrix: Tensor | DenseOperator | TimeVarying, tol: float = 0.0, *, order: int | None = None
) -> TimeVarying:
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
            rounding. At most `tol² ‖T‖_F² / L` of energy is dropped at a step. By default, only
            rounding errors are dropped.
        order: The largest number of states; None for as many as the tolerance needs. With fewer
            states the error is that of `realization_errors`, and the tolerance does not hold.

    Returns:
        A `TimeVarying` with dense A, channels (*C), in the dtype of the input (float32 for half
        precision). Each row of `[A_i, B_i]` is zero, or it has length 1 and is orthogonal to the
        others.

    Raises:
        TypeError: if the input is neither a tensor nor a system of L steps.
        ValueError: if the tolerance is outside of 0 … 1, if the order is negative, or if a value is
            NaN or infinite. The message then names the channel.
    """
    if not 0 <= tol < 1:
        raise ValueError(f"tol must be at least 0 and below 1; got {tol!r}.")
    if order is not None and order < 0:
        raise ValueError(f"order must be at least 0 or None; got {order}.")
    reading = _read(matrix, "realize")
    T = reading.matrices()
    parts = work(lambda g: _realized(T[g].double().tril(), tol, order), range(len(T)), T)
    largest = max((part[0].shape[-1] for part in parts), default=0)
    length = reading.horizon
    A = T.new_zeros(len(T), length, largest, largest, dtype=torch.float64)
    B, C = T.new_zeros(2, len(T), length, largest, dtype=torch.float64)
    for g, (a, b, c) in enumerate(parts):
        own = a.shape[-1]
        A[g, :, :own, :own], B[g, :, :own], C[g, :, :own] = a, b, c
    system = TimeVarying(A, B, C, T.diagonal(dim1=-2, dim2=-1).double())
    dtype = reading.dtype if reading.dtype in (torch.float32, torch.float64) else torch.float32
    return system.reshape_channels(*reading.shape).to(dtype)


@in_double_precision
@full_precision()
@torch.no_grad()
def realization_errors(
    matrix: Tensor | DenseOperator | TimeVarying, orders: Sequence[int]
) -> Tensor:
    """Compute how far recurrences of given orders are from a causal matrix.

    The recurrence of order n is `realize(matrix, order=n)`, which is not computed here. Each of its
    steps keeps the n directions of the past in which the future has the most energy. This is the
    best choice for a single step, so the errors are those of a good recurrence, and not proven to
    be the smallest. A state of n numbers serves every value channel of a head on its own.

    Args:
        matrix: Lower-triangular matrices (*C, L, L), or a system of L steps. Entries above the
            diagonal are not read.
        orders: The numbers of states, each at least 0.

    Returns:
        `‖T - T̂‖_F / ‖T‖_F`, (*C, len(orders)), in float64. It is 0 for a matrix of zeros. Errors
        below about 1e-8 are rounding errors.

    Raises:
        TypeError: if the input is neither a tensor nor a system of L steps.
        ValueError: if an order is negative, or if a value is NaN or infinite. The message then
            names the channel.
    """
    if any(order < 0 for order in orders):
        raise ValueError(f"orders must be at least 0; got {min(orders)}.")
    reading = _read(matrix, "realization_errors")
    T = reading.matrices().double().tril()  # (G, L, L)
    energy = T.square().sum((-2, -1))
    dropped = [_dropped(T, order) for order in orders]
    errors = torch.stack(dropped, -1) if dropped else T.new_zeros(len(T), 0)
    errors = (errors / energy.clamp_min(torch.finfo(T.dtype).tiny)[:, None]).sqrt()
    return errors.reshape(*reading.shape, len(dropped))


def _read(matrix: Tensor | DenseOperator | TimeVarying, name: str) -> Reading:
    if not isinstance(matrix, Tensor | DenseOperator | TimeVarying):
        raise TypeError(
            f"{name} takes matrices (*channels, L, L), a DenseOperator or a TimeVarying system; "
            f"got {type(matrix).__name__}."
        )
    return Reading(matrix, None, None, None)


def _dropped(T: Tensor, order: int) -> Tensor:
    """Compute the energy (G) that recurrences of one order drop of matrices (G, L, L)."""
    count, length, _ = T.shape
    observe, dropped = T.new_zeros(count, length, 0), T.new_zeros(count)
    for i in range(length - 1):
        observe = torch.cat([observe[:, 1:], T[:, i + 1 :, i : i + 1]], dim=-1)
        if observe.shape[-1] > order:  # by one, so that the smallest direction is dropped
            energies, vectors = torch.linalg.eigh(observe.mT @ observe)
            dropped += energies[:, 0].clamp_min(0)
            observe = observe @ vectors[..., 1:]  # (G, L - i - 1, order)
    return dropped


def _realized(T: Tensor, tol: float, order: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
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
        kept = vectors[:, : int((dropped > budget).sum())][:, :order]
        steps.append((kept.mT, observe[0]))
        observe = extended @ kept
    largest = max((len(row) for _, row in steps), default=0)
    A, B, C = (
        T.new_zeros(length, largest, largest),
        T.new_zeros(length, largest),
        T.new_zeros(length, largest),
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
