r"""All-pole filters `w_t = u_t - Σ_{j=1}^n a_j w_{t-j}`, computed in blocks.

Each block of J output samples is the solution of a triangular Toeplitz system. The right-hand side
is the input minus the contribution of the n output samples before the block. So the recursion
itself is computed, by one matrix product and one triangular solve per block. The result is as
accurate as the result of single steps, even if poles crowd near the unit circle. For such poles,
the reciprocal of the polynomial as a power series is not accurate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gramian.ops.vandermonde import group_channels

__all__ = ["all_pole_filter"]

_BLOCK = 128


def all_pole_filter(a: Tensor, signal: Tensor, past: Tensor | None = None) -> Tensor:
    """Divide the signal by `1 + a_1 z^-1 + … + a_n z^-n`, even if this filter is unstable.

    Args:
        a: (*C, n), real: the coefficients `a_1 … a_n`.
        signal: (*B, L), of the dtype of `a`: the input; `C` broadcasts against `B`.
        past: (*B, n): the outputs before the first sample, newest first. None means zeros.

    Returns:
        The outputs (*B, L). Gradients flow to all arguments.
    """
    order, length = a.shape[-1], signal.shape[-1]
    if order == 0:
        return signal
    size = min(length, _BLOCK)
    grouped, restore = group_channels(signal, a.shape[:-1])  # (G, R, L)
    groups, repeats = grouped.shape[:2]
    blocks = grouped.mT.split(size, dim=1)  # (G, J, R)
    if past is None:
        before = grouped.new_zeros(groups, order, repeats)
    else:
        before = group_channels(past, a.shape[:-1])[0].flip(-1).mT  # the oldest sample is first

    # Row i of the extended Toeplitz matrix holds a_n, …, a_1, 1 in columns i … i + n. For sample i
    # of a block, these weigh the n samples before the block and the samples in the block.
    monic = torch.cat([a.flip(-1), torch.ones_like(a[..., :1])], dim=-1).reshape(groups, order + 1)
    rows = torch.nn.functional.pad(monic, (0, size)).unsqueeze(1).expand(-1, size, -1)
    band = rows.reshape(groups, -1)[:, : size * (order + size)].reshape(groups, size, order + size)
    history, triangle = band[..., :order], band[..., order:]
    outputs = []
    for block in blocks:
        count = block.shape[1]
        target = block - history[:, :count] @ before
        solved = torch.linalg.solve_triangular(
            triangle[:, :count, :count], target, upper=False, unitriangular=True
        )
        before = torch.cat([before, solved], dim=1)[:, -order:]
        outputs.append(solved)
    return restore(torch.cat(outputs, dim=1).mT)
