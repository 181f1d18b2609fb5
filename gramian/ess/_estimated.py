"""The public functions that estimate state-sizes over long contexts."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor

from gramian.ess._reading import Places, Positions, Reading
from gramian.ess.averages import average
from gramian.ess.quadrature import estimate_sizes
from gramian.ess.rows import RowOperator
from gramian.ops.devices import in_double_precision
from gramian.ops.precision import full_precision
from gramian.ops.threads import work
from gramian.systems import DenseOperator

__all__ = ["MeanStateSize", "estimated_mean_state_size", "estimated_state_size"]


@in_double_precision
@full_precision()
@torch.no_grad()
def estimated_state_size(
    operator: RowOperator | DenseOperator | Tensor,
    at: Positions = None,
    tolerance: float = 0.01,
    *,
    horizon: int | None = None,
    seed: int = 0,
    memory: int = 2**30,
) -> tuple[Tensor, Tensor]:
    """Estimate the entropy-ESS of long contexts from products with the blocks, with an error.

    Leading singular triples are deflated, and the other singular values enter through quadratures
    from random vectors, which are drawn until the error is within the tolerance. No block is
    formed, except those whose smaller side is at most 320, which are measured exactly. The operator
    may be given by its rows, so that it never needs L² numbers at once. The products are computed
    in single precision.

    Args:
        operator: An operator given by its rows, lower-triangular matrices (*C, L, L), or a
            `DenseOperator`.
        at: As in `effective_state_size`.
        tolerance: The relative error to reach, between 0.001 and 1.
        horizon: The position at which the blocks `T[i:horizon, :i]` end; by default L.
        seed: The seed of the random vectors.
        memory: The largest number of bytes of rows to keep. An operator of length L takes 2 L²
            bytes. If this is more than `memory`, its rows are computed again for every product.

    Returns:
        The estimate and its error, (*C, len(at)) each, in the dtype of the operator (float32 for
        half precision and for rows). The error is the sum of twice the standard error and of
        estimates of what the quadratures and the deflated space leave. It is 0 where the block is
        measured exactly, and above the tolerance where the largest number of random vectors does
        not suffice.

    Raises:
        TypeError: if `operator` is none of these.
        ValueError: if the tolerance, the positions or the horizon are invalid, or if a value is NaN
            or infinite. The message then names the channel.
    """
    operator, places, shape, dtype = _opened(operator, at, tolerance, horizon, memory)
    given = operator

    def one(channel: int) -> tuple[Tensor, Tensor]:
        rows = partial(given.rows, channel)
        try:
            return estimate_sizes(
                rows, places.horizon, places.inside, tolerance, seed, memory, given.device
            )
        except ValueError as error:
            raise ValueError(f"channel {channel}: {error}") from error

    like = torch.empty(0, device=given.device)
    found = work(one, range(shape.numel()), like)
    parts = zip(*found, strict=True) if found else [[], []]
    sizes, errors = (
        torch.stack([*part]) if part else like.new_zeros(0, len(places.inside)) for part in parts
    )
    return places.spread(sizes, shape, dtype), places.spread(errors, shape, dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class MeanStateSize:
    """The mean entropy-ESS over channels and positions, and what it comes from.

    Attributes:
        mean: The mean over all channels and positions.
        error: The error of the mean. It is 0 if all blocks are measured exactly.
        sizes: The estimate at each position, (*C, P), whose mean is `mean`.
        errors: The error of each estimate, (*C, P), 0 where it is exact.
        accurate: The number of blocks with an accurate estimate.
    """

    mean: float
    error: float
    sizes: Tensor
    errors: Tensor
    accurate: int


@in_double_precision
@full_precision()
@torch.no_grad()
def estimated_mean_state_size(
    operator: RowOperator | DenseOperator | Tensor,
    at: Positions = None,
    tolerance: float = 0.01,
    *,
    horizon: int | None = None,
    seed: int = 0,
    memory: int = 2**30,
) -> MeanStateSize:
    """Estimate the mean entropy-ESS over all channels and positions, with an error.

    Every block gets a rough estimate from 96 products, and blocks that are chosen at random get an
    accurate one, as of `estimated_state_size`. A regression of these on the rough estimates
    corrects all others (two-phase sampling; Cochran, *Sampling Techniques*, 1977, chapter 12). More
    blocks are chosen until the error of the mean is within the tolerance. Blocks whose smaller side
    is at most 128 are measured exactly, and if there are few others, all of these get an accurate
    estimate. `estimated_state_size` takes longer and brings every single estimate within the
    tolerance.

    Args:
        operator: As in `estimated_state_size`. The channels should be alike, such as the heads of a
            layer.
        at: As in `effective_state_size`, without repetitions.
        tolerance: The relative error of the mean to reach, between 0.001 and 1.
        horizon: The position at which the blocks `T[i:horizon, :i]` end; by default L.
        seed: The seed of the random vectors and of the choice of blocks.
        memory: As in `estimated_state_size`.

    Returns:
        The mean and the estimates. An error covers the truth in about 19 of 20 cases: it is the
        root of the sum of squares of a 95 % interval from the scatter of the accurate estimates
        around the regression, and of what their quadratures leave. The error of the mean is above
        the tolerance where accurate estimates of all blocks do not suffice. The errors of single
        estimates are larger than the tolerance.

    Raises:
        TypeError: if `operator` is none of these.
        ValueError: if the tolerance, the positions or the horizon are invalid, or if a value is NaN
            or infinite. The message then names the channel.
    """
    operator, places, shape, dtype = _opened(operator, at, tolerance, horizon, memory)
    if len(set(places.positions)) < len(places.positions):
        raise ValueError("positions of a mean must not repeat.")
    channels = shape.numel()
    if not channels or not places.positions:
        raise ValueError(
            f"a mean needs a channel and a position; got {channels} and {len(places.positions)}."
        )
    found = average(
        operator.rows,
        channels,
        places.horizon,
        places.inside,
        tolerance,
        seed,
        memory,
        operator.device,
    )
    sizes = places.spread(found.sizes, shape, dtype)
    count = channels * len(places.positions)
    return MeanStateSize(
        mean=float(found.sizes.sum()) / count,
        error=found.error * found.sizes.numel() / count,
        sizes=sizes,
        errors=places.spread(found.errors, shape, dtype),
        accurate=found.accurate,
    )


def _opened(
    operator: RowOperator | DenseOperator | Tensor,
    at: Positions,
    tolerance: float,
    horizon: int | None,
    memory: int,
) -> tuple[RowOperator, Places, torch.Size, torch.dtype]:
    """Check the arguments, and return the operator by its rows, the positions, and the shape of the
    channels and dtype of the result.
    """
    if not isinstance(operator, RowOperator | DenseOperator | Tensor):
        raise TypeError(
            "a RowOperator, a matrix or a DenseOperator is needed to estimate; got "
            f"{type(operator).__name__}."
        )
    if not 1e-3 <= tolerance < 1:
        raise ValueError(f"tolerance must be at least 0.001 and below 1; got {tolerance!r}.")
    if memory < 0:
        raise ValueError(f"memory must be at least 0 bytes; got {memory}.")
    if isinstance(operator, RowOperator):
        places = Places(at, None, horizon, operator.length, "RowOperator")
        return operator, places, torch.Size([operator.channels]), torch.float32
    reading = Reading(operator, at, None, horizon)
    matrices = reading.matrices()
    by_rows = RowOperator(
        lambda channel, rows: matrices[channel, rows],
        reading.horizon,
        max(reading.shape.numel(), 1),
        reading.device,
    )
    return by_rows, reading, reading.shape, reading.dtype
