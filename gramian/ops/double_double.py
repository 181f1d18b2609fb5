"""Double-double arithmetic: real and complex numbers of 32 digits, each the sum of two doubles.

The method is that of error-free transformations: the rounding error of a sum or a product of two
doubles is itself a double, so it can be stored (T. J. Dekker, "A floating-point technique for
extending the available precision", 1971; D. E. Knuth, The Art of Computer Programming, volume 2,
section 4.2.2). One operation takes tens of operations on doubles, so the arithmetic is meant for
sums of few numbers that cancel.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

__all__ = ["Complex", "DoubleDouble"]

_SPLITTER = 2.0**27 + 1


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def _halves(a: Tensor) -> tuple[Tensor, Tensor]:
    scaled = _SPLITTER * a
    high = scaled - (scaled - a)
    return high, a - high


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


@dataclasses.dataclass(frozen=True)
class DoubleDouble:
    """The number `high + low`, a sum of two float64 numbers.

    |low| is at most half a unit in the last place of high.

    Numbers of magnitude between 1e-140 and 1e140 keep all their digits.
    """

    high: Tensor
    low: Tensor

    @classmethod
    def of(cls, value: Tensor) -> DoubleDouble:
        """Convert doubles exactly."""
        return cls(value, torch.zeros_like(value))

    def __neg__(self) -> DoubleDouble:
        return DoubleDouble(-self.high, -self.low)

    def __add__(self, other: DoubleDouble) -> DoubleDouble:
        high, error = _two_sum(self.high, other.high)
        low, error_of_low = _two_sum(self.low, other.low)
        high, error = _two_sum(high, error + low)
        return DoubleDouble(*_two_sum(high, error + error_of_low))

    def __sub__(self, other: DoubleDouble) -> DoubleDouble:
        return self + -other

    def __mul__(self, other: DoubleDouble) -> DoubleDouble:
        high, error = _two_product(self.high, other.high)
        return DoubleDouble(
            *_two_sum(high, error + (self.high * other.low + self.low * other.high))
        )

    def __truediv__(self, other: DoubleDouble) -> DoubleDouble:
        quotient, rest = None, self
        for _ in range(3):
            digits = DoubleDouble.of(rest.high / other.high)
            quotient = digits if quotient is None else quotient + digits
            rest = rest - other * digits
        assert quotient is not None
        return quotient

    def sum(self, dim: int) -> DoubleDouble:
        """Sum along a dimension of at least one element."""
        parts = [*map(DoubleDouble, self.high.unbind(dim), self.low.unbind(dim))]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


@dataclasses.dataclass(frozen=True)
class Complex:
    """The number `real + i imag`."""

    real: DoubleDouble
    imag: DoubleDouble

    @classmethod
    def of(cls, value: Tensor) -> Complex:
        """Convert complex doubles or doubles exactly."""
        imag = value.imag if value.is_complex() else torch.zeros_like(value)
        return cls(DoubleDouble.of(value.real), DoubleDouble.of(imag))

    def conj(self) -> Complex:
        return Complex(self.real, -self.imag)

    def __add__(self, other: Complex) -> Complex:
        return Complex(self.real + other.real, self.imag + other.imag)

    def __sub__(self, other: Complex) -> Complex:
        return Complex(self.real - other.real, self.imag - other.imag)

    def __mul__(self, other: Complex) -> Complex:
        return Complex(
            self.real * other.real - self.imag * other.imag,
            self.real * other.imag + self.imag * other.real,
        )

    def __truediv__(self, other: Complex) -> Complex:
        norm = other.real * other.real + other.imag * other.imag
        product = self * other.conj()
        return Complex(product.real / norm, product.imag / norm)
