r"""Time-varying systems: linear recurrences whose coefficients change at every step.

A system computes `x_{i+1} = A_i x_i + B_i u_i` and `y_i = C_i x_i + D_i u_i` for i = 0 … L - 1. On
a given input, gated linear attention, selective state spaces and the delta rule apply such a system
to their values. The state matrix is diagonal (gates), diagonal plus rank one (the delta rule's
`α (I - β k kᵀ)`), or dense.

In the notation of linear attention, `S_t = diag(α_t) S_{t-1} + k_t v_t`, `o_t = q_t S_t`, the
system has `A = α`, `B = k`, `C = α q`, `D = q · k`. Its state is the memory *before* the present
input, which contributes to the output through D.

An input is processed in blocks, in about log₂ L rounds of matrix products (`gramian.ops.scan`).
A single signal through a diagonal system is processed step by step (`gramian.ops.diagonal_scan`).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from typing_extensions import Self

from gramian.ops.diagonal_scan import apply_diagonal
from gramian.ops.scan import (
    Dense,
    Diagonal,
    DiagonalPlusLowRank,
    Transition,
    bounded_products,
    join,
    run_blocks,
    step_by_step,
)
from gramian.ops.vandermonde import group_channels
from gramian.systems._finite import FiniteSystem
from gramian.systems._recurrence import VectorRecurrence
from gramian.systems._state import State, define_state
from gramian.systems._system import check_tensor, working_dtype

__all__ = ["TimeVarying", "TimeVaryingRecurrence", "TimeVaryingState"]


@define_state
class TimeVaryingState(State):
    """The state of a time-varying system.

    Attributes:
        x: (*B, *C', n): the state vector.
        position: (), int64 on the CPU: the number of steps taken.
    """

    x: Tensor
    position: Tensor

    def restart(self) -> TimeVaryingState:
        """Return the same memory at position 0, as the initial state of the next system."""
        return TimeVaryingState(self.x, torch.zeros_like(self.position))


@dataclasses.dataclass(frozen=True, eq=False)
class TimeVarying(FiniteSystem[TimeVaryingState]):
    """`x_{i+1} = A_i x_i + B_i u_i`, `y_i = C_i x_i + D_i u_i` for L steps.

    A system has exactly L steps. An input of fewer samples uses the first steps. An input, or a
    series of chunks, of more than L samples is an error. The state counts the steps.
    `state.restart()` carries the memory into another system, which describes the next stretch of an
    endless input.

    Args:
        A: (*C, L, n), real: the diagonals of the state matrices; or (*C, L, n, n): dense matrices.
        B: (*C, L, n), real: the input vectors.
        C: (*C, L, n), real: the output vectors.
        D: (*C, L), real: the direct terms.
        p: (*C, L, n), real, or None. If p and q are given, the state matrices are
            `diag(A_i) + p_i q_iᵀ`.
        q: (*C, L, n), real, or None: see p.

    Raises:
        TypeError: if a field is not a real floating-point tensor.
        ValueError: if the shapes do not fit together, or if only one of p and q is given.
    """

    _kind = "time-varying system"
    _state_types = (TimeVaryingState,)

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    p: Tensor | None = None
    q: Tensor | None = None

    def __post_init__(self) -> None:
        names = ["A", "B", "C", "D"]
        if self.p is not None or self.q is not None:
            names += ["p", "q"]
        for name in names:
            value = getattr(self, name)
            check_tensor(f"{name} of a time-varying system", value)
            if not value.dtype.is_floating_point:
                raise TypeError(
                    f"{name} of a time-varying system must be real floating point; got "
                    f"{value.dtype}."
                )
        vector = (*self.D.shape, self.B.shape[-1] if self.B.ndim else 0)
        diagonal = self.A.ndim == self.B.ndim
        expected = [vector if diagonal else (*vector, vector[-1])] + [vector] * (len(names) - 2)
        given = [tuple(getattr(self, name).shape) for name in names if name != "D"]
        if given != expected or self.D.ndim == 0:
            raise ValueError(
                "a time-varying system takes A (*channels, L, n) or (*channels, L, n, n), B, C and "
                "(with a diagonal A) p and q (*channels, L, n), and D (*channels, L); got "
                f"{', '.join(f'{name} {tuple(getattr(self, name).shape)}' for name in names)}."
            )
        if len(names) == 6 and not diagonal:
            raise ValueError("p and q belong to a diagonal A: add their product to a dense one.")

    @property
    def channel_shape(self) -> torch.Size:
        return self.D.shape[:-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.D.dtype

    @property
    def device(self) -> torch.device:
        return self.D.device

    @property
    def length(self) -> int:
        """Return L, the number of steps."""
        return self.D.shape[-1]

    @property
    def order(self) -> int:
        """Return n, the dimension of the state."""
        return self.B.shape[-1]

    def steps(self, start: int, stop: int) -> Self:
        """Return the steps `start` … `stop - 1` as a separate system."""
        skip = len(self.channel_shape)
        return self._map(lambda value: value.narrow(skip, start, stop - start))

    def transition(self, dtype: torch.dtype) -> Transition:
        """Return the state matrices with all channels in one dimension, (G, L, …)."""
        A, p, q = self.A, self.p, self.q
        groups = self.channel_shape.numel()

        def grouped(value: Tensor) -> Tensor:
            return value.to(dtype).reshape(groups, *value.shape[len(self.channel_shape) :])

        if A.ndim > self.B.ndim:
            return Dense(grouped(A))
        if p is None or q is None:
            return Diagonal(grouped(A))
        return DiagonalPlusLowRank(grouped(A), grouped(p).unsqueeze(-1), grouped(q).unsqueeze(-1))

    def vectors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return B (G, L, n), C (G, L, n) and D (G, L), with all channels in one dimension."""
        groups, length, order = self.channel_shape.numel(), self.length, self.order
        B, C = (value.to(dtype).reshape(groups, length, order) for value in (self.B, self.C))
        return B, C, self.D.to(dtype).reshape(groups, length)

    @property
    def stepwise(self) -> bool:
        """Return whether products of the state matrices are less accurate than plain steps.

        This can only happen to dense matrices. The check synchronizes with a GPU.
        """
        if self.A.ndim == self.B.ndim:
            return False
        transition = self.transition(self.A.dtype)
        assert isinstance(transition, Dense)
        return not bounded_products(transition.a.detach())

    def take_steps(self, signal: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take all steps, one after the other, on signals (G, L, r) from states (G, n, r)."""
        transition = self.transition(torch.float64)
        assert isinstance(transition, Dense)
        return step_by_step(transition.a, *self.vectors(torch.float64), signal, x)

    def matrix(self, length: int | None = None) -> Tensor:
        """Return the operator on the first `length` samples (default: all L), a square matrix.

        Returns:
            (*C, length, length), lower triangular.

        Raises:
            ValueError: if the system has fewer than `length` steps.
        """
        length = self.length if length is None else length
        self.check_steps(0, length)
        part, dtype = self.steps(0, length), working_dtype(self.D)
        if part.stepwise:
            groups = self.channel_shape.numel()
            impulses = torch.eye(length, dtype=torch.float64, device=self.device)
            start = impulses.new_zeros(groups, self.order, length)
            columns, _ = part.take_steps(impulses.expand(groups, -1, -1), start)
            return columns.reshape(*self.channel_shape, length, length).to(self.dtype)
        size = 1 << max(length - 1, 0).bit_length()
        with torch.autocast(self.device.type, enabled=False):
            inside = join(part.transition(dtype), *part.vectors(dtype), size).inside
        return (
            inside[:, 0, :length, :length]
            .reshape(*self.channel_shape, length, length)
            .to(self.dtype)
        )

    def hankel_singular_values(self, length: int | None = None, at: int | None = None) -> Tensor:
        """Return the singular values of a Hankel block, through which the past acts on the future.

        The singular values are computed from a product of two triangular factors. No Gramian is
        formed.

        Args:
            length: The horizon, by default L. The block is `T[at:length, :at]`.
            at: The first step of the future, 1 … length - 1; by default `length // 2`.

        Returns:
            (*C, k), k = min(n, at, length - at), descending. They are computed in float64 and
            returned in the system's dtype.

        Raises:
            ValueError: if `length` or `at` is out of range.
        """
        length, at = self._parted(length, at)
        reach, observe = self.factors(at, length)
        with torch.autocast(self.device.type, enabled=False):
            right = torch.linalg.qr(reach.mT, mode="r")[1]
            left = torch.linalg.qr(observe, mode="r")[1]
            values = torch.linalg.svdvals(left @ right.mT)
        return values.reshape(*self.channel_shape, -1).to(self.dtype)

    def factors(self, at: int, length: int) -> tuple[Tensor, Tensor]:
        """Return the two factors of `T[at:length, :at]`, differentiable and in float64.

        Returns:
            The reachability matrices (G, n, at) and the observability matrices (G, length - at, n).
        """
        if self.steps(0, length).stepwise:
            return self._stepped_factors(at, length)
        parts = []
        for part in (self.steps(0, at), self.steps(at, length)):
            size = 1 << max(part.length - 1, 0).bit_length()
            transition, vectors = part.transition(torch.float64), part.vectors(torch.float64)
            with torch.autocast(self.device.type, enabled=False):
                parts.append(join(transition, *vectors, size))
        return parts[0].reach[:, 0, :, :at], parts[1].observe[:, 0, : length - at]

    def _stepped_factors(self, at: int, length: int) -> tuple[Tensor, Tensor]:
        transition, (B, C, _) = self.transition(torch.float64), self.vectors(torch.float64)
        assert isinstance(transition, Dense)
        A = transition.a
        reach, observe = B[:, 0].unsqueeze(-1), C[:, length - 1].unsqueeze(-2)
        for i in range(1, at):
            reach = torch.cat([A[:, i] @ reach, B[:, i].unsqueeze(-1)], dim=-1)
        for i in range(length - 2, at - 1, -1):
            observe = torch.cat([C[:, i].unsqueeze(-2), observe @ A[:, i]], dim=-2)
        return reach, observe

    def recurrence(self, form: str | None = None) -> TimeVaryingRecurrence:
        """Return the recurrence, which takes at most L steps.

        Raises:
            ValueError: if `form` is given and is not "time_varying", the only form.
        """
        self._check_form(form, "time_varying")
        return TimeVaryingRecurrence(self)

    def _apply(self, u: Tensor) -> Tensor:
        x = self.D.new_zeros(*u.shape[:-1], self.order, dtype=working_dtype(u))
        return self.run_from(u, x)[0]

    def apply_from(self, u: Tensor, state: TimeVaryingState) -> tuple[Tensor, TimeVaryingState]:
        y, x = self.run_from(u, state.x, int(state.position))
        return y, TimeVaryingState(x, state.position + u.shape[-1])

    def run_from(self, u: Tensor, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Return the outputs of the steps from `start` on, and the state after them.

        This is `apply_from` for a position that is known, so that a graph can be traced.

        Args:
            u: The inputs of these steps, (*B, *C', T), where C' broadcasts against the channels C.
            x: The state before them, (*B, *C', n), in float32 or float64.
            start: The number of steps that are taken already.
        """
        length = u.shape[-1]
        self.check_steps(start, length)
        if length == 0:
            return u, x
        part, dtype = self.steps(start, start + length), x.dtype
        signal, restore = group_channels(u.to(dtype), self.channel_shape)  # (G, R, T)
        first, restore_state = group_channels(x, self.channel_shape)  # (G, R, n)
        transition, (B, C, D) = part.transition(dtype), part.vectors(dtype)
        if isinstance(transition, Diagonal) and signal.shape[1] == 1:
            y, end = apply_diagonal(transition.a, B, C, D, signal.squeeze(1), first.squeeze(1))
            return restore(y.unsqueeze(1)).to(u.dtype), restore_state(end.unsqueeze(1))
        if isinstance(transition, Dense) and part.stepwise:
            y, end = part.take_steps(signal.mT, first.mT)
            return restore(y.mT.to(dtype)).to(u.dtype), restore_state(end.mT.to(dtype))
        size = _block_size(length, self.order, signal.shape[1])
        with torch.autocast(self.device.type, enabled=False):
            y, end = run_blocks(transition, B, C, D, signal, first.mT, size)
        return restore(y).to(u.dtype), restore_state(end.mT)


def _block_size(length: int, order: int, signals: int) -> int:
    """Return a number of steps for which a block's operator costs about as much as its states."""
    wanted = max(4, min(64, order, signals))
    return 1 << (min(wanted, length) - 1).bit_length()


class TimeVaryingRecurrence(VectorRecurrence[TimeVaryingState]):
    """`y_i = C_i x + D_i u_i`, `x ← A_i x + B_i u_i`. The recurrence takes at most L steps.

    Args:
        system: The time-varying system to step.
    """

    form = "time_varying"
    state_type = TimeVaryingState

    def __init__(self, system: TimeVarying) -> None:
        self.system: TimeVarying = system.frozen()
        self._like = system.D.new_empty(0, dtype=working_dtype(system.D))
        self._state_shape = (system.order,)

    def _make_state(self, tensor: Tensor) -> TimeVaryingState:
        return TimeVaryingState(tensor, torch.zeros((), dtype=torch.int64))

    def _advance(self, u_t: Tensor, state: TimeVaryingState) -> tuple[Tensor, TimeVaryingState]:
        x, position = state.x, state.position
        system, at = self.system, int(position)
        system.check_steps(at, 1)
        skip = len(system.channel_shape)
        A, B, C, D = (
            value.select(skip, at).to(x.dtype) for value in (system.A, system.B, system.C, system.D)
        )
        sample = u_t.to(x.dtype)
        y = (C * x).sum(-1) + D * sample
        with torch.autocast(x.device.type, enabled=False):
            new = (A @ x.unsqueeze(-1)).squeeze(-1) if system.A.ndim > system.B.ndim else A * x
        if system.p is not None and system.q is not None:
            p, q = (value.select(skip, at).to(x.dtype) for value in (system.p, system.q))
            new = new + p * (q * x).sum(-1, keepdim=True)
        new = new + B * sample.unsqueeze(-1)
        return y.to(u_t.dtype), TimeVaryingState(new, position + 1)
