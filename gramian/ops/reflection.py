r"""Reflection coefficients of polynomials, and the lattice that they define.

A monic polynomial `A_n(z) = 1 + a_1 z^-1 + … + a_n z^-n` has all its zeros inside the unit circle
if and only if the reflection coefficients of the Schur–Cohn (or Levinson) recursion

    A_m(z) = A_{m-1}(z) + k_m z^-m A_{m-1}(1/z),   m = 1 … n,   A_0 = 1

all lie in (-1, 1). `step_up` computes a from k, and `step_down` computes k from a. Both use double
precision, because rounding can move poles near the unit circle across it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ladder_weights", "step_down", "step_up"]

_ELEMENTS = 2**24
"""The largest number of elements that the triangular matrices in memory have at one time."""


def step_up(reflection: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Compute denominator coefficients `a_1 … a_n` from reflection coefficients, both (*C, n).

    The result is in `dtype` and differentiable.
    """
    k = reflection.to(dtype)
    a = k[..., :0]
    for m in range(k.shape[-1]):
        last = k[..., m : m + 1]
        a = torch.cat([a + last * a.flip(-1), last], dim=-1)
    return a


def step_down(a: Tensor) -> Tensor:
    """Compute reflection coefficients from denominator coefficients `a_1 … a_n`, both (*C, n).

    The result is in float64. If a coefficient lies outside [-1, 1], the polynomial has a zero
    outside of the unit circle, and the coefficients of lower degree are meaningless. If a
    coefficient is ±1, the coefficients of lower degree are NaN or infinite.
    """
    a = a.double()
    reflection = torch.empty_like(a)
    for m in range(a.shape[-1], 0, -1):
        last = a[..., -1:]
        reflection[..., m - 1 : m] = last
        a = a[..., :-1]
        a = (a - last * a.flip(-1)) / (1 - last.square())
    return reflection


def ladder_weights(reflection: Tensor, b: Tensor) -> Tensor:
    """Compute the ladder weights e, which satisfy `b(z) = Σ_{m<n} e_m z^-1 z^-m A_m(1/z)`.

    Args:
        reflection: (*C, n): the reflection coefficients of the denominator.
        b: (*C, n): the numerator coefficients `b_1 … b_n`.

    Returns:
        (*C, n), float64.
    """
    k, b = torch.broadcast_tensors(reflection.double(), b.double())
    order = k.shape[-1]
    flat_k, flat_b = k.reshape(-1, order), b.reshape(-1, order)
    size = max(1, _ELEMENTS // max(1, order * order))
    parts = []
    for some_k, some_b in zip(flat_k.split(size), flat_b.split(size), strict=True):
        rows = torch.zeros(len(some_k), order, order, dtype=torch.float64, device=k.device)
        a = some_k[:, :0]
        for m in range(order):  # row m holds A_m reversed: A_m[m], …, A_m[1], 1
            rows[:, m, :m], rows[:, m, m] = a.flip(-1), 1
            last = some_k[:, m : m + 1]
            a = torch.cat([a + last * a.flip(-1), last], dim=-1)
        solved = torch.linalg.solve_triangular(
            rows.mT, some_b.unsqueeze(-1), upper=True, unitriangular=True
        )
        parts.append(solved.squeeze(-1))
    return torch.cat(parts).reshape(b.shape) if parts else b
