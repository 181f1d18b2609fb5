"""Define the depthwise convolution with a few taps that most mixers have."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["ShortConvolution"]


class ShortConvolution(nn.Module):
    """A depthwise causal convolution with a few explicit taps.

    Args:
        channels: Number of channels.
        taps: Number K of taps, at least 1. Tap 0 acts on the present input.
        bias: Whether a bias is added.
    """

    def __init__(self, channels: int, taps: int, bias: bool = True) -> None:
        super().__init__()
        if taps < 1:
            raise ValueError(f"a short convolution needs at least one tap; got {taps}.")
        self.taps = taps
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases uniformly from ±1/√K, as torch's depthwise convolutions do."""
        bound = 1 / math.sqrt(self.taps)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, x: Tensor, past: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve a chunk, or a single token.

        Single tokens also go through this method, since the hooks that fetch offloaded parameters
        are attached to no other method.

        Args:
            x: (batch, length, channels), or one token (batch, channels) together with a past.
            past: The K - 1 inputs before x, (batch, K - 1, channels). None means zeros.
            mask: (batch, length), zero for padding at the beginning of rows, where x must be zero.
                The past then comes directly before the first token. None if there is no padding.

        Returns:
            The output, which has the shape of x, and the new past.
        """
        if x.ndim == 2 and past is not None:
            return self._one(x, past)
        length = x.shape[1]
        if past is None:
            extended = nn.functional.pad(x, (0, 0, self.taps - 1, 0))
        else:
            extended = torch.cat([past.to(x.dtype), x], dim=1)
            if mask is not None:
                extended = self._moved_past(extended, mask)
        weight = self.weight.flip(-1).to(x.dtype)
        y = self._offset(x)
        for j in range(self.taps):
            y = torch.addcmul(y, extended[:, j : j + length], weight[:, j])
        return y, extended[:, length:].clone()  # a view would keep the whole input

    def _moved_past(self, extended: Tensor, mask: Tensor) -> Tensor:
        """Move the leading K - 1 columns of each row to the columns before its first token."""
        batch, width = extended.shape[:2]
        padding = (mask == 0).sum(1, keepdim=True)
        columns = torch.arange(width, device=extended.device)
        source = torch.where(columns < self.taps - 1 + padding, columns - padding, columns)
        rows = torch.arange(batch, device=extended.device)[:, None] * width
        moved = extended.flatten(0, 1).index_select(0, (rows + source.clamp_min(0)).flatten())
        return moved.unflatten(0, (batch, width)).masked_fill((source < 0).unsqueeze(-1), 0)

    def step(self, x_t: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve one token (batch, channels), and return its output and the new past."""
        y, past = self(x_t, past)
        return y, past

    def _one(self, x_t: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.weight.to(x_t.dtype)
        past = past.to(x_t.dtype)
        y = torch.addcmul(self._offset(x_t), x_t, weight[:, 0])
        for j in range(1, self.taps):
            y = torch.addcmul(y, past[:, -j], weight[:, j])
        return y, torch.cat([past, x_t.unsqueeze(1)], dim=1)[:, 1:]

    def _offset(self, like: Tensor) -> Tensor:
        """Return the bias, or a zero of shape (), in the dtype of `like`."""
        return like.new_zeros(()) if self.bias is None else self.bias.to(like.dtype)

    def extra_repr(self) -> str:
        return f"channels={self.weight.shape[0]}, taps={self.taps}"
