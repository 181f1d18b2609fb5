"""Numerics with no notion of a model."""

from gramian.ops.convolution import causal_convolution
from gramian.ops.polynomial import (
    evaluate_on_roots_of_unity,
    rational_impulse_response,
    rational_kernel,
)

__all__ = [
    "causal_convolution",
    "evaluate_on_roots_of_unity",
    "rational_impulse_response",
    "rational_kernel",
]
