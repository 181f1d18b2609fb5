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
from gramian.ess import StateRanks, effective_state_size, theoretical_state_size

__all__ = ["joined", "measure_layer"]

_MATRIX_BYTES = 2**27  # the largest number of bytes of double-precision operators held at once


def measure_layer(
    recorded: RecordedOperator,
    positions: list[int],
    length: int,
    max_channels: int | None,
    options: dict[str, Any],
    ranks: bool = False,
) -> LayerState:
    """Measure the state-sizes of a recorded layer, a few channels at a time.

    Args:
        recorded: The layer.
        positions: The positions.
        length: Number of tokens.
        max_channels: Largest number of channels to measure; None measures all.
        options: Options of `effective_state_size`.
        ranks: Whether to measure the ranks of the layer's states, if it has any.
    """
    step = 1 if max_channels is None else math.ceil(recorded.count / max_channels)
    chosen = range(0, recorded.count, step)
    size = max(1, _MATRIX_BYTES // (8 * length * length))
    ess, tss = [], []
    of_states: list[StateRanks | None] = []
    for begin in range(0, len(chosen), size):
        part = chosen[begin : begin + size]
        channels = slice(part.start, part.stop, part.step)
        system = recorded.system(channels)
        try:
            sizes = effective_state_size(system, positions, horizon=length, **options)
        except ValueError as error:
            raise ValueError(f"{recorded.name}: {error}") from error
        capacity = theoretical_state_size(system, positions, horizon=length)
        ess.append(sizes.reshape(-1, len(positions)).float().cpu())
        capacity = capacity.reshape(-1, len(positions)).float().cpu()
        if recorded.orders is not None:
            orders = recorded.orders[part.start : part.stop : part.step].float().cpu()
            capacity = capacity.minimum(orders[:, None])
        tss.append(capacity)
        if ranks and recorded.states is not None:
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
        stable_rank=torch.cat([one.stable for one in found]) if found else None,
        effective_rank=torch.cat([one.effective for one in found]) if found else None,
    )


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
            stable_rank=_joined([part.stable_rank for part in parts]),
            effective_rank=_joined([part.effective_rank for part in parts]),
        )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Join tensors along their first dimension. The result is None if one of them is."""
    found = [part for part in parts if part is not None]
    return torch.cat(found) if len(found) == len(parts) else None
