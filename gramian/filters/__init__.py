"""Filters: modules that parametrise a time-invariant system."""

from gramian.filters._filter import Filter, build, register
from gramian.filters._optim import parameter_groups
from gramian.filters.implicit import ImplicitFilter
from gramian.filters.modal import ModalFilter
from gramian.filters.rtf import RTF

__all__ = [
    "RTF",
    "Filter",
    "ImplicitFilter",
    "ModalFilter",
    "build",
    "parameter_groups",
    "register",
]
