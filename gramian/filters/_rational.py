"""Base class of the filters whose systems have a finite number of poles."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from gramian.filters._filter import Filter

__all__ = ["RationalFilter", "with_conjugates"]


class RationalFilter(Filter):
    """A filter whose systems have a finite number of poles."""

    @abc.abstractmethod
    def poles(self) -> Tensor:
        """Return the poles of every channel, with their conjugates: (channels, n), complex128."""

    @torch.no_grad()
    def spectral_radius(self) -> Tensor:
        """Return the largest modulus of a pole of every channel: (channels,), float64."""
        return torch.nn.functional.pad(self.poles().abs(), (0, 1)).amax(-1)


def with_conjugates(poles: Tensor) -> Tensor:
    """Add the conjugates to one pole of each pair (channels, m): (channels, 2 m), complex128."""
    poles = poles.to(torch.complex128)
    return torch.cat([poles, poles.conj()], dim=-1).resolve_conj()
