"""Reduction: kernels and systems to smaller systems, with errors that are true."""

from gramian.reduction._reduce import Reduction, reduce
from gramian.reduction.spectrum import hankel_singular_values

__all__ = ["Reduction", "hankel_singular_values", "reduce"]
