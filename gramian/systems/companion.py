r"""The companion recurrence of a rational transfer function.

With `A = [[-a], [I, 0]]`, `B = e_1`, `C = b` (RTF, section 3.1), the state consists of the last n
values of `w = u / a(z)`, so a step takes O(n) operations. Coefficients and state are kept in double
precision, because rounding `a` to single precision makes half of all stable denominators of degree
128 unstable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gramian.systems._recurrence import VectorRecurrence
from gramian.systems._state import State, define_state
from gramian.systems.blocks import BlockForm, VectorBlockForm
from gramian.systems.state_space import StateSpace

if TYPE_CHECKING:
    from gramian.systems.transfer_function import TransferFunction

__all__ = ["CompanionRecurrence", "CompanionState", "companion_form"]


@define_state
class CompanionState(State):
    """The last n values of `w = u / a(z)`, newest first.

    Attributes:
        past: (*B, *C', n), float64: these values.
    """

    past: Tensor


def companion_form(b: Tensor, a: Tensor, d: Tensor) -> StateSpace:
    """Return `d + b(z) / a(z)` as a state-space system with the companion matrix, in float64.

    Args:
        b: (*C, n): the numerator's coefficients.
        a: (*C, n): the denominator's coefficients.
        d: (*C): the direct term.
    """
    a = a.double()
    shift = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)[:-1]
    A = torch.cat([-a.unsqueeze(-2), shift.expand(*a.shape[:-1], -1, -1)], dim=-2)
    first = torch.zeros_like(a)
    first[..., :1] = 1
    return StateSpace(A, first, b.double(), d.double())


class CompanionRecurrence(VectorRecurrence[CompanionState]):
    """`w_t = u_t - Σ a_j w_{t-j}`, `y_t = d u_t + Σ b_j w_{t-j}`, in double precision.

    Args:
        system: The transfer function to step.
    """

    form = "companion"
    state_type = CompanionState

    def __init__(self, system: TransferFunction) -> None:
        self.system: TransferFunction = system.frozen().to(dtype=torch.float64)
        self._taps = torch.stack([-self.system.a, self.system.b], dim=-1)  # (*C, n, 2)
        self._like, self._state_shape = self._taps, (self.system.order,)
        if self.system.taps is not None and self.system.order:
            self.error = self._measured_error(self.system.taps)

    def _advance(self, u_t: Tensor, state: CompanionState) -> tuple[Tensor, CompanionState]:
        past = state.past
        sample = u_t.to(past.dtype)
        # ONNX programs need as many dimensions in both operands of the ellipsis.
        taps = self._taps[(None,) * (past.ndim + 1 - self._taps.ndim)]
        feedback, output = torch.einsum("...n,...nk->...k", past, taps).unbind(-1)
        newest = (sample + feedback).unsqueeze(-1)
        y = torch.addcmul(output, self.system.d, sample)
        if self.system.order:
            past = torch.cat([newest, past[..., : self.system.order - 1]], dim=-1)
        return y.to(u_t.dtype), CompanionState(past)

    def block_form(self, size: int, streams: int = 0) -> BlockForm[CompanionState]:
        return VectorBlockForm.from_state_space(
            self.system.state_space(), size, self._like.dtype, streams
        )
