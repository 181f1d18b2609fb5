"""Causal convolution with a few taps, as a sum of shifted and scaled copies of the input.

    y_t = Σ_{j<K} h_j u_{t−j},   T_hᵀ g: Σ_{j<K} h_j g_{t+j},   k_j = Σ_{batch, t} g_t u_{t−j}

Each tap is one pass over a block of samples that stays in the processor's cache. A pass costs far
less than a transform, most of all where the samples of all channels are interleaved, (batch,
length, channels), whose layout the transform must turn around and the sum keeps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["convolve_directly", "differentiate_directly", "has_few_taps"]

# Up to so many taps the sum is faster than transforms on a CPU, at every length; the second number
# is for rows whose samples are interleaved.
_MOST_TAPS = 16
_MOST_INTERLEAVED_TAPS = 32

# Numbers in a block, and the fewest samples of a row in it.
_BLOCK = 2**17
_SAMPLES = 256


def has_few_taps(u: Tensor, kernel: Tensor) -> bool:
    """Return whether to sum over the taps of a kernel (*S or 1, K) for rows u (*S, L)."""
    most = _MOST_TAPS if u.stride(-1) == 1 else _MOST_INTERLEAVED_TAPS
    return u.device.type == "cpu" and kernel.shape[-1] <= most


def convolve_directly(
    u: Tensor, kernel: Tensor, gate: Tensor | None, like: Tensor | None = None
) -> Tensor:
    """Compute gate (T_h u) for u and gate (*S, L), kernel (*S or 1, K), in the kernel's dtype.

    The result has the dtype and memory layout of `like` (*S, L), by default those of u.
    """
    y = torch.empty_like(u if like is None else like)
    taps = _taps_first(kernel)
    for begin, end in _blocks(u):
        first = max(begin - len(taps) + 1, 0)
        past = u[..., first:end].to(kernel.dtype)
        part = y[..., begin:end]
        result = part if part.dtype == kernel.dtype else part.to(kernel.dtype)
        torch.mul(past[..., begin - first :], taps[0], out=result)
        for lag in range(1, min(len(taps), end)):
            late = max(begin, lag)  # the first output that has an input at this lag
            earlier = past[..., late - lag - first : end - lag - first]
            result[..., late - begin :].addcmul_(earlier, taps[lag])
        if gate is not None:
            result.mul_(gate[..., begin:end])
        if result is not part:
            part.copy_(result)
    return y


def differentiate_directly(
    g: Tensor, u: Tensor, kernel: Tensor, gate: Tensor | None, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of u, kernel and gate for the gradient g of `convolve_directly`.

    Gradients that are not needed are None.
    """
    needs_u, needs_kernel, needs_gate = needs
    of_u = torch.empty_like(u) if needs_u else None
    taps, length = _taps_first(kernel), u.shape[-1]
    sums = torch.zeros_like(taps)
    summed = [axis for axis, size in enumerate(kernel.shape[:-1]) if size == 1] + [u.ndim - 1]
    for begin, end in _blocks(u) if needs_u or needs_kernel else ():
        last = min(end + len(taps) - 1, length)
        future = g[..., begin:last].to(kernel.dtype)
        if gate is not None:
            future = future * gate[..., begin:last]
        signal = u[..., begin:end].to(kernel.dtype)
        result = torch.zeros_like(signal) if needs_u else None
        for lag in range(min(len(taps), length - begin)):
            later = future[..., lag : lag + end - begin]
            early = later.shape[-1]  # the inputs that have an output at this lag
            if result is not None:
                result[..., :early].addcmul_(later, taps[lag])
            if needs_kernel:
                sums[lag] += (later * signal[..., :early]).sum(summed, keepdim=True)
        if of_u is not None and result is not None:
            of_u[..., begin:end] = result
    of_kernel = sums.squeeze(-1).movedim(0, -1).contiguous() if needs_kernel else None
    of_gate = convolve_directly(u, kernel, g, like=gate) if needs_gate else None
    return of_u, of_kernel, of_gate


def _taps_first(kernel: Tensor) -> Tensor:
    """Return a kernel (*S, K) as (K, *S, 1), whose channels are neighbors in memory."""
    return kernel.movedim(-1, 0).contiguous().unsqueeze(-1)


def _blocks(u: Tensor) -> Iterator[tuple[int, int]]:
    """Cut the samples of rows (*S, L) into blocks."""
    length = u.shape[-1]
    rows = max(u.numel() // length, 1)
    samples = max(_BLOCK // rows, _SAMPLES)
    for begin in range(0, length, samples):
        yield begin, min(begin + samples, length)
