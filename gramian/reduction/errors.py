r"""Errors of a reduction, and lower bounds for every reduction of the same order.

The windowed bound (Eckart–Young) is `‖h - ĥ‖₂² ≥ Σ_{k>n} σ_k(H_p)² / min(p, L - p)` over the taps,
for every ĥ of order n. Here H_p is the p × (L - p) Hankel matrix of h_1 … h_{L-1}. The bound holds
because each tap occurs in H_p at most min(p, L - p) times, and the Hankel matrix of ĥ has at most
rank n.

The zero-extended bound (V. M. Adamjan, D. Z. Arov, M. G. Krein, "Analytic properties of Schmidt
pairs for a Hankel operator and the generalized Schur–Takagi problem", 1971) is σ_{n+1} of the
Hankel operator of the kernel, continued by zeros. This is at most the Hankel norm of h - ĥ on the
infinite horizon, which includes the tail of ĥ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gramian.ops.double_double import Complex, DoubleDouble
from gramian.ops.hankel import Hankel
from gramian.ops.krylov import krylov_vectors, matrix_power
from gramian.ops.precision import full_precision
from gramian.ops.vandermonde import integer_power
from gramian.reduction.spectrum import lanczos_spectrum

__all__ = ["hankel_error", "squared_lower_bound", "tail_energy"]

_DENSE_SIZE = 128
"""Operators up to this size are formed as a matrix and factored."""

_LARGEST_SPLIT = 256
"""The largest number of rows p = 4 n with which the bound for order n is computed. A matrix with
that many rows gives the tightest bound for flat spectra, but takes p³ operations."""

_RESIDUAL = 1e-4
"""Relative accuracy of a Hankel norm."""

_DOUBLINGS = 60
"""The number of doublings after which powers of a stable matrix of doubles are zero, if they ever
become zero."""

_CANCELLATION = 1e3
"""The largest ratio of terms to their sum for which double precision is enough."""


def squared_lower_bound(taps: Tensor, order: Tensor, windowed: Tensor | None) -> Tensor:
    """Compute a lower bound of `Σ_t (h_t - ĥ_t)²` over the taps for every ĥ of the given order.

    Args:
        taps: (B, T), float64: h_1 … h_T, T = L - 1.
        order: (B), integers: the order of ĥ for every kernel.
        windowed: (B, K), descending: lower bounds of the singular values of the Hankel matrices
            with `tail="free"`, or None if they are not known.
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
    """Compute the upper triangle of G = `H_p H_pᵀ`, (B, p, p), from its first row.

    Along the diagonals, `G_{i+1,j+1} = G_ij - h_{i+1} h_{j+1} + h_{i+1+q} h_{j+1+q}`, where the
    matrix has q = L - p columns.
    """
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
    """Sum all but the n largest eigenvalues, and subtract a bound of the sum's rounding errors."""
    values = torch.linalg.eigvalsh(gram, UPLO="U")  # ascending
    p = gram.shape[-1]
    noise = 8 * torch.finfo(gram.dtype).eps * p * values[:, -1]
    return (values[:, : p - n] - noise.unsqueeze(-1)).clamp(min=0).sum(-1)


def tail_energy(poles: Tensor, residues: Tensor, length: int) -> Tensor:
    """Compute `Σ_{t≥length} ĥ_t²`, (B), infinite if a pole is on or outside the unit circle.

    The sum uses the Takenaka–Malmquist basis, which is orthonormal for any poles. So large residues
    of nearly coincident poles cancel before they are squared.

    Args:
        poles: (B, m), complex128: the poles of ĥ, one of each pair.
        residues: (B, m), complex128: their residues.
        length: The first tap of the tail, at least 1.
    """
    outside = ((poles.abs() >= 1) & (residues != 0)).any(-1)
    poles = torch.where((residues == 0) | outside.unsqueeze(-1), 0, poles)
    states = residues * integer_power(poles, length - 1) / 2
    states = torch.cat([states, states.conj()], dim=-1)
    poles = torch.cat([poles, poles.conj()], dim=-1)
    energy = states.real.new_zeros(len(states))
    blaschke = torch.ones_like(poles)  # at every pole: the product of the factors so far
    for s in range(poles.shape[-1]):
        pole = poles[:, s : s + 1]
        denominator = 1 - pole.conj() * poles
        share = (states * blaschke / denominator).sum(-1).abs().square()
        energy += share * (1 - pole.squeeze(-1).abs().square())
        blaschke = blaschke * (poles - pole) / denominator
    return torch.where(outside, torch.inf, energy)


