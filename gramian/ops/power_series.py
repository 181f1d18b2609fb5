r"""Power series in z^-1: the reciprocal of a polynomial, by Newton's iteration.

``1 / a(z)`` is the impulse response of an all-pole filter. From its first m terms ``g`` the next m
are ``-g · [a g]_{m…2m-1}``, so all L terms take O(L log L) operations, whatever the degree of
``a``, and no pole has to lie inside the unit circle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gramian.ops.convolution import causal_convolution

__all__ = ["power_series_reciprocal"]

_DIRECT = 8  # terms taken from the recursion itself before the doubling starts


def power_series_reciprocal(a: Tensor, length: int) -> Tensor:
    """The first ``length`` terms of ``1 / (1 + a_1 z^-1 + … + a_n z^-n)``.

    Args:
        a: (*C, n), real; the leading 1 is implied.
        length: Number of terms, at least 1.

    Returns:
        (*C, length), of the dtype of ``a``; gradients flow to ``a``.
    """
    terms = [torch.ones_like(a[..., 0]) if a.shape[-1] else a.new_ones(a.shape[:-1])]
    for t in range(1, min(length, _DIRECT)):
        past = min(t, a.shape[-1])
        terms.append(-sum((a[..., j] * terms[t - 1 - j] for j in range(past)), 0 * terms[0]))
    series = torch.stack(terms, dim=-1)
    while (have := series.shape[-1]) < length:
        want = min(2 * have, length)
        monic = torch.cat([torch.ones_like(series[..., :1]), a[..., : want - 1]], dim=-1)
        padded = torch.nn.functional.pad(series, (0, want - have))
        residual = causal_convolution(padded, monic)[..., have:]  # [a g] past its first m terms
        correction = causal_convolution(residual, series[..., : want - have])
        series = torch.cat([series, -correction], dim=-1)
    return series
