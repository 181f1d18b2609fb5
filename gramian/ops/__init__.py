"""Numerical operations that know nothing of models."""

from gramian.ops.convolution import bidirectional_convolution, causal_convolution
from gramian.ops.kernels import use_triton
from gramian.ops.polynomial import (
    evaluate_on_roots_of_unity,
    rational_impulse_response,
    rational_kernel,
)
from gramian.ops.processors import adaptive_threads

__all__ = [
    "adaptive_threads",
    "bidirectional_convolution",
    "causal_convolution",
    "evaluate_on_roots_of_unity",
    "rational_impulse_response",
    "rational_kernel",
    "use_triton",
]