@full_precision()
def hankel_error(taps: Tensor, poles: Tensor, residues: Tensor) -> Tensor:
    """Estimate the Hankel norm (B) of h - ĥ on the infinite horizon, where h continues with zeros.

    The estimate is not above the norm and at most 1e-4 (relative) below it, except for rounding
    errors of `(1e-12 + 1e-15 / (1 - ρ)) (‖h‖₂ + ‖Γ_ĥ‖)`, where ρ is the largest modulus of a pole.
    This holds even if poles are very close to each other and their residues are very large. The
    norm is infinite if a pole is on or outside the unit circle.

    Args:
        taps: (B, T), float64: h_1 … h_T.
        poles: (B, m), complex128: the poles of ĥ, one of each pair.
        residues: (B, m), complex128: their residues.
    """
    if poles.shape[-1] == 0:
        poles, residues = (torch.nn.functional.pad(x, (0, 1)) for x in (poles, residues))
    outside = ((poles.abs() >= 1) & (residues != 0)).any(-1)
    poles = torch.where((residues == 0) | outside.unsqueeze(-1), 0, poles)
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
    """The Hankel operator of h - ĥ, represented by a symmetric matrix of size T + 2m.

    `Γ_ĥ = Φ M Φᵀ`, where the columns of Φ are the orthonormal functions `φ(t) = A^t b` of a
    `_Cascade`. After the first T rows, Γ_h is zero and Φ is `Φ (A^T)ᵀ`. So the 2m rows of `(A^T)ᵀ`
    may replace these rows, which keeps the singular values.
    """

    def __init__(self, taps: Tensor, poles: Tensor, residues: Tensor) -> None:
        count = taps.shape[-1]
        cascade = _Cascade(poles)
        steps = 1 << (count - 1).bit_length()
        functions, _ = krylov_vectors(cascade.A, cascade.b.unsqueeze(-1), steps)  # (B, 2m, ≥ T)
        far = matrix_power(cascade.A, count)
        self.basis = torch.cat([functions[..., :count], far], dim=-1)
        self.middle = cascade.compressed(residues)
        self.kernel = Hankel(taps, count, count)
        self.rows = self.basis.shape[-1]

    @property
    def like(self) -> Tensor:
        """Return a tensor that has the batch dimension, dtype and device of the matrices."""
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


