r"""Measure the rank of the state that a recurrence holds while it reads an input.

A head of linear attention, of a gated recurrence or of the delta rule stores its past in a matrix
S_i with n rows and N columns, one column for each value channel. ESS is a property of the operator,
and bounds what any state must hold. The ranks here are properties of the state itself on one input:

- the *stable rank* `‖S‖_F² / ‖S‖₂² = Σ σ_k² / σ_1²` (Rudelson and Vershynin 2007,
  arXiv math/0503442), which one large direction makes small;
- the *effective rank* `exp(-Σ p_k log p_k)` with `p_k = σ_k / Σ σ_k` (Roy and Vetterli 2007), the
  entropy measure of ESS applied to the state.

Both lie between 1 and min(n, N, i) if the state is not zero. Attention has no such state: it stores
keys and values one by one, and their number is its TSS.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gramian.ess._reading import Positions, Reading
from gramian.ops.devices import in_double_precision
from gramian.systems import TimeVarying

__all__ = ["StateRanks", "state_ranks"]


class StateRanks(NamedTuple):
    """The ranks of states at P positions. They are 0 where the state is zero.

    Attributes:
        stable: (*C, P), the stable ranks.
        effective: (*C, P), the effective ranks.
    """

    stable: Tensor
    effective: Tensor


@in_double_precision
def state_ranks(
    system: TimeVarying, u: Tensor, at: Positions = None, *, initial: Tensor | None = None
) -> StateRanks:
    """Compute stable and effective rank of the state of a recurrence on an input.

    The state at position i is S_i, the memory of the inputs before i: `S_{i+1} = A_i S_i + B_i
    u_iᵀ`. The states are computed one after the other, and their singular values in double
    precision.

    Args:
        system: A recurrence with channels (*C) of L steps and order n, such as
            `gramian.mixers.Mixer.operator` returns for a linear recurrence.
        u: (*C, N, L), the N value channels on which each channel of the system acts.
        at: A position, or positions, 0 … L - 1, in any order; all by default.
        initial: (*C, n, N), the state at position 0; zero by default.

    Returns:
        The ranks, each (*C, P) in float64; (*C) if `at` is a single position.

    Raises:
        TypeError: if the system is not a `TimeVarying` system, or u is not a real tensor.
        ValueError: if a shape or position does not fit, or if a state is NaN or infinite.
    """
    if not isinstance(system, TimeVarying):
        raise TypeError(
            f"the rank of a state needs a TimeVarying system; got {type(system).__name__}."
        )
    if not isinstance(u, Tensor) or u.is_complex():
        raise TypeError(f"the inputs must be a real tensor; got {type(u).__name__}.")
    shape, length = tuple(system.channel_shape), system.length
    if u.ndim != len(shape) + 2 or tuple(u.shape[:-2]) != shape or u.shape[-1] != length:
        raise ValueError(
            f"inputs must be (*channels, N, L) with channels {shape} and L = {length}; got "
            f"{tuple(u.shape)}."
        )
    first = (*shape, system.order, u.shape[-2])
    if initial is not None and tuple(initial.shape) != first:
        raise ValueError(f"the initial state must be {first}; got {tuple(initial.shape)}.")
    reading = Reading(system, at, None, None)
    if not reading.positions:
        raise ValueError("there must be at least one position; got none.")
    start = u.new_zeros(first) if initial is None else initial
    found = _ranks(system, u.double(), start.double(), reading.positions)
    stable, effective = (torch.stack(part, -1) for part in zip(*found, strict=True))
    if reading.scalar:
        return StateRanks(stable[..., 0], effective[..., 0])
    return StateRanks(stable, effective)


def _ranks(
    system: TimeVarying, u: Tensor, state: Tensor, positions: list[int]
) -> list[tuple[Tensor, Tensor]]:
    """Return stable and effective rank, each (*C), at the positions in the given order."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    wanted = {*positions}
    axis = len(system.channel_shape)
    dense = system.A.ndim > system.B.ndim
    for i in range(max(positions) + 1):
        if i in wanted:
            found[i] = _rank(state, i)
        A, B = (x.select(axis, i).double().unsqueeze(-1) for x in (system.A, system.B))
        after = A.squeeze(-1) @ state if dense else A * state
        if system.p is not None and system.q is not None:
            p, q = (x.select(axis, i).double().unsqueeze(-1) for x in (system.p, system.q))
            after = after + p * (q * state).sum(-2, keepdim=True)
        state = after + B * u[..., i].unsqueeze(-2)  # (*C, n, N)
    return [found[i] for i in positions]


def _rank(state: Tensor, at: int) -> tuple[Tensor, Tensor]:
    if not bool(state.isfinite().all()):
        raise ValueError(f"the state at position {at} is not finite.")
    s = torch.linalg.svdvals(state)  # (*C, k)
    largest = s[..., :1]
    relative = torch.where(largest > 0, s / torch.where(largest > 0, largest, 1), 0)
    total = relative.sum(-1, keepdim=True)
    p = torch.where(total > 0, relative / torch.where(total > 0, total, 1), 0)
    held = largest.squeeze(-1) > 0
    effective = torch.where(held, torch.special.entr(p).sum(-1).exp(), 0)
    return relative.square().sum(-1), effective
