r"""Measure the effective state-size of filters, about as fast as filters are reduced.

The operator T of a filter of L taps is split in the middle of its context, at i = ⌊L / 2⌋. Up to
the order of its columns, the block `T[i:2i, :i]` is the Hankel matrix of the taps h_1 … h_{2i-1}.
This matrix is square and symmetric, so its singular values are the moduli of its eigenvalues. All
eigenvalues of small blocks are computed. For larger blocks, the Lanczos iteration of
`gramian.reduction.spectrum` finds the leading singular values. The other singular values are
assumed to decay as a power of their index. Their total energy is known, and the exponent is chosen
to match it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gramian.ess.measures import Measure
from gramian.ops.devices import in_double_precision
from gramian.ops.hankel import Hankel
from gramian.ops.threads import work
from gramian.reduction.spectrum import leading_spectrum

__all__ = ["filter_state_sizes"]

_DENSE = 512
"""The size up to which all eigenvalues of a block are computed.

Computing them takes about as long as reducing the filters.
"""

_LEADING = 32
"""The number of singular values that are computed for larger blocks."""

_BLOCK = 2**23
"""The maximal number of entries of the Lanczos bases that are held at once."""

_MATRICES = 2**20
"""The maximal number of entries of the matrices whose eigenvalues are computed together.

LAPACK takes one matrix after the other, so that more of them would only need more memory.
"""


@in_double_precision
@torch.no_grad()
def filter_state_sizes(kernel: Tensor) -> Tensor:
    """Measure the entropy-ESS of filters at the middle of their context.

    Args:
        kernel: The taps of C filters, (C, L), float64, finite.

    Returns:
        (C), the value of `effective_state_size(FIR(kernel), L // 2, horizon=2 * (L // 2))`. It is
        exact for up to 1,024 taps, and an estimate for longer kernels. The estimate is accurate to
        about a tenth if the spectrum decays fast, and to a factor of two if the filter is rough.
    """
    side = kernel.shape[-1] // 2
    if side == 0:
        return kernel.new_zeros(len(kernel))
    count = torch.arange(2 * side, 0, -1, device=kernel.device)
    norm = (kernel[:, : 2 * side].square() * count).sum(-1).sqrt()
    floor = torch.finfo(kernel.dtype).eps * norm
    taps = kernel[:, 1 : 2 * side]
    dense = side <= _DENSE
    size = max(1, _MATRICES // side**2 if dense else _BLOCK // (side * (4 * _LEADING + 36)))

    def run(start: int) -> Tensor:
        hankel = Hankel(taps[start : start + size], side, side)
        if dense:
            values = torch.linalg.eigvalsh(hankel.matrix()).abs()
        else:
            values = _extrapolated(leading_spectrum(hankel, _LEADING).values, hankel)
        return Measure()(values, floor[start : start + size])

    return torch.cat(work(run, range(0, len(taps), size), taps))


def _extrapolated(values: Tensor, hankel: Hankel) -> Tensor:
    """Extend the leading singular values (B, r) to all of them, (B, side), by `σ_r (r / k)^p`.

    The power p is found by bisection, such that the extension has the remaining energy.
    """
    energy = (hankel.squared_norm() - values.square().sum(-1)).clamp_min(0).unsqueeze(-1)
    first, last = values.shape[-1], values[:, -1:]
    index = torch.arange(first + 1, hankel.rows + 1, dtype=values.dtype, device=values.device)
    logs = (first / index).log()  # (side - r)
    low, high = torch.zeros_like(last), torch.full_like(last, 1e3)
    for _ in range(50):
        middle = (low + high) / 2
        more = last.square() * (2 * middle * logs).exp().sum(-1, keepdim=True) > energy
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return torch.cat([values, last * (low * logs).exp()], dim=-1)
