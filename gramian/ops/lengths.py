"""Lengths for which the FFT is fast, and lengths that are symbols of a traced graph."""

from bisect import bisect_left

import torch

__all__ = ["at_most", "fft_length", "is_symbol", "tail_count"]


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


def is_symbol(length: int) -> bool:
    """Return whether a length is a symbol in a graph that is traced for every length."""
    if torch.compiler.is_dynamo_compiling():  # there, a symbol is taken for an int
        shapes = torch.fx.experimental.symbolic_shapes
        known = hasattr(shapes, "has_static_value")  # not with PyTorch 2.6
        return known and not shapes.has_static_value(length)
    return isinstance(length, torch.SymInt)


def tail_count(length: int) -> int:
    """Return how many samples to make for the last `length - 1` samples of a sequence.

    The number is `length - 1`, but in a graph that is traced for every length it is `length`, and
    the last sample is then left out. There, a tensor of size `length - 1` would be taken for one
    that has not size 1, which rules out the length 2.
    """
    return length if is_symbol(length) else length - 1


def at_most(length: int | None, bound: int) -> int:
    """Return the smaller number, or `bound` if the length is None or a symbol.

    A comparison with a symbol would restrict the traced graph to the lengths on one side.
    """
    return bound if length is None or is_symbol(length) else min(length, bound)
