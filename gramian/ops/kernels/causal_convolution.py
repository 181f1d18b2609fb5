r"""Causal convolution as one kernel, whose spectra stay on the chip.

The idea is that of FlashFFTConv (Fu, Kumbong, Nguyen and Ré 2023, arXiv 2311.05908): a transform
is two products of matrices, for which GPUs have their own units. Sequences are divided into blocks
of at most 2,048 samples. The kernel between two blocks of distance j has the lags from
(j − 1) T + 1 to (j + 1) T − 1, and its spectrum has 2T points. Each block of the output sums the
spectra of the blocks that it depends on, and is transformed back once. So no length needs a build
of its own, and nothing but inputs, outputs and the spectra of the kernels is read or written.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["covers", "fused_convolution", "fused_correlation"]

_LONGEST = 2**15  # time grows with the square of the number of blocks
_BLOCK = 2048
_LEAST = 256  # matrices then have at least 16 rows and columns
_WARPS = 8


def covers(u: Tensor, kernel: Tensor) -> bool:
    """Return whether the kernel in Triton is meant for a convolution of these tensors."""
    return kernel.dtype == torch.float32 and u.numel() > 0 and u.shape[-1] <= _LONGEST


def fused_convolution(
    u: Tensor,
    kernel: Tensor,
    like: Tensor,
    *,
    factor: Tensor | None = None,
    gate: Tensor | None = None,
    adjoint: bool = False,
) -> Tensor:
    """Convolve rows with kernels, and multiply the result by a gate.

    Args:
        u: (*S, L), with any strides: the input.
        kernel: (*S or 1, K), float32 or float64, K ≤ L: the taps. Sums are computed in this dtype.
        like: A tensor with the dtype and the layout of the result.
        factor: (*S, L): numbers by which the input is multiplied.
        gate: (*S, L): numbers by which the result is multiplied.
        adjoint: Whether to apply the transposed operator, which correlates.

    Returns:
        (*S, L).
    """
    from gramian.ops.kernels._causal_convolution import convolve

    group = _Grouping(u, kernel)
    taps = group.kernel(kernel)
    rows = group.rows(u)
    batch, channels, length = rows.shape
    size = _block(length)
    spectra = _transfer(taps, size, length)
    first, second = (rows if one is None else group.rows(one) for one in (factor, gate))
    result = torch.empty_like(like)
    y, written = group.target(result)
    # One axis, because the others of a grid have at most 65,535 programs on NVIDIA's GPUs.
    pairs = -(-length // (2 * size))
    convolve[pairs * channels * batch,](
        *(rows, first, spectra, second, y, _tables(size, taps.dtype, taps.device)),
        *(channels, length, spectra.shape[1]),
        *(*rows.stride(), *first.stride(), *second.stride(), *y.stride()),
        FACTOR=factor is not None,
        GATE=gate is not None,
        ADJOINT=adjoint,
        **_options(size, taps.dtype),
    )
    written()
    return result


def fused_correlation(
    g: Tensor, u: Tensor, kernel: Tensor, *, factor: Tensor | None = None
) -> Tensor:
    """Compute the gradient of the kernel, `k_j = Σ_{batch, t} g_t u_{t−j}`.

    Args:
        g: (*S, L): the gradient of the output.
        u: (*S, L): the input.
        kernel: (*S or 1, K), float32 or float64, K ≤ L: the taps, of which only the shape and the
            dtype matter. Sums are computed in this dtype.
        factor: (*S, L): numbers by which g is multiplied.

    Returns:
        A tensor like `kernel`.
    """
    from gramian.ops.kernels._causal_convolution import correlate

    group = _Grouping(u, kernel)
    incoming, rows = group.rows(g), group.rows(u)
    batch, channels, length = rows.shape
    taps, dtype = kernel.shape[-1], kernel.dtype
    size = _block(length)
    P, Q = _shape(size)
    reach = _reach(taps, size, length)
    spectra = torch.empty(channels, reach, 2, P, Q, dtype=dtype, device=u.device)
    first = incoming if factor is None else group.rows(factor)
    correlate[reach * channels,](
        *(incoming, first, rows, spectra, _tables(size, dtype, u.device), batch, length, reach),
        *(*incoming.stride(), *first.stride(), *rows.stride()),
        FACTOR=factor is not None,
        **_options(size, dtype),
    )
    ordered = torch.complex(spectra[:, :, 0], spectra[:, :, 1]).transpose(-1, -2).flatten(-2)
    return group.of_kernel(_folded(torch.fft.ifft(ordered).real, taps, size))


class _Grouping:
    """Rows (*S, L) as (batch, channels, L), where rows of one channel share a kernel.

    Args:
        u: (*S, L).
        kernel: (*S or 1, K).
    """

    def __init__(self, u: Tensor, kernel: Tensor) -> None:
        sizes = u.shape[:-1]
        own = [axis for axis, size in enumerate(kernel.shape[:-1]) if size > 1]
        self._order = [axis for axis in range(len(sizes)) if axis not in own] + own
        self._channels = math.prod(sizes[axis] for axis in own)
        self._kernel_shape = kernel.shape

    def rows(self, x: Tensor) -> Tensor:
        """Return (batch, channels, L) of a tensor (*S, L), without a copy where possible."""
        return x.permute(*self._order, -1).reshape(-1, self._channels, x.shape[-1])

    def kernel(self, kernel: Tensor) -> Tensor:
        return kernel.permute(*self._order, -1).reshape(self._channels, kernel.shape[-1])

    def of_kernel(self, taps: Tensor) -> Tensor:
        """Return what `kernel` maps to (channels, K)."""
        shape = [self._kernel_shape[axis] for axis in self._order]
        back = sorted(range(len(shape)), key=self._order.__getitem__)
        return taps.view(*shape, -1).permute(*back, -1).contiguous()

    def target(self, result: Tensor) -> tuple[Tensor, Callable[[], object]]:
        """Return where to write the rows (batch, channels, L) of a tensor (*S, L).

        The function must be called when they are written.
        """
        permuted = result.permute(*self._order, -1)
        shape = (-1, self._channels, result.shape[-1])
        try:
            return permuted.view(shape), lambda: None
        except RuntimeError:  # axes that are merged are not neighbors in memory
            rows = torch.empty_like(permuted.reshape(shape))
            return rows, lambda: permuted.copy_(rows.view(permuted.shape))


def _block(length: int) -> int:
    """Return the number T of samples in a block, a power of two, so that there are two or more."""
    half = 1 << max((length - 1).bit_length() - 1, 0)
    return min(_BLOCK, max(_LEAST, half))


def _shape(size: int) -> tuple[int, int]:
    """Return the numbers P and Q of rows and columns, with P Q = 2 T and P ≥ 2 Q if T ≥ 256."""
    Q = 1 << (size.bit_length() - 1) // 2
    return 2 * size // Q, Q


def _options(size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the sizes of matrices, and how they are multiplied."""
    P, Q = _shape(size)
    # Three products of ten bits each are as exact as float32, and use the units for matrices.
    split = dtype == torch.float32 and not torch.version.hip
    return {"P": P, "Q": Q, "PRECISION": "tf32x3" if split else "ieee", "num_warps": _WARPS}


