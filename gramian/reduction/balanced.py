r"""Balanced truncation of kernels: Kung's method, or the eigensystem realisation algorithm (ERA).

The leading n left singular vectors U of a Hankel matrix span the outputs that n states can leave
behind. The span of an observability matrix ``[C; CA; CA²; …]`` is invariant under a shift of its
rows, so ``A = U[:-1]⁺ U[1:]``, and the poles are its eigenvalues (S. Kung, "A new identification
and model reduction algorithm via singular value decomposition", 1978). U has orthonormal columns,
so with l its last row ``U[:-1]ᵀ U[:-1] = I - l lᵀ``, whose inverse is ``I + l lᵀ / (1 - lᵀl)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gramian.reduction.spectrum import Spectrum

__all__ = ["balanced_poles"]


def balanced_poles(spectrum: Spectrum, order: Tensor) -> Tensor:
    """The poles of the balanced truncation of B kernels.

    Args:
        spectrum: At least as many singular vectors as the largest order.
        order: (B), integers. Singular vectors without a singular value have no poles, nor has the
            last vector of a complete basis, which cannot be shifted.

    Returns:
        (B, n), complex128, in conjugate pairs; channels of a lower order are padded with NaN.
    """
    values, vectors = spectrum.values, spectrum.vectors  # (B, k), (B, k, rows)
    size = vectors.shape[-1]
    floor = size * torch.finfo(values.dtype).eps * values[:, :1]
    rank = (values > floor).sum(-1)
    order = torch.minimum(order.clamp(max=values.shape[-1]), rank)
    width = int(order.max())
    poles = torch.full(
        (len(values), width), torch.nan, dtype=torch.complex128, device=values.device
    )
    used = vectors[:, :width]
    shift = torch.bmm(used[..., :-1], used[..., 1:].mT)  # (B, n, n)
    last = used[..., -1]  # (B, n)
    for n in order.unique().tolist():
        if n == 0:
            continue
        rows = order == n
        small, end = shift[rows, :n, :n], last[rows, :n].unsqueeze(-1)
        room = 1 - end.square().sum(-2, keepdim=True)
        gain = torch.where(room > size * torch.finfo(values.dtype).eps, 1 / room, 0)
        small = small + gain * end @ (end.mT @ small)
        poles[rows, :n] = torch.linalg.eigvals(small)
    return poles
