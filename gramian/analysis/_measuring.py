"""Measure the state-sizes of recorded operators."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from gramian.analysis._recording import RecordedOperator
from gramian.analysis._report import LayerState
from gramian.ess import effective_state_size, theoretical_state_size

__all__ = ["joined", "measure_layer"]

_MATRIX_BYTES = 2**27  # the largest number of bytes of double-precision operators held at once


def measure_layer(
    recorded: RecordedOperator,
    positions: list[int],
    length: int,
    max_channels: int | None,
    options: dict[str, Any],
) -> LayerState:
    """Measure the state-sizes of a recorded layer, a few channels at a time."""
    step = 1 if max_channels is None else math.ceil(recorded.count / max_channels)
    chosen = range(0, recorded.count, step)
    size = max(1, _MATRIX_BYTES // (8 * length * length))
    ess, tss = [], []
    for begin in range(0, len(chosen), size):
        part = chosen[begin : begin + size]
        system = recorded.system(slice(part.start, part.stop, part.step))
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
        )