def _reach(taps: int, size: int, length: int) -> int:
    """Return the number of distances, from 0 on, at which blocks are connected."""
    return min((max(taps, 2) - 2) // size + 2, -(-length // size))


def _transfer(kernel: Tensor, size: int, length: int) -> Tensor:
    """Return the spectra of the kernel between blocks of each distance, (C, reach, 2, P, Q)."""
    P, Q = _shape(size)
    reach = _reach(kernel.shape[-1], size, length)
    padded = kernel.new_zeros(len(kernel), (reach + 1) * size)
    padded[:, size : size + kernel.shape[-1]] = kernel[:, : reach * size]
    # Lags (j - 1) T … (j + 1) T - 1, in circular order from j T on. The first is never needed.
    lags = padded.unfold(-1, 2 * size, size).roll(-size, -1)
    spectrum = torch.fft.fft(lags).unflatten(-1, (Q, P)).transpose(-1, -2)
    return torch.stack([spectrum.real, spectrum.imag], 2).contiguous()


def _folded(lags: Tensor, taps: int, size: int) -> Tensor:
    """Apply the transpose of what `_transfer` does before the transform."""
    channels, reach = lags.shape[:2]
    padded = lags.new_zeros(channels, reach + 1, size)
    padded[:, 1:] += lags[..., :size]
    padded[:, :-1] += lags[..., size:]
    result = padded.flatten(1)[:, size : size + taps]
    return torch.nn.functional.pad(result, (0, taps - result.shape[-1]))


@functools.lru_cache(maxsize=16)
def _tables(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return cosines and sines of negative angles: (P, Q) twice, (P, P / 2) twice, (Q, Q) twice."""
    P, Q = _shape(size)
    parts = []
    for rows, columns, period in ((P, Q, P * Q), (P, P // 2, P), (Q, Q, Q)):
        products = torch.outer(torch.arange(rows), torch.arange(columns)) % period
        angles = products.double() * (-2 * torch.pi / period)
        parts += [angles.cos().flatten(), angles.sin().flatten()]
    return torch.cat(parts).to(device, dtype)
