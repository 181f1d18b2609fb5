"""Base class of the filters whose systems have a finite number of poles."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from gramian.filters._filter import Filter

__all__ = ["ModeFilter", "RationalFilter", "Selection", "with_conjugates"]

Selection: TypeAlias = Callable[[Tensor], Tensor]
"""A function that takes the values of a parameter's old entries to those of its new entries."""


class RationalFilter(Filter):
    """A filter whose systems have a finite number of poles."""

    @property
    def needs_float64(self) -> bool:
        return True

    @abc.abstractmethod
    def poles(self) -> Tensor:
        """Return the poles of every channel, with their conjugates: (channels, n), complex128."""

    @torch.no_grad()
    def spectral_radius(self) -> Tensor:
        """Return the largest modulus of a pole of every channel: (channels,), float64."""
        return torch.nn.functional.pad(self.poles().abs(), (0, 1)).amax(-1)


class ModeFilter(RationalFilter):
    """A filter whose parameters describe modes one by one, so that single modes can be dropped."""

    @abc.abstractmethod
    def keep_modes(self, kept: Tensor) -> dict[str, Selection]:
        """Drop all other modes, in place.

        The parameters stay the same objects and get other shapes, and `config()` describes the
        smaller filter.

        Args:
            kept: (channels, modes), bool: the modes of the system to keep. Unused modes of channels
                with fewer modes are ignored.

        Returns:
            For every parameter that changed, the selection of its entries. Applied to what an
            optimizer holds for the entries of the parameter, it keeps the optimizer consistent.

        Raises:
            ValueError: if `kept` has another shape.
        """

    def _replace(self, selections: dict[str, Selection]) -> None:
        """Apply the selections to the parameters of these names, and to their gradients."""
        for name, select in selections.items():
            parameter = self.get_parameter(name)
            gradient, parameter.grad = parameter.grad, None
            parameter.data = select(parameter.data)
            if gradient is not None:
                parameter.grad = select(gradient)

    def _check_kept(self, kept: Tensor, modes: int) -> None:
        if kept.shape != (self.channels, modes) or kept.dtype != torch.bool:
            raise ValueError(
                f"kept must be a bool for each of {self.channels} channels and {modes} modes; got "
                f"{kept.dtype} of shape {tuple(kept.shape)}."
            )


def with_conjugates(poles: Tensor) -> Tensor:
    """Add the conjugates to one pole of each pair (channels, m): (channels, 2 m), complex128."""
    poles = poles.to(torch.complex128)
    return torch.cat([poles, poles.conj()], dim=-1).resolve_conj()
