r"""Operations with the real basis `Re λ_k^t, Im λ_k^t` of modal systems, without forming it.

Inner products of basis vectors are geometric sums `Σ_t t^p z^t`, where z is a product of two poles,
and take O(log T) operations. Products with signals are matrix products of about √T × √T blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor

from gramian.ops.vandermonde import geometric_powers, integer_power

__all__ = [
    "Modes",
    "Vandermonde",
    "basis_gram",
    "geometric_sum",
    "geometric_sums",
    "geometric_tail_sums",
    "pole_products",
]


@dataclasses.dataclass
class Modes:
    """The poles of B channels in polar form, with one entry for a conjugate pair.

    Args:
        decay: (B, m), float64: `-log |λ|`.
        angle: (B, m), float64: the angle of λ, 0 … π; exactly 0 or π for a real pole.
        real: (B, m), bool: whether the entry is a single real pole.
        present: (B, m), bool: whether the entry is in use.
    """

    decay: Tensor
    angle: Tensor
    real: Tensor
    present: Tensor

    @staticmethod
    def of(poles: Tensor) -> Modes:
        """Make modes from poles (B, m), complex128, one of each pair, NaN where there is none."""
        present = ~poles.isnan()
        poles = torch.where(present, poles, 0.5)
        real = poles.imag == 0
        decay = -poles.abs().clamp(min=1e-16).log()
        return Modes(decay, poles.angle().abs(), real, present)

    @property
    def poles(self) -> Tensor:
        """Return the poles (B, m), complex128, 0 where there is none."""
        radius = torch.where(self.present, torch.exp(-self.decay), 0)
        sine = torch.where(self.real, 0.0, self.angle.sin())
        return torch.complex(radius * self.angle.cos(), radius * sine)

    @property
    def poles_or_nan(self) -> Tensor:
        """Return the poles (B, m), complex128, NaN where there is none."""
        return torch.where(self.present, self.poles, torch.nan)

    def __getitem__(self, index: Any) -> Modes:
        return Modes(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))

    @staticmethod
    def joined(parts: list[Modes]) -> Modes:
        """Join the channels of all parts, padded to the same number of entries."""
        width = max(part.decay.shape[-1] for part in parts)

        def join(name: str) -> Tensor:
            pieces = [getattr(part, name) for part in parts]
            pad = torch.nn.functional.pad
            return torch.cat([pad(p, (0, width - p.shape[-1])) for p in pieces])

        return Modes(*(join(field.name) for field in dataclasses.fields(Modes)))

    def clone(self) -> Modes:
        return Modes(*(getattr(self, f.name).clone() for f in dataclasses.fields(self)))

    def put(self, where: Tensor, other: Modes) -> None:
        """Replace the channels `where` (mask or indices) by the channels of `other`, of equal m."""
        for field in dataclasses.fields(self):
            getattr(self, field.name)[where] = getattr(other, field.name)


def geometric_sums(z: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `Σ_{t<count} t^p z^t` for p = 0, 1, 2 by doubling.

    The sums of 2k terms and of k + 1 terms are computed from the sum of k terms. No quotient is
    formed, so nothing cancels if z is near 1.

    Args:
        z: Complex or real, of any shape.
        count: The number of terms, at least 1.
    """
    zero = torch.zeros_like(z)
    sums = [torch.ones_like(z), zero, zero]
    power, have = z, 1  # z^have
    for bit in bin(count)[3:]:
        s0, s1, s2 = sums
        # In the second half of the sum, t = have + s.
        moved1 = torch.add(s1, s0, alpha=have)
        moved = (s0, moved1, torch.add(s2, torch.add(s1, moved1), alpha=have))
        sums = [torch.addcmul(s, power, m) for s, m in zip(sums, moved, strict=True)]
        power, have = power * power, 2 * have
        if bit == "1":
            sums = [torch.add(s, power, alpha=have**p) for p, s in enumerate(sums)]
            power, have = power * z, have + 1
    return sums[0], sums[1], sums[2]


def geometric_sum(z: Tensor, count: int) -> Tensor:
    """Compute `Σ_{t<count} z^t` by doubling, as `geometric_sums` does."""
    total, power, have = torch.ones_like(z), z, 1
    for bit in bin(count)[3:]:
        total, power, have = torch.addcmul(total, power, total), power * power, 2 * have
        if bit == "1":
            total, power, have = total + power, power * z, have + 1
    return total