class _Cascade:
    r"""Real orthonormal functions `φ(t) = A^t b` of the poles {λ, λ̄}: all-pass sections in series.

    With `d = |λ|²` and `β = 2 Re λ / (1 + d)`, a section of λ and λ̄ has the orthogonal realization

        [[β d, -d √(1-β²), √(1-d²)],  [√(1-β²), β, 0],  [-β √(1-d²), √(1-β²) √(1-d²), d]].

    Its two states are Kautz functions of its input (W. H. Kautz, "Transient synthesis in the time
    domain", 1954), and its output is the input of the next section. So `A Aᵀ + b bᵀ = I` for any
    poles. If poles coincide, no number here is large, unlike the residues.

    Args:
        poles: (B, m), complex128: the poles λ, inside the unit circle.
    """

    A: Tensor
    """(B, 2m, 2m), block lower triangular."""
    b: Tensor
    """(B, 2m)."""

    def __init__(self, poles: Tensor) -> None:
        self.poles = poles
        real, imag = DoubleDouble.of(poles.real), DoubleDouble.of(poles.imag)
        left = DoubleDouble.of(torch.ones_like(poles.real)) - (real * real + imag * imag)
        direct = 1 - left.high
        self.angle = 2 * poles.real / (1 + direct)  # β
        self.turn = (1 - poles).abs() * (1 + poles).abs() / (1 + direct)  # √(1 - β²)
        self.gain = (left.high * (1 + direct)).sqrt()  # √(1 - d²)

        batch, modes = poles.shape
        self.A = poles.real.new_zeros(batch, 2 * modes, 2 * modes)
        self.b = poles.real.new_zeros(batch, 2 * modes)
        of_states, of_input = torch.zeros_like(self.b), torch.ones_like(self.b[:, 0])
        for s in range(modes):
            d, angle, turn, gain = (x[:, s] for x in (direct, self.angle, self.turn, self.gain))
            first, second = 2 * s, 2 * s + 1
            self.b[:, first] = gain * of_input
            self.A[:, first] = gain.unsqueeze(-1) * of_states
            self.A[:, first, first], self.A[:, first, second] = angle * d, -turn * d
            self.A[:, second, first], self.A[:, second, second] = turn, angle
            of_states, of_input = d.unsqueeze(-1) * of_states, d * of_input
            of_states[:, first], of_states[:, second] = -angle * gain, turn * gain

    def __getitem__(self, index: Tensor) -> _Cascade:
        picked = object.__new__(_Cascade)
        for name, value in self.__dict__.items():
            setattr(picked, name, value[index])
        return picked

    def compressed(self, residues: Tensor) -> Tensor:
        """Compute `M = Φᵀ Γ_ĥ Φ`, (B, 2m, 2m), where Φ has the rows φ(0), φ(1), ….

        With `g(λ) = Σ_t φ(t) λ^t`, M is `Re Σ_k r_k g(λ_k) g(λ_k)ᵀ`. If large residues cancel in
        that sum, `c = M b = Re Σ_k r_k g(λ_k)` is computed with twice the digits, and M is the
        solution of `M = Aᵀ M Aᵀ + c bᵀ`, in which nothing cancels.
        """
        transforms = torch.stack(self._transforms(lambda values: values), dim=1)
        transforms = transforms * self._gains.unsqueeze(-1)  # (B, 2m, m)
        middle = ((transforms * residues.unsqueeze(1)) @ transforms.mT).real
        terms = (residues.abs() * transforms.abs().square().sum(1)).sum(-1)
        cancels = terms > _CANCELLATION * middle.norm(dim=(-2, -1))
        if bool(cancels.any()):
            middle[cancels] = self[cancels].compressed_carefully(residues[cancels])
        return middle

    def compressed_carefully(self, residues: Tensor) -> Tensor:
        """Compute the result of `compressed` for channels in which large residues cancel."""
        weights = Complex.of(residues)
        sums = [(value * weights).real.sum(-1).high for value in self._transforms(Complex.of)]
        c = torch.stack(sums, dim=-1) * self._gains
        middle, power = c.unsqueeze(-1) * self.b.unsqueeze(-2), self.A.mT
        for _ in range(_DOUBLINGS):  # double the number of terms of Σ_i (Aᵀ)^i c bᵀ (Aᵀ)^i
            if float(power.abs().amax()) <= torch.finfo(power.dtype).eps:
                break
            middle = middle + power @ middle @ power
            power = power @ power
        return middle

    @property
    def _gains(self) -> Tensor:
        """Return the factors of the functions of `_transforms`, (B, 2m)."""
        return torch.stack([self.gain, self.gain * self.turn], dim=-1).flatten(-2)

    def _transforms(self, number: Callable[[Tensor], Any]) -> list[Any]:
        """Compute `g_j(λ_k)` divided by the gain of j, as one tensor (B, m) for every j.

        `number` converts tensors to the kind of numbers that the computation uses.
        """
        z, one = number(self.poles), number(torch.ones_like(self.poles))
        through, transforms = one, []
        for s in range(self.poles.shape[-1]):
            pole = self.poles[:, s : s + 1]
            own, conjugate = number(pole), number(pole.conj_physical())
            common = through / ((one - own * z) * (one - conjugate * z))
            angle = number(self.angle[:, s : s + 1])
            transforms += [(one - angle * z) * common, z * common]
            through = common * ((z - own) * (z - conjugate))
        return transforms
