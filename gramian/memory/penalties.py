r"""Compute losses that make gates forget less, or pull state-sizes towards a target.

Both losses are functions of operators. `mixer.operator(x)` returns the operator of one mixer, and
`gramian.memory.Observer` returns those of all mixers in a forward pass. Gradients flow into the
tensors from which the operators were computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gramian.ess import effective_state_size, theoretical_state_size, utilization
from gramian.ops.devices import in_double_precision
from gramian.systems import System, TimeVarying

__all__ = ["check_goal", "ess_penalty", "gate_regularizer"]


def gate_regularizer(operators: System | Sequence[System], *, normalize: bool = True) -> Tensor:
    r"""Return `‖A - I‖`, the distance of state matrices from the identity, which forgets nothing.

    For every operator this is the root of the mean, over channels and steps, of `‖A_t - I‖_F² / n`.
    The result is the mean over operators. Steps that neither forget nor read anything, such as the
    steps at padding, do not count. Added to a loss with a factor λ, the result restores memories
    that have collapsed because their gates forget too fast (arXiv 2504.19561, on state collapse).
    The cost is linear in the number of coefficients, since the operators are not computed as
    matrices.

    The paper writes the loss as `λ ‖A - I‖_F`. Without normalization, the distance of an operator
    is this Frobenius norm over all its channels and steps, `(Σ ‖A_t - I‖_F²)^(1/2)`. It is √(N n)
    times the normalized distance, where N is the number of channels and steps that count. So a λ
    then holds for one batch size, length and size of the state.

    Args:
        operators: One or more systems. The `TimeVarying` systems are used, whether their state
            matrices are diagonal, diagonal plus rank one, or dense. Other systems have no gates and
            are skipped.
        normalize: Whether to divide the sum of squares by the number of its terms, N n.

    Returns:
        A scalar of the operators' dtype, through which gradients flow.

    Raises:
        TypeError: if an operator is not a system.
        ValueError: if no operator is a `TimeVarying` system with a state.
    """
    distances = []
    for system in _systems(operators):
        if isinstance(system, TimeVarying) and system.A.numel():
            distance = _distance_from_identity(system)
            squares = distance.sum()
            if normalize:
                steps = ((distance > 0) | (system.B != 0).any(-1)).sum().clamp_min(1)
                squares = squares / (steps * system.order)
            # The root is not differentiable at zero, where all gates are 1 (linear attention).
            positive = squares > 0
            root = torch.where(positive, squares, 1).sqrt()
            distances.append(torch.where(positive, root, 0))
    if not distances:
        raise ValueError(
            "a gate regularizer needs a TimeVarying system, that of a linear recurrence on some "
            "input; there is none among these operators."
        )
    return torch.stack(distances).mean()


def _distance_from_identity(system: TimeVarying) -> Tensor:
    """Return `‖A_t - I‖_F²` at every step of a system, (*C, L)."""
    if system.A.ndim > system.B.ndim:
        eye = torch.eye(system.order, dtype=system.dtype, device=system.device)
        return (system.A - eye).square().sum((-2, -1))
    rest = system.A - 1
    squares = rest.square().sum(-1)
    if system.p is None or system.q is None:
        return squares
    p, q = system.p, system.q
    crossed = (rest * p * q).sum(-1)
    return squares + 2 * crossed + p.square().sum(-1) * q.square().sum(-1)


def check_goal(target: float | None, share: float | None) -> None:
    """Raise a ValueError unless exactly one of target and share is given, within its bounds.

    Args:
        target: A state-size, positive and finite.
        share: A share of the size of the state, above 0 and at most 1.
    """
    if (target is None) == (share is None):
        raise ValueError(f"give target or share, one of the two; got {target!r} and {share!r}.")
    if target is not None and not (math.isfinite(target) and target > 0):
        raise ValueError(f"the target must be a positive state-size; got {target!r}.")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"the share must lie above 0 and be at most 1; got {share!r}.")


@in_double_precision
def ess_penalty(
    operators: System | Sequence[System],
    target: float | None = None,
    *,
    share: float | None = None,
    at: int | Sequence[int] | Tensor | None = None,
    horizon: int | None = None,
) -> Tensor:
    r"""Return the squared relative distance of effective state-sizes from a target.

    The distance is `(ESS / target - 1)²`, or, with a share, `(ESS / TSS - share)²`. It is averaged
    over positions and channels, and then over operators. ESS is the entropy-ESS of
    `gramian.effective_state_size`, and TSS the size of the state. For a recurrence, a position
    takes O(L n²) operations in the forward and in the backward pass. For a matrix, it takes a
    singular value decomposition of a block. So use few positions, channels and sequences.

    Args:
        operators: One or more systems. All of their channels are used.
        target: Target state-size, positive.
        share: Target utilization of the state, ESS / TSS, in (0, 1]. It replaces `target`.
        at: Positions at which ESS is measured; by default a quarter, a half and three quarters of
            an operator's length.
        horizon: The position at which the blocks `T[i:horizon, :i]` end, as in
            `gramian.effective_state_size`.

    Returns:
        A scalar, through which gradients flow.

    Raises:
        TypeError: if an operator is not a system.
        ValueError: unless exactly one of `target` and `share` is given, within its bounds. Also if
            a position is outside of an operator, or if no positions are given and a system has
            unlimited length.
    """
    check_goal(target, share)
    penalties = []
    for system in _systems(operators):
        positions = _spread(system) if at is None else at
        sizes = effective_state_size(system, positions, horizon=horizon)
        if target is not None:
            distance = sizes / target - 1
        elif share is not None:
            capacity = theoretical_state_size(system, positions, horizon=horizon)
            distance = utilization(sizes, capacity) - share
        if distance.numel():
            penalties.append(distance.square().mean())
    if not penalties:
        raise ValueError("there are no channels and positions to take state-sizes of.")
    return torch.stack(penalties).mean()


def _spread(system: System) -> list[int] | None:
    """Return the quarters of a system's length, or None if its length is unlimited."""
    length = getattr(system, "length", None)
    if length is None:
        return None
    return sorted({int(length * part) for part in (0.25, 0.5, 0.75)} - {0})


def _systems(operators: System | Sequence[System]) -> list[System]:
    systems = [operators] if isinstance(operators, System) else list(operators)
    for system in systems:
        if not isinstance(system, System):
            raise TypeError(f"operators must be systems; got a {type(system).__name__}.")
    return systems
