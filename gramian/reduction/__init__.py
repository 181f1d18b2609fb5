"""Reduction: kernels and systems to smaller systems, with errors that are true."""

from gramian.reduction import _switching  # noqa: F401 (transfer functions reduce through it)
from gramian.reduction._reduce import Reduction, reduce
from gramian.reduction.methods import Balanced, Gradient, Method, ModalTruncation
from gramian.reduction.spectrum import hankel_singular_values

__all__ = [
    "Balanced",
    "Gradient",
    "Method",
    "ModalTruncation",
    "Reduction",
    "hankel_singular_values",
    "reduce",
]
