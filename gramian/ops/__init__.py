"""Numerics with no notion of a model."""

from gramian.ops.convolution import anticausal_convolution, causal_convolution
from gramian.ops.polynomial import (
    evaluate_on_roots_of_unity,
    rational_impulse_response,
    rational_kernel,
)

__all__ = [
    "anticausal_convolution",
    "causal_convolution",
    "evaluate_on_roots_of_unity",
    "rational_impulse_response",
    "rational_kernel",
]
