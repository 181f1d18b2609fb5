r"""The public functions that measure how much memory a causal operator uses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gramian.ess._reading import Positions, Reading
from gramian.ess.measures import Measure
from gramian.ess.sketch import sketched_sizes
from gramian.ops.devices import in_double_precision
from gramian.ops.precision import full_precision
from gramian.systems import DenseOperator, System

__all__ = [
    "effective_state_size",
    "hankel_singular_values",
    "sketched_state_size",
]


@in_double_precision
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
    r"""Measure how much memory a causal operator uses at i: the numerical rank of `T[i:, :i]`.

    The rank of that Hankel block is the smallest state that a recurrence computing T can have
    before step i (arXiv 2504.19561, section 3). This rank is at most min(i, horizon - i), so every
    curve falls towards the horizon. Choose a horizon beyond the last position of interest.

    If an input requires a gradient, the entropy is differentiable. The computation then takes one
    singular value decomposition for each block or, for a `TimeVarying` system, for the factors of
    each block.

    Args:
        system_or_matrix: A system, channels (*C), or matrices (*C, L, L), whose entries above the
            diagonal are not read.
        at: The positions i, each in 0 … horizon - 1. An integer removes the dimension of positions
            from the result. By default the first `length` positions.
        measure: "entropy" is `exp(-Σ p log p)` of the normalized singular values p. "tolerance" is
            the number of singular values above `tol` and above `rtol` times the largest. Such a
            count is exact unless a singular value of the block is nearer to the threshold than
            1e-13 times the largest. With a threshold below that, rounding errors are counted too.
        tol: The absolute tolerance, as in the paper; for "tolerance" only.
        rtol: The relative tolerance; for "tolerance" only.
        length: The number of positions; by default all positions of the operator. A time-invariant
            system has no end, so it needs either `length` or `at`.
        horizon: The position at which the blocks `T[i:horizon, :i]` end; by default the operator's
            end. For a time-invariant system the default is twice the number of positions, so that
            horizon - i does not limit the rank.

    Returns:
        (*C, len(at)), in the dtype of the input (float32 for half precision). Values are computed
        in float64. Counts are exact, and entropies are accurate to 1e-6, since singular value
        decompositions replace Gram matrices that would be less accurate. The value is 0 at position
        0, and where ‖H_i‖_F ≤ eps ‖T‖_F, with the eps of the returned dtype.

    Raises:
        TypeError: if the input is neither a system nor a tensor.
        ValueError: if the measure, tolerance, positions, length or horizon are invalid, if the norm
            of an operator is not between 1e-140 and 1e140, or if a value is NaN or infinite. The
            message then names the first channel with such a value.
    """
    chosen = _measure(measure, tol, rtol)
    reading = Reading(system_or_matrix, at, length, horizon)
    if not reading.needs_gradient:
        return reading.result(reading.measured(chosen))
    if chosen.counts:
        raise ValueError('a count has no gradient: use measure="entropy", or detach the input.')
    return reading.result(reading.differentiable(chosen))


@in_double_precision
@full_precision()
def hankel_singular_values(
    system_or_matrix: System | Tensor,
    at: Positions = None,
    *,
    length: int | None = None,
    horizon: int | None = None,
) -> Tensor:
    """Compute the singular values of `T[i:horizon, :i]` at many positions i.

    Args:
        system_or_matrix: As in `effective_state_size`.
        at: As in `effective_state_size`.
        length: As in `effective_state_size`.
        horizon: As in `effective_state_size`.

    Returns:
        (*C, len(at), k), descending and followed by zeros. Here k is the largest rank that any of
        the blocks can have, which is at most n for a recurrence. The values are computed in float64
        and returned in the dtype of the input (float32 for half precision). No gradient flows
        through them.

    Raises:
        TypeError: if the input is neither a system nor a tensor.
        ValueError: if the positions, length or horizon are invalid, or if a value is NaN or
            infinite. The message then names the first channel with such a value.
    """
    reading = Reading(system_or_matrix, at, length, horizon)
    return reading.result(reading.spectra())


@in_double_precision
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
    """Estimate the entropy-ESS of long contexts by a randomized method, with the estimate's error.

    The leading singular values come from a randomized subspace iteration. The contribution of all
    other values is estimated from random vectors by Lanczos quadrature. The scatter of the results
    for different vectors gives the error.

    Args:
        matrix: Lower-triangular matrices (*C, L, L), or a `DenseOperator`.
        at: As in `effective_state_size`.
        rank: The number of leading singular values to compute. A block whose smaller side is at
            most twice this number is measured exactly.
        probes: The number of random vectors for the other singular values, at least 2.
        iterations: The number of subspace iterations, each of which takes two products with the
            block.
        horizon: The position at which the blocks `T[i:horizon, :i]` end; by default L.
        seed: The seed of the random vectors.

    Returns:
        The estimate and its error, (*C, len(at)) each. The error is twice the standard error. In
        one case of twenty, the estimate is farther from the truth than this. The error is 0 where
        the estimate is exact. It does not include the errors of the leading values, which fall with
        every iteration. Nor does it include the errors of the quadrature, which are below a percent
        of the contribution of the other values.

    Raises:
        TypeError: if `matrix` is neither a tensor nor a dense operator.
        ValueError: if the positions or the horizon are invalid, if a value is NaN or infinite, if
            `rank` is below 1, if `probes` is below 2, or if `iterations` is negative.
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
