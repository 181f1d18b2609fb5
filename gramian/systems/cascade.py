r"""Realizations of systems given by zeros, poles and a gain, without expanding polynomials.

If the zeros of a polynomial of degree 10 crowd, its coefficients in double precision do not
determine them. So this module forms no polynomial of a degree above 2. Each pair of poles belongs
to one section of a cascade of second-order sections

    H_s(z) = (b_0 z² + b_1 z + b_2) / (z² + a_1 z + a_2).

A section with poles σ ± iω has `A = [[σ, -ω² / m], [m, σ]]` and `B = (1, 0)`. This is a rotation
for m = ω; with another m, the powers of A stay bounded even if the two poles coincide. The
numerator of a section minus its direct term is computed in rational arithmetic, so that a zero near
a pole loses no digits. The residues of partial fractions are products of quotients. The numerators
and denominators of these are differences of zeros and poles, each accurate to the last digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Section", "cascade", "check_roots", "partial_fractions", "sections"]

_POINTS = 1024
"""The number of points on the upper half circle at which the gain of a section is evaluated."""

_PAIRED = 100 * np.finfo(np.float64).eps
"""Two roots form a pair if the relative distance of one from the other's conjugate is at most
this."""


class Section(NamedTuple):
    """`(b_0 z^n + … + b_n) / (z^n + … + a_n)`, of degree n = len(a) ≤ 2, in rational numbers."""

    b: tuple[Fraction, ...]
    a: tuple[Fraction, ...]

    def roots(self) -> tuple[list[complex], list[complex]]:
        """Return the zeros and the poles, rounded to double precision."""
        first = next((k for k, value in enumerate(self.b) if value), len(self.b))
        top = self.b[first:] or (Fraction(1),)
        return _roots([value / top[0] for value in top[1:]]), _roots(self.a)

    def response(self, z: np.ndarray) -> np.ndarray:
        num = np.polyval([float(value) for value in self.b], z)
        return num / np.polyval([1.0, *(float(value) for value in self.a)], z)

    def realize(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """Return (A, B, C, D), float64."""
        direct = self.b[0]
        rest = [b - direct * a for b, a in zip(self.b[1:], self.a, strict=True)]
        if len(self.a) < 2:
            pole = [[-float(a)] for a in self.a]
            ones, read = np.ones(len(pole)), np.array([float(c) for c in rest])
            return np.array(pole).reshape(len(pole), len(pole)), ones, read, float(direct)
        real, square = -self.a[0] / 2, self.a[1] - self.a[0] ** 2 / 4  # σ and ω²
        spread = math.sqrt(abs(square))
        largest = abs(float(real)) + spread if square < 0 else math.hypot(real, spread)
        mixing = max(spread, abs(1 - largest), 1e-12)  # m
        A = [[float(real), -float(square) / mixing], [mixing, float(real)]]
        C = [float(rest[0]), float(rest[1] + rest[0] * real) / mixing]
        return np.array(A), np.array([1.0, 0.0]), np.array(C), float(direct)


def _roots(a: Iterable[Fraction]) -> list[complex]:
    """Return the roots of `z^n + a_1 z^(n-1) + …`, n ≤ 2."""
    match [*a]:
        case []:
            return []
        case [c]:
            return [complex(-c)]
        case [p, q]:
            real, square = -p / 2, q - p * p / 4
            if square > 0:
                spread = math.sqrt(square)
                return [complex(float(real), spread), complex(float(real), -spread)]
            far = float(abs(real)) + math.sqrt(-square)
            far = math.copysign(far, real)
            return [complex(far), complex(float(q) / far if far else 0.0)]
    raise AssertionError("a section has degree 2 at most")


def check_roots(zeros: ArrayLike, poles: ArrayLike, gain: float) -> list[np.ndarray]:
    """Return zeros and poles as two complex vectors.

    Raises:
        ValueError: if there are more zeros than poles, if a complex root has no conjugate, or if a
            value is not finite.
    """
    roots = [np.atleast_1d(np.asarray(r, dtype=np.complex128)).ravel() for r in (zeros, poles)]
    if not all(np.isfinite(r).all() for r in roots) or not math.isfinite(gain):
        raise ValueError("zeros, poles and gain must be finite numbers.")
    if len(roots[0]) > len(roots[1]):
        raise ValueError(
            f"a causal system has at most as many zeros as poles; got {len(roots[0])} and "
            f"{len(roots[1])}."
        )
    for name, given in zip(("zeros", "poles"), roots, strict=True):
        _pairs(name, given)
    return roots


def _pairs(name: str, roots: np.ndarray) -> tuple[list[complex], list[float]]:
    """Return the roots above the real axis, one of each conjugate pair, and the real roots."""
    scale = _PAIRED * np.abs(roots)
    real = np.abs(roots.imag) <= scale
    upper, lower = ([*roots[~real & (sign * roots.imag > 0)]] for sign in (1, -1))
    for root in upper:
        gaps = [abs(root - other.conjugate()) for other in lower]
        if not gaps or min(gaps) > _PAIRED * abs(root):
            raise ValueError(f"complex {name} must come in conjugate pairs.")
        lower.pop(gaps.index(min(gaps)))
    if lower:
        raise ValueError(f"complex {name} must come in conjugate pairs.")
    return [complex(root) for root in upper], [float(root) for root in roots[real].real]


def sections(zeros: np.ndarray, poles: np.ndarray) -> list[Section]:
    """Group zeros and poles into sections whose numerators start with 1 or 0.

    The sections whose poles are nearest to the unit circle come last. Each section gets the zeros
    that are nearest to its poles.

    Args:
        zeros: The zeros, (m,), complex, as `check_roots` returns them.
        poles: The poles, (n,), complex, as `check_roots` returns them.
    """
    upper, real = _pairs("poles", poles)
    real.sort(key=abs)
    groups: list[list[complex]] = [[root, root.conjugate()] for root in upper]
    groups += [[complex(r) for r in real[k : k + 2]] for k in range(0, len(real), 2)]
    groups.sort(key=lambda group: abs(1 - max(map(abs, group))))
    upper, real = _pairs("zeros", zeros)
    real.sort()
    units: list[list[complex]] = [[root, root.conjugate()] for root in upper]
    half = len(real) // 2
    units += [
        [complex(low), complex(high)]
        for low, high in zip(real[:half], real[: -half - 1 : -1], strict=True)
    ]
    single = [complex(r) for r in real[half : len(real) - half]]
    made = []
    for group in groups:  # the most resonant poles choose first
        chosen: list[complex] = []
        if len(group) == 2 and units:
            chosen = min(units, key=lambda unit: min(abs(root - group[0]) for root in unit))
            units.remove(chosen)
        elif single and (len(group) == 1 or len(poles) % 2 == 0):
            chosen = [single.pop()]
        made.append(Section(_expanded(chosen, len(group)), _expanded(group, len(group))[1:]))
    return made[::-1]


def _expanded(roots: list[complex], degree: int) -> tuple[Fraction, ...]:
    """Expand `Π (z - root)` for at most two real roots or one conjugate pair.

    Returns:
        The coefficients, in the order of falling powers from `z^degree` on.
    """
    real = [Fraction(root.real) for root in roots]
    if len(roots) == 2:
        constant = real[0] * real[1]
        if roots[0].imag:
            constant = real[0] ** 2 + Fraction(roots[0].imag) ** 2
        polynomial = [Fraction(1), -real[0] - real[1], constant]
    else:
        polynomial = [Fraction(1), *(-root for root in real)]
    return (*[Fraction(0)] * (degree + 1 - len(polynomial)), *polynomial)


def cascade(parts: list[Section], gain: float = 1.0) -> tuple[np.ndarray, ...]:
    """Connect sections in series.

    Every section is scaled by a power of two, so that it and the sections before it together
    amplify no sinusoid by much more than 1. So no state becomes much larger than another.

    Returns:
        (A, B, C, D), float64, of shapes (n, n), (n,), (n,) and ().
    """
    turns = [np.angle(pole) for part in parts for pole in part.roots()[1]]
    z = np.exp(1j * np.array([*np.pi * (np.arange(_POINTS) + 0.5) / _POINTS, *turns]))
    A, B, C, D = np.zeros((0, 0)), np.zeros(0), np.zeros(0), 1.0
    total = np.ones_like(z)
    for part in parts:
        a, b, c, d = part.realize()
        with np.errstate(all="ignore"):  # a pole may lie on the unit circle
            total = total * part.response(z)
        peak = np.abs(total).max()
        scale = 2.0 ** -round(math.log2(peak)) if 0 < peak < math.inf else 1.0
        total, gain = total * scale, gain / scale
        upper = np.concatenate([A, np.zeros((len(A), len(a)))], axis=1)
        lower = np.concatenate([np.outer(b, C), a], axis=1)
        A, B = np.concatenate([upper, lower]), np.concatenate([B, b * D])
        C, D = scale * np.concatenate([d * C, c]), scale * d * D
    return A, B, gain * C, np.array(gain * D)


def partial_fractions(
    zeros: np.ndarray, poles: np.ndarray, gain: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Expand `gain Π (z - zeros) / Π (z - poles)` in partial fractions.

    Args:
        zeros: The zeros, (m,), complex, as `check_roots` returns them.
        poles: The poles, (n,), complex, as `check_roots` returns them. No two of them may be equal.
        gain: A real number.

    Returns:
        The poles, the residues and the direct term. Of each conjugate pair, only one pole is
        returned, and its residue counts for both.
    """
    upper, real = _pairs("poles", poles)
    kept = np.array([*upper, *real], dtype=np.complex128)
    everything = np.array([*upper, *np.conj(upper), *real], dtype=np.complex128)
    residues = np.full(len(kept), gain, dtype=np.complex128)
    for k, pole in enumerate(kept):
        others = pole - np.delete(everything, k if k < len(upper) else k + len(upper))
        above = pole - zeros
        # The quotients are multiplied, since a product of numerators or denominators may overflow.
        count = min(len(above), len(others))
        residues[k] *= np.prod(above[:count] / others[:count])
        residues[k] *= np.prod(above[count:]) / np.prod(others[count:])
    residues[: len(upper)] *= 2
    residues[len(upper) :] = residues[len(upper) :].real
    return kept, residues, float(gain) if len(zeros) == len(poles) else 0.0
