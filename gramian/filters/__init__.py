"""Filters: modules that parametrize a time-invariant system."""

from gramian.filters._filter import Filter, build, register
from gramian.filters._optim import parameter_groups
from gramian.filters._rational import ModeFilter
from gramian.filters.explicit import ExplicitFilter
from gramian.filters.implicit import ImplicitFilter
from gramian.filters.modal import ModalFilter
from gramian.filters.rtf import RTF
from gramian.filters.s4 import S4
from gramian.filters.s4d import S4D
from gramian.filters.spectral import SpectralFilter

__all__ = [
    "RTF",
    "S4",
    "S4D",
    "ExplicitFilter",
    "Filter",
    "ImplicitFilter",
    "ModalFilter",
    "ModeFilter",
    "SpectralFilter",
    "build",
    "parameter_groups",
    "register",
]
