"""Reduce the long filters of one layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gramian.distillation._report import LayerReport
from gramian.filters import ModalFilter
from gramian.memory import filter_state_sizes
from gramian.reduction import reduce
from gramian.systems import Modal

__all__ = ["Goal", "reduce_filter", "report_kept"]

# The parameters of a filter are float32. Rounding may increase its error by this share.
_ROUNDING = 1e-3

_SPECTRUM = 64
"""The number of leading Hankel singular values of each filter in a report."""


@dataclass(frozen=True)
class Goal:
    """The goal of a reduction, which is a relative l2 error or an order for every filter.

    Attributes:
        tol: tolerance of the relative l2 error; None if an order is given.
        order: real state dimension; None if a tolerance is given.
        max_order: largest order in the search for `tol`; None for the default of `gramian.reduce`.
        tail: behavior past the last tap, "auto", "zero" or "free".
    """

    tol: float | None
    order: int | None
    max_order: int | None = None
    tail: str = "auto"

    def check(self, taps: int) -> None:
        """Raise a ValueError unless the goal is valid for filters of `taps` taps."""
        tol, order = self.tol, self.order
        if self.tail not in ("auto", "zero", "free"):
            raise ValueError(f'the tail must be "auto", "zero" or "free"; got {self.tail!r}.')
        if order is not None:
            if not isinstance(order, int) or isinstance(order, bool) or not 1 <= order < taps:
                raise ValueError(
                    f"the order must be an integer from 1 to {taps - 1}, one less than the {taps} "
                    f"taps of the filters; got {order!r}."
                )
            return
        number = isinstance(tol, int | float) and not isinstance(tol, bool)
        if not number or tol is None or not (math.isfinite(tol) and 0 < tol < 1):
            raise ValueError(f"the tolerance must lie between 0 and 1, both excluded; got {tol!r}.")

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `gramian.reduce` for this goal."""
        if self.order is not None:
            return {"order": self.order, "tail": self.tail}
        return {"tol": self.tol, "max_order": self.max_order, "tail": self.tail}


@torch.no_grad()
def reduce_filter(
    kernel: Tensor, goal: Goal, layer: int | str, mixer: str, share: int = 1
) -> tuple[ModalFilter, LayerReport]:
    """Reduce the kernels of a layer to a modal filter.

    Args:
        kernel: the taps of every channel, (channels, taps), real.
        goal: the goal for every channel.
        layer: index of the layer, or path of the submodule, for the report.
        mixer: name of the class of the mixer or submodule, for the report.
        share: number of consecutive channels whose taps are equal, except for the first tap, which
            does not enter the state. Only one kernel of each such group is reduced. This is the
            kernel with the smallest norm, so that the tolerance holds for the whole group.

    Returns:
        The modal filter, and the report on the layer.

    Raises:
        ValueError: if the kernels cannot be reduced. The message names the layer.
    """
    taps, kernel = kernel.shape[-1], kernel.double()
    norm = kernel.norm(dim=-1)
    chosen = norm.reshape(-1, share).argmin(-1)
    chosen = chosen + share * torch.arange(len(chosen), device=kernel.device)
    row = torch.arange(len(chosen), device=kernel.device).repeat_interleave(share)
    try:
        # Reduce in float32, the dtype of a ModalFilter. A reduction in float64 could return poles
        # and residues that need more digits, or poles closer to the unit circle, than float32 has.
        reduction = reduce(kernel[chosen].float(), **goal.arguments)
    except ValueError as reason:
        raise ValueError(f"layer {layer} cannot be distilled: {reason}") from reason
    system = reduction.system[row]
    if share > 1:
        first = kernel[:, 0] - kernel[chosen[row], 0]
        system = Modal(system.poles, system.residues, system.d + first.to(system.d.dtype))
    modal = ModalFilter.from_system(system, max_length=taps, kernel=kernel)
    error = kernel - modal(taps).impulse_response(taps).double()
    scale = torch.where(norm > 0, norm[chosen[row]] / norm.clamp(min=1e-300), 1.0)
    relative = torch.where(norm > 0, error.norm(dim=-1) / norm.clamp(min=1e-300), 0.0).tolist()
    spectra = reduction.hankel_singular_values[row, :_SPECTRUM].tolist()
    above = [i for i, e in enumerate(relative) if goal.tol and e > goal.tol * (1 + _ROUNDING)]
    return modal, LayerReport(
        layer=layer,
        mixer=mixer,
        taps=taps,
        orders=tuple(int(n) for n in reduction.order[row].tolist()),
        relative_errors=tuple(relative),
        lower_bounds=tuple((reduction.lower_bound[row] * scale).tolist()),
        l1_errors=tuple(error.abs().sum(-1).tolist()),
        tail_energies=tuple((reduction.tail_energy[row] * scale.square()).tolist()),
        hankel_singular_values=tuple(
            tuple(value for value in values if not math.isnan(value)) for values in spectra
        ),
        effective_state_sizes=tuple(filter_state_sizes(kernel[chosen])[row].tolist()),
        unconverged=tuple(above),
    )


@torch.no_grad()
def report_kept(kernel: Tensor, layer: int | str, mixer: str) -> LayerReport:
    """Return the report of a layer that keeps its filters, because they have few taps.

    Args:
        kernel: the taps of every channel, (channels, taps).
        layer: index of the layer, or path of the submodule.
        mixer: name of the class of the mixer or submodule.
    """
    channels, taps = kernel.shape
    padded = torch.nn.functional.pad(kernel[:, 1:].double(), (0, max(taps - 2, 0)))
    hankel = padded.unfold(-1, max(taps - 1, 1), 1) if taps > 1 else padded.unsqueeze(-1)
    spectra = torch.linalg.svdvals(hankel)[:, :_SPECTRUM].tolist()
    zeros = (0.0,) * channels
    return LayerReport(
        layer=layer,
        mixer=mixer,
        taps=taps,
        orders=(taps - 1,) * channels,
        relative_errors=zeros,
        lower_bounds=zeros,
        l1_errors=zeros,
        tail_energies=zeros,
        hankel_singular_values=tuple(map(tuple, spectra)),
        effective_state_sizes=tuple(filter_state_sizes(kernel.double()).tolist()),
        unconverged=(),
        kept=True,
    )
