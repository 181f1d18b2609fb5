r"""Hankel spectra of recurrences from square-root factors.

A Hankel block is the product of an observability and a reachability matrix, `H_i = O_i X_i`. The
Gramians of these matrices square the condition number and lose half of the digits. The triangular
factors of the Gramians do not:

    `R_{i+1} = qr([R_i A_iᵀ; B_iᵀ])`,  `S_i = qr([S_{i+1} A_i; C_i])`.

The singular values of H_i are those of the n × n product `S_i R_iᵀ`. All positions together take
O(L n³) operations, whereas the blocks themselves would take O(L⁴).

A modal system has both factors in closed form. If W has the rows `w_t = (Re λ^t, Im λ^t)`, then
`H_i = W_{L-i} M W_iᵀ`, where M holds the residues as 2 × 2 blocks. The triangular factor of the
Vandermonde matrix of {λ, λ̄}, which grows row by row, gives both factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gramian.ops.derivatives import records_derivatives
from gramian.ops.scan import Dense, Transition, bounded_products, join
from gramian.ops.threads import work
from gramian.ops.vandermonde import geometric_powers
from gramian.systems import Modal, TimeVarying

__all__ = [
    "FactoredSingularValues",
    "factor_spectra",
    "factored_singular_values",
    "modal_factors",
    "time_varying_factors",
    "time_varying_norm",
]

_BUDGET = 2**27
"""The largest number of bytes in memory for the triangular factors S, and as many for R."""

Factors = tuple[list[int], Tensor, Tensor]
"""Positions, and the factors S and R at these positions, (P, G, n, n) each. H_i has the singular
values of `S Rᵀ`."""


def factor_spectra(
    measure: Callable[[Tensor], Tensor], left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """Evaluate a function of the singular values of `left rightᵀ`, and estimate their errors.

    Args:
        measure: A function of singular values (P, G, n), descending.
        left: (P, G, n, n): the factors S.
        right: (P, G, n, n): the factors R.

    Returns:
        The values of the function, (P, G, …), and `eps ‖S‖ ‖R‖ / σ_1`, (P, G), which is about the
        rounding error of the singular values relative to the largest.
    """
    size = max(1, 2**16 // max(1, left[0].numel()))

    def run(start: int) -> tuple[Tensor, Tensor]:
        S, R = left[start : start + size], right[start : start + size]
        values = torch.linalg.svdvals(S @ R.mT)
        norms = torch.linalg.matrix_norm(S) * torch.linalg.matrix_norm(R)
        tiny = torch.finfo(values.dtype).tiny
        error = torch.finfo(values.dtype).eps * norms / values[..., :1].sum(-1).clamp_min(tiny)
        return measure(values), torch.where(norms > 0, error, 0)

    results = work(run, range(0, len(left), size), left)
    return torch.cat([r[0] for r in results]), torch.cat([r[1] for r in results])


class _Chain(NamedTuple):
    transition: Transition
    B: Tensor  # (G, L, n)
    C: Tensor  # (G, L, n)

    def observe(self, S: Tensor, i: int) -> Tensor:
        """Compute S_i from S_{i+1}."""
        further = self.transition[i : i + 1].right(S.unsqueeze(1)).squeeze(1)
        return _triangle(torch.cat([further, self.C[:, i : i + 1]], dim=1))

    def reach(self, R: Tensor, i: int) -> Tensor:
        """Compute R_{i+1} from R_i."""
        further = self.transition[i : i + 1].left(R.mT.unsqueeze(1)).squeeze(1).mT
        return _triangle(torch.cat([further, self.B[:, i : i + 1]], dim=1))


def _triangle(rows: Tensor) -> Tensor:
    """Reduce rows (G, k, n) to at most n rows with the same Gram matrix."""
    if rows.shape[-2] <= rows.shape[-1]:
        return rows
    return torch.linalg.qr(rows, mode="r")[1]


def _observed(chain: _Chain, S: Tensor, wanted: list[int]) -> tuple[Tensor, Tensor]:
    """Compute the factors S_i at the positions `wanted`, given `S`, the factor at the last of them.

    Returns:
        The factors (P, G, n, n), padded with zeros, and the factor at the first position without
        padding.
    """
    groups, _, order = chain.B.shape
    factors = S.new_zeros(len(wanted), groups, order, order)
    factors[-1, :, : S.shape[1]] = S
    column = {i: c for c, i in enumerate(wanted)}
    for i in range(wanted[-1] - 1, wanted[0] - 1, -1):
        S = chain.observe(S, i)
        if i in column:
            factors[column[i], :, : S.shape[1]] = S
    return factors, S


def _reached(chain: _Chain, R: Tensor, start: int, wanted: list[int]) -> tuple[Tensor, Tensor]:
    """Compute the factors R_i at the positions `wanted`, given `R`, the factor at `start`.

    Returns:
        The factors (P, G, n, n), padded with zeros, and the factor at the last position without
        padding.
    """
    groups, _, order = chain.B.shape
    factors = R.new_zeros(len(wanted), groups, order, order)
    column = {i: c for c, i in enumerate(wanted)}
    for i in range(start, wanted[-1]):
        R = chain.reach(R, i)
        if i + 1 in column:
            factors[column[i + 1], :, : R.shape[1]] = R
    return factors, R


def time_varying_factors(system: TimeVarying, positions: list[int]) -> Iterator[Factors]:
    """Yield the factors S and R at every position, in float64, for some positions at a time.

    Args:
        system: A system with channels (G), whose last step is the horizon.
        positions: Positions in 1 … L - 1, ascending.
    """
    groups, length, order = system.D.shape[0], system.length, system.order
    B, C, _ = system.vectors(torch.float64)
    chain = _Chain(system.transition(torch.float64), B, C)
    count = max(8, _BUDGET // max(1, groups * order * order * 8))
    stretches = [positions[k : k + count] for k in range(0, len(positions), count)]
    # These are the factors S at the ends of stretches. Those inside are computed again later.
    S, at, edges = B.new_zeros(groups, 0, order), length, []
    for stretch in reversed(stretches):
        for i in range(at - 1, stretch[-1] - 1, -1):
            S = chain.observe(S, i)
        at = stretch[-1]
        edges.append(S)
    R, at = B.new_zeros(groups, 0, order), 0
    for stretch, edge in zip(stretches, reversed(edges), strict=True):
        tasks: list[Callable[[], tuple[Tensor, Tensor]]] = [
            partial(_reached, chain, R, at, stretch),
            partial(_observed, chain, edge, stretch),
        ]
        (right, R), (left, _) = work(lambda task: task(), tasks, B)
        at = stretch[-1]
        yield stretch, left, right


def time_varying_norm(system: TimeVarying) -> Tensor:
    """Compute ‖T‖_F of every channel (G), float64, in blocks."""
    given, vectors = system.transition(torch.float64), system.vectors(torch.float64)
    size = min(64, 1 << (system.length - 1).bit_length())
    if isinstance(given, Dense) and not bounded_products(given.a):
        size = 1
    transition, reach, observe, inside = join(given, *vectors, size)
    energy = inside.square().sum((1, 2, 3))
    gramian = torch.zeros_like(reach[:, :1] @ reach[:, :1].mT)
    for k in range(inside.shape[1]):  # energies do not need square-root factors
        energy = energy + ((observe[:, k] @ gramian[:, 0]) * observe[:, k]).sum((-2, -1))
        block = transition[k : k + 1]
        gramian = block.left(block.left(gramian).mT) + reach[:, k : k + 1] @ reach[:, k : k + 1].mT
    return energy.clamp_min(0).sqrt()


def modal_factors(system: Modal, positions: list[int], horizon: int) -> Iterator[Factors]:
    """Yield the factors S and R at every position, in float64.

    The factors come from the triangular factor of the Vandermonde matrix of {λ, λ̄}.

    Args:
        system: A modal system with channels (G).
        positions: Positions in 1 … horizon - 1.
        horizon: The position at which the Hankel blocks end.
    """
    poles = torch.where(system.residues != 0, system.poles, 0).to(torch.complex128)
    residues = system.residues.to(torch.complex128)
    groups, modes = poles.shape
    wanted = sorted({*positions, *(horizon - i for i in positions)})
    powers = geometric_powers(poles, wanted[-1]).transpose(1, 2)  # (G, t, m)
    rows = torch.view_as_real(powers.contiguous()).flatten(-2)  # (G, t, 2m)
    factors = rows.new_zeros(len(wanted), groups, 2 * modes, 2 * modes)
    column = {i: c for c, i in enumerate(wanted)}
    factor = rows[:, :0]
    for t in range(wanted[-1]):
        factor = _triangle(torch.cat([factor, rows[:, t : t + 1]], dim=1))
        if t + 1 in column:
            factors[column[t + 1], :, : factor.shape[1]] = factor
    # Re (r x y) = (Re x, Im x) [[Re r, -Im r], [-Im r, -Re r]] (Re y, Im y)ᵀ
    for start in range(0, len(positions), max(1, _BUDGET // max(1, factors[0].nbytes))):
        some = positions[start : start + max(1, _BUDGET // max(1, factors[0].nbytes))]
        after = factors[[column[horizon - i] for i in some]].unflatten(-1, (modes, 2))
        real, imaginary = residues.real.unsqueeze(1), residues.imag.unsqueeze(1)
        left = torch.stack(
            [
                after[..., 0] * real - after[..., 1] * imaginary,
                -after[..., 0] * imaginary - after[..., 1] * real,
            ],
            dim=-1,
        ).flatten(-2)
        yield some, left, factors[[column[i] for i in some]]


class FactoredSingularValues(torch.autograd.Function):
    """The singular values of `left right`, computed from these two factors.

    The factors are (G, m, n) and (G, n, k). The forward and the backward pass take O((m + k) n²)
    operations each, and no m × k matrix is formed. Use this function through
    `factored_singular_values`. It supports both modes of differentiation. Second derivatives exist
    where the factors have full rank and the singular values differ, and are NaN elsewhere.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        U, values, V = _factored_svd(left, right)
        return values, U, V

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, U, V = output  # the gradient consists of these
        ctx.mark_non_differentiable(U, V)
        ctx.save_for_backward(*inputs, U, V)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        left, right, U, V = ctx.saved_tensors
        if records_derivatives():  # the gradient, which contains the vectors, is differentiated too
            U, _, V = _factored_svd(left, right)
        weighted = U * g.unsqueeze(-2)
        return weighted @ (right @ V).mT, (left.mT @ weighted) @ V.mT

    @staticmethod
    def jvp(ctx: Any, of_left: Tensor | None, of_right: Tensor | None) -> tuple[Tensor, None, None]:
        left, right = ctx.saved_tensors
        U, values, V = _factored_svd(left, right)
        tangent = torch.zeros_like(values)
        if of_left is not None:
            tangent = tangent + ((of_left.mT @ U) * (right @ V)).sum(-2)
        if of_right is not None:
            tangent = tangent + ((left.mT @ U) * (of_right @ V)).sum(-2)
        return tangent, None, None


def _factored_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute U (G, m, r), σ (G, r), V (G, k, r) of `left right`, r the smallest of m, n and k."""
    Q, S = torch.linalg.qr(left)
    P, R = torch.linalg.qr(right.mT)
    U, values, Vh = torch.linalg.svd(S @ R.mT, full_matrices=False)
    return Q @ U, values, P @ Vh.mT


def factored_singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Compute the singular values (G, r) of `left right` by `FactoredSingularValues`."""
    return FactoredSingularValues.apply(left, right)[0]
