r"""Errors of a reduction, and bounds that no reduction of the same order can beat.

Windowed (Eckart–Young): every ĥ of order n has ``‖h - ĥ‖₂² ≥ Σ_{k>n} σ_k(H_p)² / min(p, L - p)``
over the taps, H_p the p × (L - p) Hankel matrix of h_1 … h_{L-1}: its entries hold each tap at most
min(p, L - p) times, and that of ĥ has rank n at most.

Zero-extended (V. M. Adamjan, D. Z. Arov, M. G. Krein, "Analytic properties of Schmidt pairs for a
Hankel operator and the generalized Schur–Takagi problem", 1971): σ_{n+1} of the Hankel operator of
the kernel followed by zeros is at most the Hankel norm of h - ĥ on the infinite horizon, ĥ's tail
included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gramian.ops.hankel import Hankel
from gramian.ops.vandermonde import integer_power
from gramian.reduction.residues import real_basis
from gramian.reduction.spectrum import lanczos_spectrum

__all__ = ["hankel_error", "squared_lower_bound", "tail_energy"]

_DENSE_SIZE = 128
"""Operators up to this size are formed and factored."""

_LARGEST_SPLIT = 256
"""The most rows of a Hankel matrix with four times as many as the order, which gives the tightest
bound of flat spectra but takes p³ operations."""

_RESIDUAL = 1e-4
"""Relative accuracy of a Hankel norm."""


def squared_lower_bound(taps: Tensor, order: Tensor, windowed: Tensor | None) -> Tensor:
    """A lower bound of ``Σ_t (h_t - ĥ_t)²`` over the taps, for every ĥ of the given order.

    Args:
        taps: (B, T), float64: h_1 … h_T, T = L - 1.
        order: (B), integers.
        windowed: (B, K), at most the singular values of the Hankel matrices with ``tail="free"``,
            descending, if at hand.
    """
    bound = taps.new_zeros(len(taps))
    length = taps.shape[-1] + 1
    for n in order.unique().tolist():
        rows = order == n
        for p in sorted({n + 1, 2 * n, 4 * n}):
            if n < p <= length - p and (p <= 2 * n or p <= _LARGEST_SPLIT):
                energy = _tail_eigenvalues(_row_gram(taps[rows], p), n)
                bound[rows] = torch.maximum(bound[rows], energy / p)
        if windowed is not None:
            energy = windowed[rows, n:].square().sum(-1) / ((length + 1) // 2)
            bound[rows] = torch.maximum(bound[rows], energy)
    return bound


def _row_gram(taps: Tensor, p: int) -> Tensor:
    """Upper triangle of ``H_p H_pᵀ``, (B, p, p), from its first row: along the diagonals,
    ``G_{i+1,j+1} = G_ij - h_{i+1} h_{j+1} + h_{i+1+q} h_{j+1+q}``, q = L - p columns."""
    q = taps.shape[-1] + 1 - p
    gram = taps.new_zeros(len(taps), p, p)
    gram[:, 0] = (Hankel(taps, p, q) @ taps[:, None, :q]).squeeze(1)
    for i in range(p - 1):
        row = gram[:, i, i:-1]
        row = row - taps[:, i : i + 1] * taps[:, i : p - 1]
        row.addcmul_(taps[:, i + q : i + q + 1], taps[:, i + q : p - 1 + q])
        gram[:, i + 1, i + 1 :] = row
    return gram


def _tail_eigenvalues(gram: Tensor, n: int) -> Tensor:
    """Sum of all but the n largest eigenvalues, lowered by what rounding may have added."""
    values = torch.linalg.eigvalsh(gram, UPLO="U")  # ascending
    p = gram.shape[-1]
    noise = 8 * torch.finfo(gram.dtype).eps * p * values[:, -1]
    return (values[:, : p - n] - noise.unsqueeze(-1)).clamp(min=0).sum(-1)


def tail_energy(poles: Tensor, residues: Tensor, length: int) -> Tensor:
    """``Σ_{t≥length} ĥ_t²``, (B); infinite with a pole on the unit circle or outside.

    By the Takenaka–Malmquist basis, which is orthonormal whatever the poles: large residues of
    nearly coincident poles cancel before they are squared.

    Args:
        poles: (B, m), complex128.
        residues: (B, m), complex128.
        length: At least 1.
    """
    outside = ((poles.abs() >= 1) & (residues != 0)).any(-1)
    poles = torch.where((residues == 0) | outside.unsqueeze(-1), 0, poles)
    states = residues * integer_power(poles, length - 1) / 2
    states = torch.cat([states, states.conj()], dim=-1)
    poles = torch.cat([poles, poles.conj()], dim=-1)
    energy = states.real.new_zeros(len(states))
    blaschke = torch.ones_like(poles)  # the product of the factors so far, at every pole
    for s in range(poles.shape[-1]):
        pole = poles[:, s : s + 1]
        denominator = 1 - pole.conj() * poles
        share = (states * blaschke / denominator).sum(-1).abs().square()
        energy += share * (1 - pole.squeeze(-1).abs().square())
        blaschke = blaschke * (poles - pole) / denominator
    return torch.where(outside, torch.inf, energy)


def basis_gram(poles: Tensor) -> Tensor:
    """Inner products of ``Re λ_k^t`` and ``Im λ_k^t`` over t = 0, 1, …: (B, 2m, 2m)."""
    column, row = poles.unsqueeze(-1), poles.unsqueeze(-2)
    plain = 1 / (1 - column * row)  # Σ_t λ_k^t λ_l^t
    mixed = 1 / (1 - column * row.conj())
    corner = (plain.imag - mixed.imag) / 2  # Σ_t Re λ_k^t Im λ_l^t
    top = torch.cat([(plain.real + mixed.real) / 2, corner], dim=-1)
    bottom = torch.cat([corner.mT, (mixed.real - plain.real) / 2], dim=-1)
    return torch.cat([top, bottom], dim=-2)


def hankel_error(taps: Tensor, poles: Tensor, residues: Tensor) -> Tensor:
    """Hankel norm of h - ĥ on the infinite horizon, h zero past its end: (B).

    Infinite with a pole on the unit circle or outside.

    Args:
        taps: (B, T), float64: h_1 … h_T.
        poles: (B, m), complex128.
        residues: (B, m), complex128.
    """
    outside = ((poles.abs() >= 1) & (residues != 0)).any(-1)
    poles = torch.where(outside.unsqueeze(-1), 0, poles)
    operator = _ErrorOperator(taps, poles, residues)
    if operator.rows <= _DENSE_SIZE:
        unit = torch.eye(operator.rows, dtype=taps.dtype, device=taps.device)
        matrix = operator @ unit.expand(len(taps), -1, -1)
        norm = torch.linalg.eigvalsh(matrix).abs().amax(-1)
    else:
        terms = taps.abs().sum(-1, keepdim=True) + operator.middle.norm(dim=(-2, -1)).unsqueeze(-1)
        spectrum = lanczos_spectrum(operator, 1, residual=_RESIDUAL, magnitude=terms)
        norm = spectrum.values[:, 0]
    return torch.where(outside, torch.inf, norm)


class _ErrorOperator:
    """The Hankel operator of h - ĥ as a symmetric matrix of size T + 2m, by isometry.

    ``Γ_ĥ = Φ M Φᵀ`` with Φ the infinite real basis {Re λ^t, Im λ^t} and M block diagonal. Past its
    first T rows Γ_h is zero and Φ is ``Φ P``, P the T-th power of the poles' rotations, so those
    rows may be replaced by the 2m rows of ``F P``, where ``FᵀF = ΦᵀΦ``.
    """

    def __init__(self, taps: Tensor, poles: Tensor, residues: Tensor) -> None:
        count = taps.shape[-1]
        basis = real_basis(poles, count)  # (B, 2m, ≥ T)
        scale = basis_gram(poles).diagonal(dim1=-2, dim2=-1)
        scale = torch.where(scale > 0, 1 / scale.sqrt(), 0).unsqueeze(-1)  # (B, 2m, 1)
        values, vectors = torch.linalg.eigh(basis_gram(poles) * scale * scale.mT)
        root = values.clamp(min=0).sqrt().unsqueeze(-1) * vectors.mT  # F, columns at unit length
        far = integer_power(poles, count)
        inverse = torch.where(scale > 0, 1 / scale, 0)
        power = inverse * _blocks(far.real, far.imag, -far.imag, far.real) * scale.mT
        tail = (root @ power).mT  # (B, 2m, 2m): rows of the basis
        self.basis = torch.cat([basis[..., :count] * scale, tail], dim=-1)
        middle = _blocks(residues.real, -residues.imag, -residues.imag, -residues.real)
        self.middle = inverse * middle * inverse.mT
        self.kernel = Hankel(taps, count, count)
        self.rows = self.basis.shape[-1]

    @property
    def like(self) -> Tensor:
        """A tensor of the batch, dtype and device of the matrices."""
        return self.basis

    def __matmul__(self, vectors: Tensor) -> Tensor:
        image = vectors @ self.basis.mT @ self.middle @ self.basis
        image.neg_()
        image[..., : self.kernel.rows] += self.kernel @ vectors[..., : self.kernel.rows]
        return image

    def __getitem__(self, index: Tensor) -> _ErrorOperator:
        picked = object.__new__(_ErrorOperator)
        picked.rows = self.rows
        for name in ("basis", "middle", "kernel"):
            setattr(picked, name, getattr(self, name)[index])
        return picked


def _blocks(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """[[diag a, diag b], [diag c, diag d]] of vectors (B, m): (B, 2m, 2m)."""
    top = torch.cat([torch.diag_embed(a), torch.diag_embed(b)], dim=-1)
    return torch.cat([top, torch.cat([torch.diag_embed(c), torch.diag_embed(d)], dim=-1)], dim=-2)
