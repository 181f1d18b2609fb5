"""Lengths for which the FFT is fast."""

from bisect import bisect_left

__all__ = ["fft_length"]


def _smooth_even_numbers(limit: int) -> list[int]:
    """Return the even numbers below `limit` that have no prime factor above 5."""
    numbers = {2}
    for factor in (2, 3, 5):
        frontier = numbers
        while frontier:
            frontier = {factor * n for n in frontier if factor * n < limit}
            numbers = numbers | frontier
    return sorted(numbers)


_FAST_LENGTHS = _smooth_even_numbers(2**40)


def fft_length(length: int, taps: int) -> int:
    """Return the smallest fast length at which a circular convolution has no wrap-around."""
    return _FAST_LENGTHS[bisect_left(_FAST_LENGTHS, length + taps - 1)]
