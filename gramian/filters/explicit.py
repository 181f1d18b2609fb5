r"""Explicit filters: the taps themselves are the parameters.

The taps are `h_t = kernel_t` for t < K, and zero after that. With `skip`, a direct term `d` is
added at tap 0. StripedHyena 2 has short and medium filters of this kind, with 7 and 128 taps, and
several channels share one kernel (Ku et al. 2025, section 2).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from gramian._checks import check_sizes
from gramian.filters._filter import Filter, check_lr, register
from gramian.ops.lengths import at_most
from gramian.systems import FIR

__all__ = ["ExplicitFilter"]


@register("explicit")
class ExplicitFilter(Filter):
    """A filter whose first K taps are free parameters and whose later taps are zero.

    Args:
        channels: The number of filters.
        max_length: The number of taps that a kernel has in training, free or zero.
        taps: The number K of free taps; by default `max_length`. It may be larger than that.
        groups: The number of different kernels, a divisor of `channels`. Each kernel is shared by
            `channels / groups` consecutive channels. By default every channel has its own kernel.
        skip: Whether every channel has its own direct term, which is added to tap 0.
        lr: The learning rate of the taps; by default that of the model.

    Raises:
        ValueError: if a size is below 1, if `groups` does not divide `channels`, or if `lr` is
            negative.
    """

    def __init__(
        self,
        channels: int,
        max_length: int,
        taps: int | None = None,
        groups: int | None = None,
        skip: bool = False,
        lr: float | None = None,
    ) -> None:
        super().__init__(channels, max_length)
        taps = max_length if taps is None else taps
        groups = channels if groups is None else groups
        check_sizes(taps=taps, groups=groups)
        if channels % groups:
            raise ValueError(f"groups must divide the {channels} channels; got {groups}.")
        self.taps = taps
        self.groups = groups
        self.lr = check_lr(lr)
        self.kernel = nn.Parameter(torch.empty(groups, taps))
        self.d = nn.Parameter(torch.empty(channels)) if skip else None
        self.reset_parameters()

    @classmethod
    def from_kernel(
        cls, kernel: Tensor, max_length: int | None = None, channels: int | None = None
    ) -> Self:
        """Make a filter without direct term whose taps are `kernel`.

        Args:
            kernel: (groups, taps), real floating point: the taps of every group.
            max_length: As in the class; by default the number of taps.
            channels: The number of channels, which share the kernels; by default one channel for
                each kernel.

        Raises:
            ValueError: if the kernel has another number of dimensions or no taps.
        """
        if kernel.ndim != 2 or not kernel.is_floating_point() or not kernel.numel():
            raise ValueError(
                "an explicit filter is made from real kernels (groups, taps) with at least one "
                f"tap; got {kernel.dtype} of shape {tuple(kernel.shape)}."
            )
        groups, taps = kernel.shape
        built = cls(
            groups if channels is None else channels,
            taps if max_length is None else max_length,
            taps,
            groups,
        ).to(kernel.device)
        with torch.no_grad():
            built.kernel.copy_(kernel)
        return built

    def reset_parameters(self) -> None:
        """Draw the taps uniformly within ±1/√K and `d` from a standard normal distribution.

        PyTorch's depthwise convolutions draw their taps in the same way.
        """
        bound = 1 / math.sqrt(self.taps)
        nn.init.uniform_(self.kernel, -bound, bound)
        if self.d is not None:
            nn.init.normal_(self.d)

    def forward(self, length: int | None = None) -> FIR:
        taps = at_most(length, self.taps)
        kernel = self.kernel[:, None, :taps].expand(-1, self.channels // self.groups, -1)
        if self.d is None:  # a copy, because a sharded parameter is whole only until this returns
            kernel = kernel.clone(memory_format=torch.contiguous_format)
        else:
            first = kernel[..., :1] + self.d.reshape(self.groups, -1, 1)
            kernel = torch.cat([first, kernel[..., 1:]], dim=-1)
        return FIR(kernel.reshape(self.channels, taps))

    def config(self) -> dict[str, Any]:
        return {
            **super().config(),
            "taps": self.taps,
            "groups": self.groups,
            "skip": self.d is not None,
            "lr": self.lr,
        }

    def optimizer_hints(self) -> dict[str, dict[str, float]]:
        """Return the learning rate of the taps, if `lr` is given."""
        return {} if self.lr is None else {"kernel": {"lr": self.lr}}
