r"""The companion recurrence of a rational transfer function.

``A = [[-a], [I, 0]]``, ``B = e_1``, ``C = b`` (RTF, section 3.1). The state is the last n values of
``w = u / a(z)``, so a step takes O(n) operations. Coefficients and state are kept in double
precision: rounding ``a`` to single makes half of all stable denominators of degree 128 unstable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gramian.systems._state import State
from gramian.systems._system import LinearRecurrence

if TYPE_CHECKING:
    from gramian.systems.transfer_function import TransferFunction

__all__ = ["CompanionRecurrence", "CompanionState"]


class _Fields(NamedTuple):
    past: Tensor


class CompanionState(_Fields, State):
    """The last n values of ``w = u / a(z)``, newest first: (*B, *C', n), float64."""

    __slots__ = ()


class CompanionRecurrence(LinearRecurrence):
    """``w_t = u_t - Σ a_j w_{t-j}``, ``y_t = d u_t + Σ b_j w_{t-j}``, in double precision."""

    form = "companion"
    _state = CompanionState

    def __init__(self, system: TransferFunction) -> None:
        self.system: TransferFunction = system.frozen().to(dtype=torch.float64)
        self._taps = torch.stack([-self.system.a, self.system.b], dim=-1)  # (*C, n, 2)
        self._like, self._state_shape = self._taps, (self.system.order,)
        if self.system.taps is not None and self.system.order:
            self.error = self._measured_error(self.system.taps)

    @torch.no_grad()
    def step(self, u_t: Tensor, state: State) -> tuple[Tensor, State]:
        assert isinstance(state, CompanionState)
        (past,) = state
        sample = u_t.to(past.dtype)
        feedback, output = torch.einsum("...n,...nk->...k", past, self._taps).unbind(-1)
        newest = (sample + feedback).unsqueeze(-1)
        y = torch.addcmul(output, self.system.d, sample)
        past = torch.cat([newest, past[..., : self.system.order - 1]], dim=-1)
        return y.to(u_t.dtype), CompanionState(past if self.system.order else state.past)
