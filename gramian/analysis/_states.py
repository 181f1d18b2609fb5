"""Measure the ranks of the states that recorded recurrences hold.

The state of a head is a matrix with a column for each of its N value channels. If N is 1, it is a
vector, and its rank says nothing. Attention and convolutions have no such state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from gramian.ess import StateRanks, state_ranks
from gramian.mixers import LinearRecurrence, Mixer
from gramian.systems import System, TimeVarying

if TYPE_CHECKING:
    from gramian.analysis._scans import ScanReading

__all__ = ["States", "measure_ranks", "mixer_states", "scan_states"]

States = Callable[[slice], tuple[Tensor, Tensor | None]]
"""A function that maps a slice of heads to what a recurrence reads: the values (h, N, L), and the
state before the first value, (h, n, N), which is None if it is zero."""


def mixer_states(mixer: Mixer, x: Tensor) -> States | None:
    """Return what a linear recurrence of Gramian reads on an input (1, L, width), or None."""
    if not isinstance(mixer, LinearRecurrence) or mixer.value_width < 2:
        return None

    def states(channels: slice) -> tuple[Tensor, Tensor | None]:
        return mixer.features(x, None, None)[1][0, channels].mT, None

    return states


def scan_states(reading: ScanReading) -> States | None:
    """Return what a scan reads, or None if its heads have one value channel."""
    if reading.values.shape[1] < 2:
        return None

    def states(channels: slice) -> tuple[Tensor, Tensor | None]:
        start = reading.initial
        return reading.values[channels], None if start is None else start[channels].mT

    return states


def measure_ranks(
    system: System, states: States, channels: slice, positions: Sequence[int]
) -> StateRanks | None:
    """Return the ranks of some heads' states, each (h, P), or None if the system has none.

    Args:
        system: The system of the heads.
        states: What the system reads.
        channels: The heads.
        positions: The P positions.
    """
    if not isinstance(system, TimeVarying):
        return None
    values, start = states(channels)
    heads = system.reshape_channels(system.channel_shape.numel())
    found = state_ranks(heads, values.to(heads.device), positions, initial=start)
    return StateRanks(*(part.float().cpu() for part in found))
