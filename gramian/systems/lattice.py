r"""The lattice, which steps a rational system by its reflection coefficients.

With the backward prediction errors `x` of the last step, a step of the two-multiplier lattice is

    f_m = u - Σ_{j>m} k_j x_{j-1},   x_m ← x_{m-1} + k_m f_{m-1},   x_0 ← f_0,   y = d u + Σ e_m x_m

A step takes O(n) operations: one suffix sum and one product. The coefficients k are those of the
Schur recursion. Rounding them moves poles, but never across the unit circle, so single precision is
enough (A. H. Gray and J. D. Markel, "Digital lattice and ladder filter synthesis", 1973).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gramian.ops.reflection import ladder_weights
from gramian.systems._recurrence import VectorRecurrence
from gramian.systems._state import State, define_state
from gramian.systems.blocks import BlockForm, VectorBlockForm
from gramian.systems.state_space import StateSpace, StateSpaceState

__all__ = ["LatticeRecurrence", "LatticeState"]


@define_state
class LatticeState(State):
    """The state of a lattice.

    Attributes:
        x: (*B, *C', n): the backward prediction errors of the last step.
    """

    x: Tensor


def _lattice_step(k: Tensor, x: Tensor, sample: Tensor) -> Tensor:
    """Return the next state from k (*C, n), x (*B, *C', n) and the sample (*B, *C', 1)."""
    forward = sample - (k * x).flip(-1).cumsum(-1).flip(-1)  # f_0 … f_{n-1}
    later = torch.addcmul(x[..., :-1], k[..., :-1], forward[..., :-1])
    return torch.cat([forward[..., :1], later], dim=-1)


def lattice_realization(reflection: Tensor, b: Tensor, d: Tensor) -> StateSpace:
    """Return the lattice as a dense state-space system in float64, to process chunks and blocks.

    Args:
        reflection: (*C, n), or a shape that broadcasts to it: the reflection coefficients.
        b: (*C, n): the exact numerator.
        d: (*C): the direct term.
    """
    k = reflection.double().expand(b.shape)
    order = k.shape[-1]
    unit = torch.eye(order, dtype=torch.float64, device=k.device)
    silence = k.new_zeros(*k.shape[:-1], 1, 1)
    A = _lattice_step(k.unsqueeze(-2), unit.expand(*k.shape[:-1], -1, -1), silence).mT
    B = _lattice_step(k, torch.zeros_like(k), torch.ones_like(k[..., :1]))
    return StateSpace(A, B, ladder_weights(k, b), d.double())


class LatticeRecurrence(VectorRecurrence[LatticeState]):
    """The recurrence of a rational system by its reflection coefficients.

    By default, it computes in single precision.

    Args:
        reflection: (*C, n), or a shape that broadcasts to it: the reflection coefficients, inside
            (-1, 1).
        b: (*C, n): the exact numerator.
        d: (*C): the direct term.
        taps: (*C, K): the taps with which the impulse response is compared to measure `error`. If
            None, no error is measured.
        dtype: The dtype of the state and the coefficients.
    """

    form = "lattice"
    state_type = LatticeState

    def __init__(
        self,
        reflection: Tensor,
        b: Tensor,
        d: Tensor,
        taps: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        fields = (reflection.detach(), b.detach(), d.detach())
        self.system: StateSpace = lattice_realization(*fields).frozen()
        self._k = reflection.detach().to(dtype)
        self._weights = self.system.C.to(dtype)
        self._d = self.system.D.to(dtype)
        self._like, self._state_shape = self._weights, (b.shape[-1],)
        if taps is not None:
            self.error = self._measured_error(taps.detach())

    def _prefill(self, u: Tensor, state: LatticeState) -> tuple[Tensor, LatticeState]:
        return apply_lattice(self.system, u, state)

    def _advance(self, u_t: Tensor, state: LatticeState) -> tuple[Tensor, LatticeState]:
        x = state.x
        sample = u_t.to(x.dtype)
        y = torch.addcmul((self._weights * x).sum(-1), self._d, sample)
        new = _lattice_step(self._k.to(x.dtype), x, sample.unsqueeze(-1))
        return y.to(u_t.dtype), LatticeState(new)

    def block_form(self, size: int, streams: int = 0) -> BlockForm[LatticeState]:
        return VectorBlockForm.from_state_space(self.system, size, self._like.dtype, streams)


def apply_lattice(
    realization: StateSpace, u: Tensor, state: LatticeState
) -> tuple[Tensor, LatticeState]:
    """Process a chunk from `state`, given the result of `lattice_realization`."""
    y, new = realization.apply_from(u, StateSpaceState(state.x))
    return y, LatticeState(new.x)
