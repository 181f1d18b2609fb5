"""Reduction: kernels and systems to smaller systems, with errors that are true."""

from gramian.reduction._reduce import Reduction, reduce
from gramian.reduction.spectrum import hankel_singular_values
from gramian.reduction.switching import find_modal_form

__all__ = ["Reduction", "find_modal_form", "hankel_singular_values", "reduce"]
