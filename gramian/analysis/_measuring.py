"""Measure the state-sizes of recorded operators."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gramian.analysis._recording import RecordedOperator
from gramian.analysis._report import LayerState
from gramian.analysis._states import measure_ranks
from gramian.ess import (
    RowOperator,
    StateRanks,
    effective_state_size,
    estimated_mean_state_size,
    theoretical_state_size,
)
from gramian.systems import DenseOperator, System

__all__ = ["check_tolerance", "joined", "measure_layer"]

_MATRIX_BYTES = 2**27  # the largest number of bytes of double-precision operators held at once


def check_tolerance(tolerance: float | None, measure: str) -> None:
    """Check that state-sizes can be estimated with a tolerance.

    Raises:
        ValueError: if the tolerance is out of range, or if the measure cannot be estimated.
    """
    if tolerance is None:
        return
    if measure != "entropy":
        raise ValueError(f'tolerance goes with measure="entropy"; got {measure!r}.')
    estimated_mean_state_size(torch.eye(2), tolerance=tolerance)  # raises its error


def measure_layer(
    recorded: RecordedOperator,
    positions: list[int],
    length: int,
    max_channels: int | None,
    options: dict[str, Any],
    ranks: bool = False,
    tolerance: float | None = None,
) -> LayerState:
    """Measure the state-sizes of a recorded layer, a few channels at a time.

    Args:
        recorded: The layer.
        positions: The positions.
        length: Number of tokens.
        max_channels: Largest number of channels to measure; None measures all.
        options: Options of `effective_state_size`.
        ranks: Whether to measure the ranks of the layer's states, if it has any.
        tolerance: Relative error up to which the mean state-size of matrices, and of operators that
            are given by their rows, is estimated; None to measure exactly.
    """
    step = 1 if max_channels is None else math.ceil(recorded.count / max_channels)
    chosen = range(0, recorded.count, step)
    size = max(1, _MATRIX_BYTES // (8 * length * length))
    if tolerance is not None and recorded.reader == "attention":
        size = max(1, len(chosen))  # nothing is held in double precision
    ess, tss, errors, of_means = [], [], [], []
    of_states: list[StateRanks | None] = []
    for begin in range(0, len(chosen), size):
        part = chosen[begin : begin + size]
        channels = slice(part.start, part.stop, part.step)
        system = recorded.system(channels)
        try:
            sizes, stated, of_mean = _sizes(system, positions, length, options, tolerance)
        except ValueError as error:
            raise ValueError(f"{recorded.name}: {error}") from error
        capacity = theoretical_state_size(system, positions, horizon=length)
        ess.append(sizes.reshape(-1, len(positions)).float().cpu())
        errors.append(stated.reshape(-1, len(positions)).float().cpu())
        of_means.append(of_mean)
        capacity = capacity.reshape(-1, len(positions)).float().cpu()
        if recorded.orders is not None:
            orders = recorded.orders[part.start : part.stop : part.step].float().cpu()
            capacity = capacity.minimum(orders[:, None])
        tss.append(capacity)
        if ranks and recorded.states is not None and isinstance(system, System):
            of_states.append(measure_ranks(system, recorded.states, channels, positions))
    found = [one for one in of_states if one is not None]
    return LayerState(
        name=recorded.name,
        mixer=recorded.mixer,
        kind=recorded.kind,
        channels=tuple(chosen),
        count=recorded.count,
        ess=torch.cat(ess),
        tss=torch.cat(tss),
        reader=recorded.reader,
        storage=recorded.storage,
        auxiliary=recorded.auxiliary,
        stable_rank=torch.cat([one.stable for one in found]) if found else None,
        effective_rank=torch.cat([one.effective for one in found]) if found else None,
        error=_stated(errors),
        mean_error=_of_mean([len(part) for part in ess], of_means),
    )


def _sizes(
    system: System | RowOperator,
    positions: list[int],
    length: int,
    options: dict[str, Any],
    tolerance: float | None,
) -> tuple[Tensor, Tensor, float]:
    """Return state-sizes, their errors, and the error of their mean. Those of exact sizes are 0."""
    if isinstance(system, RowOperator) or (
        isinstance(system, DenseOperator) and tolerance is not None
    ):
        assert tolerance is not None
        found = estimated_mean_state_size(system, positions, tolerance, horizon=length)
        return found.sizes, found.errors, found.error
    sizes = effective_state_size(system, positions, horizon=length, **options)
    return sizes, torch.zeros_like(sizes), 0.0


def _stated(errors: list[Tensor]) -> Tensor | None:
    """Join the errors of the parts of a layer. They are None if all sizes are exact."""
    error = torch.cat(errors)
    return error if bool(error.any()) else None


def _of_mean(counts: list[int], errors: list[float]) -> float | None:
    """Join the errors of the means of parts of `counts` channels, or None if all are exact."""
    squares = sum((count * error) ** 2 for count, error in zip(counts, errors, strict=True))
    return math.sqrt(squares) / sum(counts) if squares > 0 else None


def joined(layers: list[LayerState]) -> Iterator[LayerState]:
    """Yield the layers. Join the heads or channels of layers that have the same name."""
    by_name: dict[str, list[LayerState]] = {}
    for layer in layers:
        by_name.setdefault(layer.name, []).append(layer)
    for parts in by_name.values():
        if len(parts) == 1:
            yield parts[0]
            continue
        before = [sum(part.count for part in parts[:i]) for i in range(len(parts))]
        channels = [c + b for part, b in zip(parts, before, strict=True) for c in part.channels]
        yield LayerState(
            name=parts[0].name,
            mixer=parts[0].mixer,
            kind=parts[0].kind,
            channels=tuple(channels),
            count=sum(part.count for part in parts),
            ess=torch.cat([part.ess for part in parts]),
            tss=torch.cat([part.tss for part in parts]),
            reader=parts[0].reader,
            storage=parts[0].storage,
            auxiliary=parts[0].auxiliary,
            stable_rank=_joined([part.stable_rank for part in parts]),
            effective_rank=_joined([part.effective_rank for part in parts]),
            error=_joined_errors(parts),
            mean_error=_of_mean(
                [len(part.ess) for part in parts], [part.mean_error or 0.0 for part in parts]
            ),
        )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Join tensors along their first dimension. The result is None if one of them is."""
    found = [part for part in parts if part is not None]
    return torch.cat(found) if len(found) == len(parts) else None


def _joined_errors(parts: list[LayerState]) -> Tensor | None:
    """Join the errors of layers. Those of exact layers are 0, if others have errors."""
    if all(part.error is None for part in parts):
        return None
    errors = [torch.zeros_like(part.ess) if part.error is None else part.error for part in parts]
    return torch.cat(errors)
