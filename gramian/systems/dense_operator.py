r"""Dense causal operators: lower-triangular matrices without known structure.

On a given input, softmax attention applies such an operator, `y_i = Σ_{j≤i} T_ij u_j`, to its
values. The state consists of all inputs so far. `gramian.realize` finds the smallest recurrence
that computes an operator.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from gramian.ops.vandermonde import group_channels
from gramian.systems._finite import FiniteSystem
from gramian.systems._recurrence import VectorRecurrence
from gramian.systems._state import State, define_state
from gramian.systems._system import check_tensor, working_dtype

__all__ = ["DenseOperator", "DenseOperatorRecurrence", "DenseOperatorState"]


@define_state
class DenseOperatorState(State):
    """All inputs so far.

    Attributes:
        inputs: (*B, *C', L): the inputs, zero from index `position` on.
        position: (), int64 on the CPU: the number of steps taken.
    """

    inputs: Tensor
    position: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class DenseOperator(FiniteSystem[DenseOperatorState]):
    """`y = T u` for a lower-triangular T.

    An operator has exactly L steps, like a `TimeVarying` system. If its rows come from a softmax
    over the whole past, a further token adds a further row and so makes another operator.

    Args:
        entries: (*C, L, L), real: T. Entries above the diagonal are not read.

    Raises:
        TypeError: if the entries are not a real floating-point tensor.
        ValueError: if the entries are not square matrices.
    """

    _kind = "dense operator"
    _state_types = (DenseOperatorState,)

    entries: Tensor

    def __post_init__(self) -> None:
        check_tensor("the matrix of a dense operator", self.entries)
        if not self.entries.dtype.is_floating_point:
            raise TypeError(
                "the matrix of a dense operator must be real floating point; got "
                f"{self.entries.dtype}."
            )
        if self.entries.ndim < 2 or self.entries.shape[-1] != self.entries.shape[-2]:
            raise ValueError(
                "a dense operator takes matrices (*channels, L, L); got "
                f"{tuple(self.entries.shape)}."
            )

    @property
    def channel_shape(self) -> torch.Size:
        return self.entries.shape[:-2]

    @property
    def dtype(self) -> torch.dtype:
        return self.entries.dtype

    @property
    def device(self) -> torch.device:
        return self.entries.device

    @property
    def length(self) -> int:
        """Return L, the number of steps."""
        return self.entries.shape[-1]

    @property
    def order(self) -> int:
        """Return L - 1, the number of earlier inputs on which the last output may depend."""
        return max(self.length - 1, 0)

    def matrix(self, length: int | None = None) -> Tensor:
        """Return the operator on the first `length` samples (default: all L), a square matrix.

        Returns:
            (*C, length, length), lower triangular.

        Raises:
            ValueError: if the operator has fewer than `length` steps.
        """
        length = self.length if length is None else length
        self.check_steps(0, length)
        return self.entries[..., :length, :length].tril()

    def hankel_singular_values(self, length: int | None = None, at: int | None = None) -> Tensor:
        """Return the singular values of a Hankel block, through which the past acts on the future.

        Args:
            length: The horizon, by default L. The block is `T[at:length, :at]`.
            at: The first step of the future, 1 … length - 1; by default `length // 2`.

        Returns:
            (*C, k), k = min(at, length - at), descending. They are computed in float64 and returned
            in the system's dtype.

        Raises:
            ValueError: if `length` or `at` is out of range.
        """
        length, at = self._parted(length, at)
        block = self.entries[..., at:length, :at].double()
        return torch.linalg.svdvals(block).to(self.dtype)

    def recurrence(self, form: str | None = None) -> DenseOperatorRecurrence:
        """Return the recurrence, which applies one row in each step, in O(L) operations.

        Raises:
            ValueError: if `form` is given and is not "dense", the only form.
        """
        self._check_form(form, "dense")
        return DenseOperatorRecurrence(self)

    def _apply(self, u: Tensor) -> Tensor:
        return self._rows(u.to(working_dtype(u)), 0).to(u.dtype)

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.length,)

    def apply_from(self, u: Tensor, state: DenseOperatorState) -> tuple[Tensor, DenseOperatorState]:
        inputs, position = state
        start, end = int(position), int(position) + u.shape[-1]
        self.check_steps(start, u.shape[-1])
        past = torch.cat([inputs[..., :start], u.to(inputs.dtype)], dim=-1)
        new = torch.nn.functional.pad(past, (0, inputs.shape[-1] - end))
        return self._rows(past, start).to(u.dtype), DenseOperatorState(new, position + u.shape[-1])

    def _rows(self, inputs: Tensor, start: int) -> Tensor:
        """Return the outputs from step `start` on.

        Args:
            inputs: (*B, *C', end): all inputs up to the last of these steps.
            start: The first step whose output is returned.
        """
        end = inputs.shape[-1]
        self.check_steps(0, end)
        rows = self.entries[..., start:end, :end].tril(start).to(inputs.dtype)
        grouped, restore = group_channels(inputs, self.channel_shape)  # (G, R, end)
        with torch.autocast(inputs.device.type, enabled=False):
            return restore(grouped @ rows.reshape(grouped.shape[0], *rows.shape[-2:]).mT)


class DenseOperatorRecurrence(VectorRecurrence[DenseOperatorState]):
    """`y_i = T[i, :i + 1] u[:i + 1]`. The recurrence keeps every input and takes at most L steps.

    Args:
        system: The operator to step.
    """

    form = "dense"
    state_type = DenseOperatorState

    def __init__(self, system: DenseOperator) -> None:
        self.system: DenseOperator = system.frozen()
        self._like = system.entries.new_empty(0, dtype=working_dtype(system.entries))
        self._state_shape = (system.length,)

    def _make_state(self, tensor: Tensor) -> DenseOperatorState:
        return DenseOperatorState(tensor, torch.zeros((), dtype=torch.int64))

    def _advance(self, u_t: Tensor, state: DenseOperatorState) -> tuple[Tensor, DenseOperatorState]:
        return self._step(u_t, state.clone())

    def _step(self, u_t: Tensor, state: DenseOperatorState) -> tuple[Tensor, DenseOperatorState]:
        inputs, position = state.inputs, state.position
        at = int(position)
        self.system.check_steps(at, 1)
        inputs[..., at] = u_t
        row = self.system.entries[..., at, : at + 1].to(inputs.dtype)
        y = (row * inputs[..., : at + 1]).sum(-1)
        return y.to(u_t.dtype), DenseOperatorState(inputs, position + 1)
