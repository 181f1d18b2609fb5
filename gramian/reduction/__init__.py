"""Reduction of kernels and systems to smaller systems, with measured errors."""

from gramian.reduction._reduce import Reduction, reduce
from gramian.reduction.descent import Descent
from gramian.reduction.methods import Balanced, Gradient, Method, ModalTruncation
from gramian.reduction.rational import RationalFit, rational_interpolation
from gramian.reduction.spectrum import hankel_singular_values
from gramian.reduction.switching import find_modal_form

__all__ = [
    "Balanced",
    "Descent",
    "Gradient",
    "Method",
    "ModalTruncation",
    "RationalFit",
    "Reduction",
    "find_modal_form",
    "hankel_singular_values",
    "rational_interpolation",
    "reduce",
]
