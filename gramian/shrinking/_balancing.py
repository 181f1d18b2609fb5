r"""Balance the memory of recurrences that one gate per head and step multiplies.

A recurrence `S_t = a_t S_{t-1} + k_t w_tᵀ`, `y_t = S_tᵀ q_t` with scalar gates a_t has, for any two
matrices T_l (r × n) and T_r (n × r), the reduced memory `T_l S_t`: the gates commute with T_l, so
keys T_l k_t write exactly this. Queries T_rᵀ q_t read it. With the oblique projection Π = T_r T_l,
the outputs change by exactly `e_t = S_tᵀ (I - Π)ᵀ q_t`.

Balanced truncation (Moore 1981) takes T_l and T_r from two Gramians. Here they are averages over
the positions and heads of a text: `P = mean S_t S_tᵀ / s_t` of the memory, of size `s_t = |S_t|²`,
and `Q = mean s_t c_t² q_t q_tᵀ` of the queries, where c_t is the factor with which the error counts
(`Recurrence.weights`). The memory grows and shrinks along a text, and a query that meets a small
memory matters less. Q needs no queries of later positions, because the reduced memory is exact: an
error at one position does not spread to others.

With `P = L Lᵀ`, `Q = R Rᵀ` and the singular value decomposition
`Rᵀ L = U diag(σ) Vᵀ`, the rows of `T_l = diag(σ)^-½ Uᵀ Rᵀ` and the columns of
`T_r = L V diag(σ)^-½` are a basis in which both Gramians are diag(σ).

In this basis, `e_t` is the sum of the contributions of the dropped coordinates J, and two
applications of Cauchy-Schwarz bound its mean length:

    mean c_t |e_t| ≤ mean c_t |q_t[J]| |S_t[J]|
                   ≤ (mean s_t c_t² |q_t[J]|²)^½ (mean |S_t[J]|² / s_t)^½ = Σ_{i ∈ J} σ_i.

The bound holds on the text of the averages and for every J. Its factor is 1, not the 2 of balanced
truncation for time-invariant systems, because the reduced memory is exact. The root mean square of
c_t |e_t|, which is at least its mean, is known exactly: it follows from the Gram matrix
(`gramian.shrinking._recurrence`) in the balanced basis.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from gramian.shrinking._recurrence import Recurrence, heads_of

__all__ = ["Basis", "Gramians", "changed"]

_LEAST = 1e-7  # singular values below this share of the largest are rounding errors of float32


@dataclass(frozen=True)
class Basis:
    """A balanced basis of the memory of every group of heads.

    Attributes:
        keys: T_l, (groups, n, n), in double precision. Rows without a share in any output are 0.
        queries: T_rᵀ, likewise.
        singular_values: σ, (groups, n), in descending order.
        count: number of pairs of a position and a head of which σ has the averages.
    """

    keys: Tensor
    queries: Tensor
    singular_values: Tensor
    count: int


@dataclass
class Gramians:
    """Sums of the Gramians over a text, (groups, n, n), in double precision.

    Attributes:
        states: the sum of S_t S_tᵀ / s_t.
        queries: the sum of s_t c_t² q_t q_tᵀ.
        count: number of pairs of a position and a head in each group.
    """

    states: Tensor
    queries: Tensor
    count: int = 0

    @classmethod
    def of(cls, groups: int, n: int) -> Gramians:
        """Return empty sums."""
        return cls(*torch.zeros(2, groups, n, n, dtype=torch.float64))

    def add(self, recurrence: Recurrence) -> None:
        """Add what a recurrence with scalar gates reads and writes."""
        for group, heads in heads_of(recurrence):
            for queries, states in heads.states():  # (T, n), (h, n, T, N)
                sizes = states.square().sum((1, 3))  # (h, T)
                factors = sizes
                if heads.epsilon is not None:
                    y = (states * queries.mT.unsqueeze(-1)).sum(1)  # (h, T, N)
                    factors = sizes * recurrence.weights(y).squeeze(-1).square()
                unit = states * sizes.clamp(min=1e-30).rsqrt()[:, None, :, None]
                unit, q = unit.flatten(2), queries.double()
                self.states[group] += (unit @ unit.mT).sum(0).cpu()
                self.queries[group] += ((factors.double().sum(0).unsqueeze(-1) * q).mT @ q).cpu()
        batch, heads_in_all, length = recurrence.values.shape[:3]
        self.count += batch * length * (heads_in_all // recurrence.keys.shape[1])

    def balanced(self) -> Basis:
        """Return the balanced basis. Both maps of a coordinate have rows of the same length."""
        left, right = (_root(sums / self.count) for sums in (self.states, self.queries))
        U, values, V = torch.linalg.svd(right.mT @ left)
        used = values > _LEAST * values[:, :1]
        factor = torch.where(used, values, 1.0).rsqrt().unsqueeze(-1) * used.unsqueeze(-1)
        keys, queries = factor * (right @ U).mT, factor * (left @ V.mT).mT
        lengths = [x.norm(dim=-1, keepdim=True).clamp(min=1e-300) for x in (keys, queries)]
        even = (lengths[1] / lengths[0]).sqrt()
        queries = queries / torch.where(used.unsqueeze(-1), even, 1.0)
        return Basis(even * keys, queries, values, self.count)


def changed(recurrence: Recurrence, keys: Tensor, queries: Tensor) -> Recurrence:
    """Return a recurrence in another basis.

    Args:
        recurrence: a recurrence with scalar gates.
        keys: T_l of every group, (groups, r, n).
        queries: T_rᵀ of every group, (groups, r, n).

    Returns:
        The recurrence, with keys and queries (batch, groups, L, r) in at least single precision.
    """
    k, q = (
        (x.to(map.dtype) @ map.to(x.device).mT).to(torch.promote_types(x.dtype, torch.float32))
        for x, map in ((recurrence.keys, keys), (recurrence.queries, queries))
    )
    return dataclasses.replace(recurrence, keys=k, queries=q)


def _root(matrices: Tensor) -> Tensor:
    """Return factors F of positive semidefinite matrices F Fᵀ, (…, n, n)."""
    values, vectors = torch.linalg.eigh(matrices)
    return vectors * values.clamp(min=0.0).sqrt().unsqueeze(-2)
