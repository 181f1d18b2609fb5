r"""Theoretical state-size, utilization, and averages and totals over a model.

TSS, the theoretically realizable state-size, is the size of the state that a layer has at a
position. For a recurrence this size is the order. For attention and finite convolutions it is the
number of inputs so far on which a later output can still depend. The rank of the block `T[i:L, :i]`
is at most min(i, L - i), so the *usable* state at position i is min(TSS, i, L - i). Utilization is
the share ESS / TSS or, if the usable state takes the place of TSS, the share of the state that can
be used. Reports of `gramian.analyze` show the latter as "in use". For a model, ESS is reported as
the *average* per channel or as the *total* over all channels (arXiv 2504.19561, sections 3 and 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from gramian.ess._reading import Places, Positions, Reading
from gramian.ess.rows import RowOperator
from gramian.ops.devices import in_double_precision
from gramian.systems import (
    FIR,
    DenseOperator,
    Modal,
    StateSpace,
    System,
    TimeVarying,
    TransferFunction,
)

_ROWS = 512
"""The number of rows of a matrix that are looked at together."""

__all__ = ["aggregate", "theoretical_state_size", "usable_state_size", "utilization"]


@in_double_precision
def theoretical_state_size(
    system_or_matrix: System | Tensor | RowOperator,
    at: Positions = None,
    *,
    length: int | None = None,
    horizon: int | None = None,
) -> Tensor:
    """Compute TSS, the size of the state at a position, whether or not the system uses it all.

    Args:
        system_or_matrix: As in `gramian.effective_state_size`; or an operator given by its rows.
        at: As in `gramian.effective_state_size`.
        length: As in `gramian.effective_state_size`.
        horizon: As in `gramian.effective_state_size`.

    Returns:
        (*C, len(at)), in the dtype of the input (float32 for half precision). For a recurrence, TSS
        is the order n of each channel. FIR systems keep their inputs, so it is min(i, order).
        Matrices keep the inputs before i on which an output from i to the horizon depends: all i of
        them if no entry is zero, and those inside of the window for attention with a window. If
        coefficients are zero, so that no input reaches a state or no output depends on it, this
        state is padding and does not count.

    Raises:
        TypeError: if the input is neither a system nor a tensor.
        ValueError: if the positions, length or horizon are invalid, or if a value is NaN or
            infinite.
    """
    if isinstance(system_or_matrix, RowOperator):
        places = Places(at, length, horizon, system_or_matrix.length, "RowOperator")
        counts = [
            _kept_inputs(partial(system_or_matrix.rows, c), places, system_or_matrix.device)
            for c in range(system_or_matrix.channels)
        ]
        sizes = torch.stack(counts).to(torch.float32)
        return sizes[..., 0] if places.scalar else sizes
    reading = Reading(system_or_matrix, at, length, horizon)
    system = reading.system
    positions = torch.tensor(reading.positions, dtype=torch.float64, device=reading.device)
    if isinstance(system, DenseOperator):
        counts = [_kept_inputs(m.__getitem__, reading, reading.device) for m in reading.matrices()]
        sizes = torch.stack(counts) if counts else positions.new_zeros(0, len(positions))
        sizes = sizes.reshape(*reading.shape, len(positions))
    elif isinstance(system, FIR):
        sizes = positions.clamp_max(system.order).expand(*reading.shape, -1)
    else:
        assert isinstance(system_or_matrix, System)
        orders = _orders(system_or_matrix).double().unsqueeze(-1)
        sizes = orders.expand(*reading.shape, len(positions))
    dtype = reading.dtype if reading.dtype in (torch.float32, torch.float64) else torch.float32
    return (sizes[..., 0] if reading.scalar else sizes).to(dtype)


@torch.no_grad()
def _kept_inputs(rows: Callable[[slice], Tensor], places: Places, device: torch.device) -> Tensor:
    """Count the inputs before each position on which later outputs depend, (P), float64.

    Input j is kept at position i, j < i, if a row of `T[i:horizon, j]` is not zero.

    Args:
        rows: A function that maps a slice of rows to the rows of T, as in `RowOperator`.
        places: The positions and the horizon.
        device: The device of the rows.
    """
    last = torch.full((places.horizon,), -1, device=device)  # row of the last entry of a column
    needed = max(places.positions, default=0)  # later columns are inputs of no position
    for start in reversed(range(0, places.horizon, _ROWS)):
        stop = min(start + _ROWS, places.horizon)
        if stop <= min(places.positions, default=stop):
            break
        if bool((last[: min(stop, needed)] >= 0).all()):
            continue  # later rows have entries in all of these columns
        there = rows(slice(start, stop))[:, :stop].tril(start) != 0
        number = torch.arange(start, stop, device=device).unsqueeze(-1)
        last[:stop] = torch.maximum(last[:stop], torch.where(there, number, -1).amax(0))
    positions = torch.tensor(places.positions, device=device).unsqueeze(-1)
    before = torch.arange(places.horizon, device=device) < positions  # (P, horizon)
    return (before & (last >= positions)).sum(-1).double()


def _orders(system: System) -> Tensor:
    """Count, for every channel, the states that link its input to its output, (*C)."""
    if isinstance(system, Modal):
        return system.orders
    if isinstance(system, TransferFunction):
        place = torch.arange(1, system.order + 1, device=system.device)
        used = ((system.a != 0) | (system.b != 0)).expand(*system.channel_shape, -1)
        return torch.nn.functional.pad(used * place, (1, 0)).amax(-1)
    if isinstance(system, StateSpace):
        A, B, C = system.A != 0, system.B != 0, system.C != 0
    elif isinstance(system, TimeVarying):
        axis = len(system.channel_shape)
        A, B, C = (_ever(value, axis) for value in (system.A, system.B, system.C))
        if A.ndim == B.ndim:
            A = torch.diag_embed(A)
        if system.p is not None and system.q is not None:
            A = A | (_ever(system.p, axis).unsqueeze(-1) & _ever(system.q, axis).unsqueeze(-2))
    else:
        return torch.full(system.channel_shape, system.order, device=system.device)
    return (_closure(A, B) & _closure(A.mT, C)).sum(-1)


def _ever(value: Tensor, axis: int) -> Tensor:
    """Return where a coefficient is nonzero at some step along `axis`."""
    if value.shape[axis] and value.stride(axis) == 0:  # a constant coefficient
        return value.select(axis, 0) != 0
    return (value != 0).any(axis)


def _closure(edges: Tensor, start: Tensor) -> Tensor:
    """Return the states (*C, n) that the states `start` (*C, n) influence, including these.

    The `edges` (*C, n, n) lead from the second index to the first.
    """
    while True:
        further = start | (edges & start.unsqueeze(-2)).any(-1)
        if bool((further == start).all()):
            return start
        start = further


def usable_state_size(tss: Tensor, at: Sequence[int] | Tensor, horizon: int) -> Tensor:
    """Return the size of the state that can be used at each position, min(TSS, i, L - i).

    The block of position i, `T[i:L, :i]`, has i columns and L - i rows, and L is the horizon. So
    ESS is at most this size, whatever the system.

    Args:
        tss: (*C, P), from `theoretical_state_size`.
        at: The P positions i.
        horizon: The position L at which the blocks end.

    Returns:
        (*C, P), in the dtype of `tss`.

    Raises:
        ValueError: if a position is negative or above the horizon, or if their number is not P.
    """
    positions = torch.as_tensor(at, device=tss.device)
    if positions.shape != tss.shape[-1:]:
        raise ValueError(
            f"one position for each of the {tss.shape[-1]} sizes is needed; got shape "
            f"{tuple(positions.shape)}."
        )
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) <= horizon:
        raise ValueError(
            f"positions must be among 0 … {horizon}, the horizon; got {positions.tolist()}."
        )
    return tss.minimum(torch.minimum(positions, horizon - positions).to(tss.dtype))


def utilization(ess: Tensor, tss: Tensor) -> Tensor:
    """Return ESS / TSS, the fraction of the state in use. It is 0 for a system without a state.

    With sizes from `usable_state_size` in place of TSS, it is the fraction of the usable state, as
    `gramian.analysis.LayerState.utilization` has it.

    Args:
        ess: Sizes from `gramian.effective_state_size`.
        tss: Sizes from `theoretical_state_size` or `usable_state_size`, which broadcast against
            `ess`.
    """
    return torch.where(tss > 0, ess / torch.where(tss > 0, tss, 1), 0)


def aggregate(
    sizes: Tensor | Sequence[Tensor], kind: str = "average", *, over_positions: bool = True
) -> Tensor:
    """Aggregate state-sizes over positions, channels, heads and layers.

    Positions are averaged, never added, since memory is reused from step to step.

    Args:
        sizes: (*C, P): the ESS or TSS of the channels and heads of a layer. Or a sequence of such
            tensors, one for each layer, all at the same positions.
        kind: "average" is the mean over channels and then over layers, so that all layers have the
            same weight. "total" is the sum over channels and layers.
        over_positions: Whether to average over positions too.

    Returns:
        (), or (P) if `over_positions` is false.

    Raises:
        ValueError: if `kind` is neither of these, if there are no layers, or if the layers have
            different numbers of positions.
    """
    if kind not in ("average", "total"):
        raise ValueError(f'kind must be "average" or "total"; got {kind!r}.')
    layers = [sizes] if isinstance(sizes, Tensor) else list(sizes)
    if len({layer.shape[-1:] for layer in layers}) != 1 or not layers[0].ndim:
        raise ValueError(
            "one tensor (*channels, positions) for each layer is needed, with the same positions; "
            f"got shapes {[tuple(layer.shape) for layer in layers]}."
        )
    rows = [layer.reshape(-1, layer.shape[-1]) for layer in layers]
    if kind == "total":
        result = torch.stack([row.sum(0) for row in rows]).sum(0)
    else:
        result = torch.stack([row.mean(0) for row in rows]).mean(0)
    return result.mean(-1) if over_positions else result
