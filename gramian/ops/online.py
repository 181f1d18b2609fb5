r"""Online convolution: an exact FIR filter of K taps that takes one sample at a time.

A sample costs an amortized O(log² K) operations.

Let `c` be a multiple of the smallest block's size, and `U` the largest power of two that divides
`c`. After `c` samples, the last `U` inputs are convolved with the taps `1 … 2U - 1` by one cyclic
FFT of `2U` points. This gives the contribution of these inputs to the outputs `c … c + U - 1`.
Inside the smallest block, the taps are applied directly. Every pair of an input and an output is
processed exactly once, so the result is the convolution itself, not an approximation (van der
Hoeven's relaxed multiplication with one known factor; FutureFill, Agarwal et al. 2024; Flash
Inference, Oncescu et al. 2024).

Let P be the smallest power of two that is at least K - 1. The state holds the last inputs (the
previous and the current window of P samples) and the contributions of these inputs to the rest of
the current window. These are `3P` numbers per stream, after any number of samples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gramian.ops.convolution import causal_convolution

__all__ = ["OnlineBuffers", "OnlineConvolution"]

_BLOCK = 32  # for fewer samples, a dot product is faster than an FFT


class OnlineBuffers(NamedTuple):
    """The buffers that an online convolution carries from one sample to the next."""

    inputs: Tensor  # (*B, 2P): the previous window, then the current window up to `position`
    owed: Tensor  # (*B, P): contributions of earlier inputs to outputs of the current window
    position: Tensor  # (), int64 on the CPU: the number of samples that have been processed


class OnlineConvolution:
    """A convolution with a known kernel that takes one sample or one chunk at a time.

    Args:
        kernel: (*C, K), real floating point: the taps, K ≥ 1.
    """

    def __init__(self, kernel: Tensor) -> None:
        self.kernel = kernel
        taps = kernel.shape[-1]
        self.window = 1 << max(taps - 2, 0).bit_length()  # P ≥ K - 1
        self.block = min(_BLOCK, self.window)
        first = kernel[..., : self.block]
        self._reversed = torch.nn.functional.pad(first, (0, self.block - first.shape[-1])).flip(-1)
        self._spectra: dict[int, Tensor] = {}

    def buffers(
        self, batch_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> OnlineBuffers:
        """Return the buffers for streams of shape `batch_shape` with a silent past."""
        return OnlineBuffers(
            torch.zeros(*batch_shape, 2 * self.window, dtype=dtype, device=device),
            torch.zeros(*batch_shape, self.window, dtype=dtype, device=device),
            torch.zeros((), dtype=torch.int64),
        )

    def step(self, sample: Tensor, buffers: OnlineBuffers) -> tuple[Tensor, OnlineBuffers]:
        """Process one sample (*B), return its output (*B), and write into `buffers`."""
        inputs, owed, position = buffers
        window, block = self.window, self.block
        at = int(position) % window
        inputs[..., window + at] = sample
        inside = at % block + 1  # samples of the current block up to and including this sample
        recent = inputs[..., window + at + 1 - inside : window + at + 1]
        taps = self._reversed[..., -inside:]
        output = torch.linalg.vecdot(recent, taps) + owed[..., at]

        at += 1
        if at % block == 0:
            if at == window:
                owed.copy_(self._tile(inputs[..., window:]))
                inputs[..., :window] = inputs[..., window:].clone()
            else:
                size = at & -at
                owed[..., at : at + size] += self._tile(
                    inputs[..., window + at - size : window + at]
                )
        return output, OnlineBuffers(inputs, owed, position + 1)

    def extend(self, signal: Tensor, buffers: OnlineBuffers) -> tuple[Tensor, OnlineBuffers]:
        """Process T samples (*B, T) at once by FFT, differentiably, without changing `buffers`."""
        inputs, _, position = buffers
        window = self.window
        at = int(position) % window
        length = signal.shape[-1]
        if int(position) == 0:
            output = causal_convolution(signal, self.kernel)
        else:
            past = torch.cat([inputs[..., at : window + at], signal], dim=-1)
            output = causal_convolution(past, self.kernel)[..., window:]

        end = (int(position) + length) % window
        known = torch.cat([inputs[..., : window + at], signal], dim=-1)[..., -(window + end) :]
        inputs = torch.nn.functional.pad(known, (0, window - end))
        return output, OnlineBuffers(inputs, self._owed(inputs, end), position + length)

    def _owed(self, inputs: Tensor, end: int) -> Tensor:
        """Recompute the contribution of inputs up to `end` to the rest of the current window."""
        window = self.window
        owed = self._tile(inputs[..., :window])
        at = 0
        size = window // 2
        while size >= self.block:
            if end & size:
                at += size
                tile = self._tile(inputs[..., window + at - size : window + at])
                owed = owed + torch.nn.functional.pad(tile, (at, window - at - size))
            size //= 2
        return owed

    def _tile(self, inputs: Tensor) -> Tensor:
        """Compute the contribution of U inputs to the next U outputs by an FFT of 2U points."""
        size = inputs.shape[-1]
        spectrum = self._spectra.get(size)
        if spectrum is None:
            spectrum = torch.fft.rfft(self.kernel[..., : 2 * size], n=2 * size)
            self._spectra[size] = spectrum
        if inputs.numel() == 0:  # without streams, MKL's FFT raises an error
            return inputs
        product = torch.fft.rfft(inputs, n=2 * size) * spectrum
        return torch.fft.irfft(product, n=2 * size)[..., size:]
