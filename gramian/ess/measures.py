r"""Measures of the spectrum of a Hankel block, which define effective state-size.

The entropy measure is `exp(-Σ_k p_k log p_k)` with `p = σ / Σ σ`, the exponential of the entropy of
the normalized singular values. The tolerance measure is the number of singular values that exceed
`tol`, or `rtol` times the largest (arXiv 2504.19561, section 3). Both are 0 for a block that is
zero up to rounding.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

__all__ = ["Measure", "size_from_sums", "size_with", "spectral_sums"]

_ROUNDING = torch.finfo(torch.float64).eps / 4
"""Lower bound of the error of a Gram matrix's small eigenvalue, relative to the largest
eigenvalue."""

_COUNTED = 64 * torch.finfo(torch.float64).eps
"""Upper bound of the error of a small eigenvalue. For blocks of rank one with sides of 2 to 3,000
it is up to 3 eps."""

_NEGATIVE = 4
"""Ratio of the error of a small eigenvalue to how far the smallest eigenvalue is below zero."""

_POSITIVE = 6
"""If this many of the smallest eigenvalues are all positive, the largest of them is an upper bound
of their rounding errors."""


@dataclasses.dataclass(frozen=True)
class Measure:
    """The entropy of a spectrum or, given a threshold, the number of singular values above it."""

    tol: float | None = None
    rtol: float | None = None

    @property
    def counts(self) -> bool:
        return self.tol is not None or self.rtol is not None

    def __call__(self, values: Tensor, floor: Tensor) -> Tensor:
        """Compute the measure of every spectrum. An entropy is differentiable.

        Args:
            values: (*S, k), float64: singular values in any order, which may include zeros.
            floor: The norms up to which blocks count as zero, in a shape that broadcasts against
                (*S).

        Returns:
            (*S), float64.
        """
        if values.shape[-1] == 0:
            return values.new_zeros(values.shape[:-1])
        norm = torch.linalg.vector_norm(values.detach(), dim=-1)
        there = (norm > floor) & (norm > 0)
        if self.counts:
            size = (values > self._threshold(values)).sum(-1).to(values.dtype)
        else:
            largest = values.detach().amax(-1, keepdim=True)
            noise = values.shape[-1] * torch.finfo(values.dtype).eps * largest
            kept = (values > noise) & there.unsqueeze(-1)
            total = torch.where(kept, values, 0).sum(-1, keepdim=True)
            p = torch.where(kept, values, 1) / torch.where(total > 0, total, 1)
            size = torch.where(kept, torch.special.entr(p), 0).sum(-1).exp()
        return torch.where(there, size, 0)

    def unsafe_from_gram(self, eigenvalues: Tensor, sizes: Tensor, tolerance: float) -> Tensor:
        """Return whether a measure from the eigenvalues of a Gram matrix may be inaccurate.

        An entropy is inaccurate if its relative error exceeds `tolerance`, and a count if it is
        wrong at all. A Gram matrix squares the condition number. If a spectrum falls gradually, its
        small eigenvalues are nevertheless accurate to well below eps λ_1. If the rank is lower than
        the size, the other eigenvalues are rounding errors, half of which are negative. So how far
        the smallest eigenvalue is below zero shows the error δλ of all small eigenvalues. If no
        eigenvalue is negative, the sixth smallest is an upper bound of δλ. A singular value is then
        accurate to `δλ / 2σ`, and at worst to √δλ. To first order, the error of the entropy is
        `Σ_k (|log p_k| + log ESS) δσ_k / Σσ`. The errors of singular values above the noise have
        random signs; those of singular values within the noise are all positive.

        Args:
            eigenvalues: (*S, k), float64: the eigenvalues of each matrix, ascending and followed by
                zeros up to a common k.
            sizes: (*S): the number of eigenvalues of each matrix.
            tolerance: The largest acceptable relative error.

        Returns:
            (*S), bool.
        """
        values = eigenvalues.clamp_min(0).sqrt()
        known = torch.arange(values.shape[-1], device=values.device) < sizes.unsqueeze(-1)
        below = -eigenvalues.amin(-1, keepdim=True).clamp_max(0)
        largest = eigenvalues.amax(-1, keepdim=True)
        if self.counts:  # the spectrum may consist of rounding errors, so it gives no bound
            error = torch.maximum(_COUNTED * largest, _NEGATIVE * below)
            near = (eigenvalues - self._threshold(values).square()).abs() <= error
            return (near & known).any(-1)
        noise = _ROUNDING * largest
        if eigenvalues.shape[-1] >= _POSITIVE:
            bounded = (sizes.unsqueeze(-1) >= _POSITIVE) & (eigenvalues[..., :1] > 0)
            bound = torch.minimum(noise, eigenvalues[..., _POSITIVE - 1, None])
            noise = torch.where(bounded, bound, noise)
        noise = torch.maximum(noise, _NEGATIVE * below)
        worst = noise.sqrt()
        error = torch.where(values > worst, noise / (2 * values), worst)
        total = values.sum(-1, keepdim=True)
        p = torch.where(total > 0, values / total, 0)
        entropy = torch.special.entr(p).sum(-1, keepdim=True)
        weight = (-p.clamp_min(1e-300).log() + entropy).clamp_max(80) * error / total
        random = torch.where(known & (values > 2 * worst), weight, 0).square().sum(-1).sqrt()
        biased = torch.where(known & (values <= 2 * worst), weight, 0).sum(-1)
        return ~(random + biased <= tolerance) & (total.squeeze(-1) > 0)

    def _threshold(self, values: Tensor) -> Tensor:
        threshold = torch.full_like(values[..., :1], 0.0 if self.tol is None else self.tol)
        if self.rtol is not None:
            threshold = torch.maximum(threshold, self.rtol * values.amax(-1, keepdim=True))
        return threshold


def spectral_sums(values: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `Σ σ` and `Σ σ log σ`."""
    return values.sum(), torch.xlogy(values, values).sum()


def size_from_sums(S: Tensor, Q: Tensor) -> Tensor:
    """Compute `exp(-Σ p log p)` with `p = σ / S` from `S = Σ σ` and `Q = Σ σ log σ`."""
    return S * (-Q / S).exp()


def size_with(S: Tensor, Q: Tensor, value: Tensor, count: Tensor) -> Tensor:
    """Compute the size with `count` (possibly a fraction) further singular values of `value`."""
    return size_from_sums(S + count * value, Q + count * torch.xlogy(value, value))