def pole_products(poles: Tensor) -> Tensor:
    """Return the products `λ_k λ_l` and `λ_k λ̄_l`, (2, B, m, m)."""
    column, row = poles.unsqueeze(-1), poles.unsqueeze(-2)
    return torch.stack([column * row, column * row.conj()])


def basis_gram(sums: Tensor) -> Tensor:
    """Compute the Gram matrix of `Re λ_k^t, Im λ_k^t` with weights w_t, (B, 2m, 2m).

    Args:
        sums: (2, B, m, m): `Σ_t w_t z^t`, where z is each of the two `pole_products`.
    """
    plain, mixed = sums[0] / 2, sums[1] / 2
    corner = plain.imag - mixed.imag  # Σ Re λ_k^t Im λ_l^t
    top = torch.cat([plain.real + mixed.real, corner], dim=-1)
    bottom = torch.cat([corner.mT, mixed.real - plain.real], dim=-1)
    return torch.cat([top, bottom], dim=-2)


def geometric_tail_sums(
    products: Tensor, sums: tuple[Tensor, Tensor, Tensor], length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `Σ_{t≥length} t^p z^t`, |z| < 1, by doubling the sums of `length` terms further."""
    s0, s1, s2 = sums
    start = power = integer_power(products, length)
    have = length
    while have < 2**62 and bool((power.abs() > 1e-20).any()):
        moved1 = torch.add(s1, s0, alpha=have)
        moved2 = torch.add(s2, torch.add(s1, moved1), alpha=have)
        s0, s1, s2 = s0 + power * s0, s1 + power * moved1, s2 + power * moved2
        power, have = power * power, 2 * have
    return start * s0, start * (s1 + length * s0), start * (s2 + 2 * length * s1 + length**2 * s0)


class Vandermonde:
    """Products with `λ_k^t` and `t λ_k^t`, t = 0 … T - 1, as matrix products of √T × √T blocks."""

    def __init__(self, poles: Tensor, length: int) -> None:
        self.length = length
        self.columns = max(1, math.isqrt(length))
        self.rows = -(-length // self.columns)
        inner = geometric_powers(poles, self.columns)  # (B, m, J)
        outer = geometric_powers(inner[..., -1] * poles, self.rows)  # (B, m, I)
        # Products of denormal numbers are slow to compute and negligible.
        self.outer = torch.where(outer.abs() < 1e-150, 0, outer)
        self.inner = torch.cat([inner.real, inner.imag], dim=-2)  # (B, 2m, J)

    @functools.cached_property
    def weighted(self) -> Tensor:
        """Return the rows `λ^j` above the rows `j λ^j`, (B, 4m, J)."""
        place = torch.arange(self.columns, dtype=self.inner.dtype, device=self.inner.device)
        return torch.cat([self.inner, self.inner * place], dim=-2)

    def blocks(self, signal: Tensor) -> Tensor:
        missing = self.rows * self.columns - self.length
        if missing:
            signal = torch.nn.functional.pad(signal, (0, missing))
        return signal.unflatten(-1, (self.rows, -1))

    def moments(self, signal: Tensor, first: bool = True) -> list[Tensor]:
        """Compute `Σ_t signal_t λ_k^t` and, if `first`, `Σ_t t signal_t λ_k^t`, each (B, m)."""
        modes = self.outer.shape[-2]
        basis = self.weighted if first else self.inner
        partial = torch.bmm(basis, self.blocks(signal).mT)  # (B, 2m or 4m, I)
        zeroth = self.outer * torch.complex(partial[:, :modes], partial[:, modes : 2 * modes])
        if not first:
            return [zeroth.sum(-1)]
        start = self.columns * torch.arange(self.rows, dtype=signal.dtype, device=signal.device)
        inside = torch.complex(partial[:, 2 * modes : 3 * modes], partial[:, 3 * modes :])
        return [zeroth.sum(-1), (self.outer * inside + zeroth * start).sum(-1)]

    def combine(self, residues: Tensor) -> Tensor:
        """Compute `Re Σ_k residues_k λ_k^t`, (B, T)."""
        scaled = (residues.unsqueeze(-1) * self.outer).mT  # (B, I, m)
        taps = torch.bmm(torch.cat([scaled.real, -scaled.imag], dim=-1), self.inner)
        return taps.flatten(-2)[:, : self.length]
