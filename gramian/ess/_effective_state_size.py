r"""The public functions that measure how much memory an operator uses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gramian.ess._reading import Positions, Reading
from gramian.ess.measures import Measure
from gramian.ess.sketch import sketched_sizes
from gramian.ops.precision import full_precision
from gramian.systems import DenseOperator, System

__all__ = ["effective_state_size", "hankel_singular_values", "sketched_state_size"]


@full_precision()
def effective_state_size(
    system_or_matrix: System | Tensor,
    at: Positions = None,
    measure: str = "entropy",
    tol: float | None = None,
    rtol: float | None = None,
    *,
    length: int | None = None,
    horizon: int | None = None,
) -> Tensor:
    r"""Measure how much of its memory a causal operator uses, the numerical rank of `T[i:, :i]`.

    The rank of that Hankel block is the smallest state that any recurrence computing T can have
    before step i (arXiv 2504.19561, section 3). It is at most min(i, horizon - i), so every curve
    falls towards the horizon: choose a horizon past the last position of interest.

    Differentiable where something requires a gradient: entropy only, by a singular value
    decomposition of each block (of its factors, for a `TimeVarying` system).

    Args:
        system_or_matrix: A system, channels (*C), or matrices (*C, L, L), of which the entries
            above the diagonal are not read.
        at: Positions, 0 … horizon - 1; an integer drops the dimension. Default: the first `length`
            positions.
        measure: "entropy", `exp(-Σ p log p)` of the normalized singular values; or "tolerance",
            the number of singular values above `tol` and above `rtol` times the largest.
            A count is exact unless a singular value of the block lies within 1e-13 times the
            largest of the threshold; below that threshold, rounding errors count.
        tol: Absolute tolerance, as in the paper; for "tolerance" only.
        rtol: Relative tolerance, likewise.
        length: Number of positions; by default all that the operator has. A time-invariant system
            has no end and needs either `length` or `at`.
        horizon: Blocks are `T[i:horizon, :i]`. Default: all that the operator has; for a
            time-invariant system, twice the number of positions, so that the cap does not bind.

    Returns:
        (*C, len(at)), of the dtype of the input (float32 for half precision), decided in float64:
        counts are exact and entropies to 1e-6, which is where Gram matrices give way to singular
        value decompositions. 0 at position 0 and where ‖H_i‖_F ≤ eps ‖T‖_F, with eps that of the
        dtype returned.

    Raises:
        TypeError: for another kind of input.
        ValueError: if the measure, tolerance, positions, length or horizon are invalid, or a value
            is NaN or infinite; the message names the first such channel.
    """
    chosen = _measure(measure, tol, rtol)
    reading = Reading(system_or_matrix, at, length, horizon)
    if not reading.needs_gradient:
        return reading.result(reading.measured(chosen))
    if chosen.counts:
        raise ValueError('a count has no gradient: use measure="entropy", or detach the input.')
    return reading.result(reading.differentiable(chosen))


@full_precision()
def hankel_singular_values(
    system_or_matrix: System | Tensor,
    at: Positions = None,
    *,
    length: int | None = None,
    horizon: int | None = None,
) -> Tensor:
    """Compute the singular values of `T[i:horizon, :i]` at many positions.

    Args:
        system_or_matrix: As in `effective_state_size`, and so are `at`, `length` and
            `horizon`.

    Returns:
        (*C, len(at), k), descending, followed by zeros; k is the rank that the largest block can
        have, at most n for a recurrence. Of the dtype of the input (float32 for half precision),
        decided in float64. No gradient flows through it.

    Raises:
        TypeError: as `effective_state_size`.
        ValueError: likewise.
    """
    reading = Reading(system_or_matrix, at, length, horizon)
    return reading.result(reading.spectra())


@full_precision()
@torch.no_grad()
def sketched_state_size(
    matrix: Tensor | DenseOperator,
    at: Positions = None,
    rank: int = 64,
    *,
    probes: int = 16,
    iterations: int = 2,
    horizon: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Estimate the entropy-ESS of long contexts by a randomized method, with its error.

    The leading singular values come from a randomized subspace iteration. The contribution of all
    others is estimated from random vectors by Lanczos quadrature, whose scatter gives the error.

    Args:
        matrix: (*C, L, L), lower triangular, or a `DenseOperator`.
        at: As in `effective_state_size`.
        rank: Number of singular values that are computed; blocks whose smaller side is at most
            twice as large are exact.
        probes: Number of random vectors for the others, at least 2.
        iterations: Number of subspace iterations, each with two products with the block.
        horizon: Blocks are `T[i:horizon, :i]`; default L.
        seed: Seed of the random vectors.

    Returns:
        The estimate and its error, (*C, len(at)) each: two standard errors, exceeded by one
        estimate in twenty; 0 where it is exact. It counts neither the errors of the leading values,
        which fall with every iteration, nor those of the quadrature, which are below a percent of
        what the others add.

    Raises:
        TypeError: if it is neither a tensor nor a dense operator.
        ValueError: as `effective_state_size`, for a rank below 1 or fewer than 2 probes.
    """
    if not isinstance(matrix, Tensor | DenseOperator):
        raise TypeError(
            f"a matrix or a DenseOperator is needed to sketch; got {type(matrix).__name__}."
        )
    if rank < 1 or probes < 2 or iterations < 0:
        raise ValueError(
            "rank must be at least 1, probes at least 2 and iterations at least 0; got "
            f"{rank}, {probes} and {iterations}."
        )
    reading = Reading(matrix, at, None, horizon)
    sizes, errors = sketched_sizes(
        reading.matrices(), reading.inside, rank, probes, iterations, seed, reading.floor()
    )
    return reading.result(sizes), reading.result(errors)


def _measure(name: str, tol: float | None, rtol: float | None) -> Measure:
    if name not in ("entropy", "tolerance"):
        raise ValueError(f'measure must be "entropy" or "tolerance"; got {name!r}.')
    if name == "entropy":
        if tol is not None or rtol is not None:
            raise ValueError(
                f'tol and rtol go with measure="tolerance"; got tol={tol!r}, rtol={rtol!r}.'
            )
        return Measure()
    if tol is None and rtol is None:
        raise ValueError('measure="tolerance" needs tol (absolute), rtol (relative) or both.')
    for label, value in (("tol", tol), ("rtol", rtol)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{label} must be a number of at least 0; got {value!r}.")
    return Measure(tol, rtol)
