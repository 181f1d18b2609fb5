r"""Spectral filters: fixed eigenvectors of a Hankel matrix, with learned coefficients.

The Hankel matrix `Z_ij = 2 / ((i + j)³ - (i + j))`, i, j = 1 … L, is the second moment of the
impulse responses `(α - 1) α^{i-1}` of all decays α in [0, 1] (Agarwal et al., "Spectral State Space
Models", 2023, arXiv 2312.06837, equation 3). Let σ_k and φ_k be its largest eigenvalues and their
eigenvectors. The kernel of a channel is

    h_t = Σ_k σ_k^{1/4} φ_k(t + 1) (a_k + (-1)^t b_k),

so that the sum over b covers negative decays. One coefficient for each channel and filter is the
tensor-product form of the spectral transform unit (STU). A direct term is added at tap 0.

`Z = ∫₀¹ (1 - α)² v(α) v(α)ᵀ dα` with `v_i = α^{i-1}`. A quadrature of this integral gives a factor
F with `Z = F Fᵀ` up to rounding, and the singular vectors of F are the eigenvectors of Z. The
eigenvalues decay so fast that most of those that are used lie below the rounding errors of Z, while
the singular values of F are their square roots. With `α = exp(-exp(y))` the trapezoidal rule in y
converges exponentially.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gramian._checks import check_sizes
from gramian.filters._filter import Filter, check_lr, register
from gramian.ops.lengths import at_most
from gramian.systems import FIR

__all__ = ["SpectralFilter", "spectral_basis"]

_STEP = 1 / 8
"""The step of the trapezoidal rule. Its relative error is about exp(-π² / step), 5e-35."""

_TAIL = 1e-10
"""Where the integrand has fallen to the third power of this, the quadrature begins."""

_END = 80.0
"""The quadrature ends at α = exp(-80)."""


@register("spectral")
class SpectralFilter(Filter):
    """A filter of `max_length` taps in the span of the leading eigenvectors of a Hankel matrix.

    The eigenvectors are fixed, and computed from `max_length`. They are not saved with the weights.
    The parameters `positive`, and `negative` if `alternating`, are (channels, filters): the
    coefficients of the eigenvectors and of their copies with alternating signs.

    Args:
        channels: The number of filters.
        max_length: The number of taps, and the size of the Hankel matrix.
        filters: The number of eigenvectors, by default 24 as published. There are only `max_length`
            of them, so a larger number means all.
        alternating: Whether to add the copies with alternating signs.
        bias: Whether to add a trainable direct term at tap 0.
        lr: The learning rate of the coefficients; by default that of the model.

    Raises:
        ValueError: if `filters` is below 1, or if `lr` is negative.
    """

    def __init__(
        self,
        channels: int,
        max_length: int,
        filters: int = 24,
        alternating: bool = True,
        bias: bool = True,
        lr: float | None = None,
    ) -> None:
        super().__init__(channels, max_length)
        check_sizes(filters=filters)
        self.filters = filters = min(filters, max_length)
        self.lr = check_lr(lr)
        self.positive = nn.Parameter(torch.empty(channels, filters))
        self.negative = nn.Parameter(torch.empty(channels, filters)) if alternating else None
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.register_buffer("basis", torch.empty(filters, max_length), persistent=False)
        self.reset_parameters()

    basis: Tensor

    def reset_parameters(self) -> None:
        """Draw the coefficients with variance 1 / `filters`, and a standard normal direct term."""
        for coefficients in (self.positive, self.negative):
            if coefficients is not None:
                nn.init.normal_(coefficients, std=1 / math.sqrt(self.filters))
        if self.bias is not None:
            nn.init.normal_(self.bias)
        self.reset_buffers()

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Compute the eigenvectors, scaled by the fourth root of their eigenvalues."""
        values, vectors = spectral_basis(self.max_length, self.filters)
        self.basis.copy_(values.pow(0.25).unsqueeze(-1) * vectors)

    def forward(self, length: int | None = None) -> FIR:
        count = at_most(length, self.max_length)
        basis = self.basis[:, :count].to(self.positive.dtype)
        kernel = self.positive @ basis  # (channels, count)
        if self.negative is not None:
            place = torch.arange(count, device=basis.device)
            kernel = kernel + (1 - 2 * (place % 2)) * (self.negative @ basis)
        if self.bias is not None:
            first = kernel[:, :1] + self.bias.unsqueeze(-1)
            kernel = torch.cat([first, kernel[:, 1:]], dim=-1)
        return FIR(kernel)

    def config(self) -> dict[str, Any]:
        return {
            **super().config(),
            "filters": self.filters,
            "alternating": self.negative is not None,
            "bias": self.bias is not None,
            "lr": self.lr,
        }

    def optimizer_hints(self) -> dict[str, dict[str, float]]:
        """Return the learning rate of the coefficients, if `lr` is given."""
        names = ["positive"] + ([] if self.negative is None else ["negative"])
        return {} if self.lr is None else {name: {"lr": self.lr} for name in names}


def spectral_basis(size: int, count: int) -> tuple[Tensor, Tensor]:
    """Compute the leading eigenvalues and eigenvectors of the Hankel matrix Z of this module.

    Args:
        size: The number of rows and columns of Z.
        count: The number of eigenvectors, at most `size`.

    Returns:
        The eigenvalues, (count), descending, and the eigenvectors, (count, size), of unit norm and
        with positive first entries. Both are float64 on the CPU. The relative error of an
        eigenvector is about `1e-16 (σ_1 / σ_k)^{1/2}`.
    """
    like: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    low, high = math.log(_TAIL / size), math.log(_END)
    y = torch.arange(math.ceil((high - low) / _STEP), **like) * _STEP + low
    rate = y.exp()  # α = exp(-rate)
    weight = (_STEP * rate).sqrt() * -torch.expm1(-rate)
    row = torch.arange(size, **like).unsqueeze(-1) + 0.5
    left, values, _ = torch.linalg.svd(weight * torch.exp(-row * rate), full_matrices=False)
    sign = torch.where(left[0] < 0, -1.0, 1.0)
    values, vectors = values.square()[:count], (sign * left).mT[:count]
    missing = count - len(values)
    return nn.functional.pad(values, (0, missing)), nn.functional.pad(vectors, (0, 0, 0, missing))
