"""Numerical operations that know nothing of models."""

from gramian.ops.convolution import bidirectional_convolution, causal_convolution
from gramian.ops.kernels import use_triton
from gramian.ops.polynomial import (
    evaluate_on_roots_of_unity,
    rational_impulse_response,
    rational_kernel,
)

__all__ = [
    "bidirectional_convolution",
    "causal_convolution",
    "evaluate_on_roots_of_unity",
    "rational_impulse_response",
    "rational_kernel",
    "use_triton",
]
