r"""Diagonal plus low-rank systems: modes that feed back into each other through one number.

`x_{t+1} = Λ x_t - p v_t + B u_t`, `v_t = 2 Re q x_t`, `y_t = 2 Re C x_t + D u_t`. The state matrix
of S4 (Gu et al. 2022, arXiv 2111.00396) has this form after the bilinear transform, because the
transform of a diagonal plus rank-one matrix is diagonal plus rank one again. One complex entry
stands for a mode and its conjugate, so the matrix acts on complex vectors as a map that is linear
only over the reals.

The kernel is computed from the four modal impulse responses from u and v to y and v.
`gramian.ops.feedback.feedback_kernel` closes the loop over v. No Cauchy kernel, no dense state
matrix and no matrix of modes times length is needed.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from gramian.ops import causal_convolution
from gramian.ops.feedback import feedback_kernel
from gramian.ops.lengths import tail_count
from gramian.ops.precision import complex_dtype
from gramian.ops.vandermonde import (
    integer_power,
    vandermonde_product,
    vandermonde_transpose_product,
)
from gramian.systems._recurrence import VectorRecurrence
from gramian.systems._state import State, define_state
from gramian.systems._system import TimeInvariantSystem, check_tensor, working_dtype
from gramian.systems.blocks import BlockForm, VectorBlockForm
from gramian.systems.state_space import StateSpace

__all__ = ["DPLR", "DPLRRecurrence", "DPLRState"]


@define_state
class DPLRState(State):
    """The state x.

    Attributes:
        modes: (*B, *C', m, 2): the real and the imaginary part of every mode.
    """

    modes: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class DPLR(TimeInvariantSystem[DPLRState]):
    """`h_0 = D`, `h_t = C A^(t-1) B`, where A is diagonal plus rank one.

    Each of the m complex entries of a vector stands for a mode and its conjugate.

    Args:
        poles: (*C, m), complex: the diagonal Λ.
        B: (*C, m), complex: the input vector.
        C: (*C, m), complex: the output vector in `y = 2 Re C x`.
        p: (*C, m), complex: the vector through which the feedback v enters the state.
        q: (*C, m), complex: the vector that reads the feedback, `v = 2 Re q x`.
        D: (*C), real: the direct term.

    Raises:
        TypeError: if D is not real or another field is not complex.
        ValueError: if the shapes do not fit together.
    """

    _kind = "DPLR system"
    _state_types = (DPLRState,)

    poles: Tensor
    B: Tensor
    C: Tensor
    p: Tensor
    q: Tensor
    D: Tensor

    def __post_init__(self) -> None:
        names = ("poles", "B", "C", "p", "q")
        for name in (*names, "D"):
            check_tensor(f"{name} of a DPLR system", getattr(self, name))
        fields = [getattr(self, name) for name in names]
        if not all(field.is_complex() for field in fields) or not self.D.dtype.is_floating_point:
            raise TypeError(
                "a DPLR system takes complex poles, B, C, p and q and a real D; got "
                f"{', '.join(str(field.dtype) for field in (*fields, self.D))}."
            )
        shape = (*self.D.shape, self.poles.shape[-1] if self.poles.ndim else 0)
        if any(field.shape != shape for field in fields):
            raise ValueError(
                "a DPLR system takes poles, B, C, p and q (*channels, modes) and D (*channels); "
                f"got {', '.join(str(tuple(field.shape)) for field in (*fields, self.D))}."
            )

    @property
    def channel_shape(self) -> torch.Size:
        return self.D.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.D.dtype

    @property
    def device(self) -> torch.device:
        return self.D.device

    @property
    def order(self) -> int:
        """Return 2 m, since each complex entry stands for two modes."""
        return 2 * self.poles.shape[-1]

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.poles.shape[-1], 2)

    def state_space(self) -> StateSpace:
        """Return the same system with a dense matrix on the state (Re x, Im x), in float64."""
        poles, B, C, p, q = (
            field.to(torch.complex128) for field in (self.poles, self.B, self.C, self.p, self.q)
        )
        real, imaginary = torch.diag_embed(poles.real), torch.diag_embed(poles.imag)
        A = torch.cat(
            [torch.cat([real, -imaginary], dim=-1), torch.cat([imaginary, real], dim=-1)], dim=-2
        )
        enters = torch.cat([p.real, p.imag], dim=-1)
        reads, output = (torch.cat([2 * row.real, -2 * row.imag], dim=-1) for row in (q, C))
        A = A - enters.unsqueeze(-1) * reads.unsqueeze(-2)
        return StateSpace(A, torch.cat([B.real, B.imag], dim=-1), output, self.D.double())

    def impulse_response(self, length: int) -> Tensor:
        """Compute the Markov parameters (*C, length).

        The matrix products take O(n L) operations, and FFTs close the loop over v.
        """
        if length == 1 or self.order == 0:
            return nn.functional.pad(self.D.unsqueeze(-1), (0, length - 1))
        tail = feedback_kernel(self._open_loop(tail_count(length)), self.dtype)
        return torch.cat([self.D.unsqueeze(-1), tail], dim=-1)[..., :length]

    def _open_loop(self, length: int) -> Tensor:
        """Return the kernels from u to y, v to y, u to v and v to v without feedback.

        Returns:
            (*C, 4, length), float64, at the lags 1 … length. At lag 0 only D contributes.
        """
        rows = (self.C * self.B, self.C * self.p, self.q * self.B, self.q * self.p)
        coefficients = 2 * torch.stack(rows, dim=-2).to(torch.complex128)
        return vandermonde_product(self.poles.unsqueeze(-2), coefficients, length)

    def recurrence(self, form: str | None = None) -> DPLRRecurrence:
        """Return the recurrence, which takes O(n) operations for each step.

        Raises:
            ValueError: if `form` is given and is not "dplr", the only form.
        """
        if form not in (None, "dplr"):
            raise ValueError(f'a DPLR system has the recurrence form "dplr" only; got {form!r}.')
        return DPLRRecurrence(self)

    def apply_from(self, u: Tensor, state: DPLRState) -> tuple[Tensor, DPLRState]:
        past = torch.view_as_complex(state.modes).to(torch.complex128)
        signal, length = u.double(), u.shape[-1]
        yu, yv, vu, vv = self._open_loop(length).unbind(-2)
        # v responds to the modes' free response and to the input, through the closed loop
        # 1 / (1 + K_vv) = 1 - K_vv + K_vv² / (1 + K_vv).
        loop = feedback_kernel(torch.stack([-vv, vv, -vv, vv], dim=-2))
        yu, yv, vu, loop = (nn.functional.pad(k, (1, -1)) for k in (yu, yv, vu, loop))
        impulse = torch.eye(1, length, dtype=loop.dtype, device=loop.device)[0]
        loop = loop + impulse
        free_v = vandermonde_product(self.poles, 2 * self.q * past, length)
        v = causal_convolution(free_v + causal_convolution(signal, vu), loop)
        y = causal_convolution(signal, yu) - causal_convolution(v, yv)
        y = y + vandermonde_product(self.poles, 2 * self.C * past, length)
        y = y + self.D.double().unsqueeze(-1) * signal
        new = integer_power(self.poles.to(torch.complex128), length) * past
        new = new + self.B * vandermonde_transpose_product(self.poles, signal)
        new = new - self.p * vandermonde_transpose_product(self.poles, v)
        return y.to(u.dtype), DPLRState(torch.view_as_real(new).to(state.modes.dtype))

    def _infinite_hankel_singular_values(self) -> Tensor:
        return self.state_space().hankel_singular_values()


class DPLRRecurrence(VectorRecurrence[DPLRState]):
    """`x ← Λ x - p v + B u` with `v = 2 Re q x`, `y = 2 Re C x + D u`.

    Args:
        system: The DPLR system to step.
    """

    form = "dplr"
    state_type = DPLRState

    def __init__(self, system: DPLR) -> None:
        self.system: DPLR = system.frozen()
        dtype = working_dtype(system.D)
        double = self.system.to(dtype=torch.float64)
        self._poles = double.poles.to(complex_dtype(dtype))
        self._turn = self._poles.real.clone(), self._poles.imag.clone()
        # Re (r x) = (Re r)(Re x) - (Im r)(Im x) is the inner product of two pairs of real numbers.
        rows = torch.stack([double.C, double.q], dim=-2).conj_physical()
        self._rows = 2 * torch.view_as_real(rows).flatten(-2).to(dtype)  # (*C, 2, 2m)
        columns = torch.view_as_real(torch.stack([double.B, -double.p], dim=-2))
        self._B, self._p = columns.to(dtype).unbind(-3)  # (*C, m, 2)
        self._D = double.D.to(dtype)
        self._like, self._state_shape = self._D, self.system.state_shape

    def _read(self, u_t: Tensor, modes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return y, v, and the sample in the dtype of the modes."""
        sample = u_t.to(modes.dtype)
        read = (self._rows * modes.flatten(-2).unsqueeze(-2)).sum(-1)  # (*B, *C', 2)
        return torch.addcmul(read[..., 0], self._D, sample), read[..., 1], sample

    def _advance(self, u_t: Tensor, state: DPLRState) -> tuple[Tensor, DPLRState]:
        y, v, sample = self._read(u_t, state.modes)
        re, im = state.modes.unbind(-1)
        real, imaginary = self._turn
        new = torch.stack([re * real - im * imaginary, re * imaginary + im * real], dim=-1)
        new = new + self._B * sample[..., None, None] + self._p * v[..., None, None]
        return y.to(u_t.dtype), DPLRState(new)

    def _step(self, u_t: Tensor, state: DPLRState) -> tuple[Tensor, DPLRState]:
        modes = state.modes
        y, v, sample = self._read(u_t, modes)
        torch.view_as_complex(modes).mul_(self._poles)
        modes.addcmul_(self._B, sample[..., None, None])
        modes.addcmul_(self._p, v[..., None, None])
        return y.to(u_t.dtype), state

    def block_form(self, size: int, streams: int = 0) -> BlockForm[DPLRState]:
        dense = self.system.state_space()
        # The dense matrix has all real parts first; the state has a pair for every mode.
        pairs = torch.arange(dense.order, device=dense.device).reshape(2, -1).mT.flatten()
        A = dense.A.index_select(-1, pairs).index_select(-2, pairs)
        paired = StateSpace(A, dense.B[..., pairs], dense.C[..., pairs], dense.D)
        return VectorBlockForm.from_state_space(paired, size, self._like.dtype, streams)
