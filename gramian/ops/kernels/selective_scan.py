r"""The selective scan of S6 as one kernel, with its gradients.

    h_t = exp(-Δ_t a) h_{t-1} + Δ_t B_t x_t,   y_t = C_t · h_t + D x_t

(Gu and Dao 2023, arXiv 2312.00752, algorithm 2). The coefficients, which are n times larger than
the inputs, are never stored. For the gradients, the state is kept once in every 64 steps, and the
others are computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["selective_scan"]

_CHUNK = 64  # steps from one kept state to the next
_ELEMENTS = 512  # numbers in the state of one program


def selective_scan(
    x: Tensor, dt: Tensor, rates: Tensor, B: Tensor, C: Tensor, D: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the outputs of a selective scan and its last state.

    All tensors have one dtype, float32 or float64, and one device.

    Args:
        x: (batch, length, channels): the input.
        dt: (batch, length, channels): Δ, the steps of time.
        rates: (channels, n): a, the rates.
        B: (batch, length, n): the input vectors.
        C: (batch, length, n): the output vectors.
        D: (channels): the direct terms.
        start: (batch, channels, n): the state before the first step.

    Returns:
        y (batch, length, channels) and the state after the last step, (batch, channels, n). Both
        are differentiable once, in reverse mode.
    """
    apply: Any = _SelectiveScan.apply
    return apply(x, dt, rates, B, C, D, start)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        from gramian.ops.kernels._selective_scan import forward

        x, dt, rates, B, C, D, start = inputs = tuple(one.contiguous() for one in inputs)
        batch, length, channels = x.shape
        states = rates.shape[1]
        chunks = -(-length // _CHUNK)
        y, end = torch.empty_like(x), torch.empty_like(start)
        kept = x.new_empty(batch, chunks, channels, states)
        grid, blocks = _layout(batch, channels, states)
        sizes = length, channels, states
        forward[grid](*inputs, y, end, kept, *sizes, **blocks)
        ctx.save_for_backward(x, dt, rates, B, C, D, kept)
        return y, end

    @staticmethod
    def backward(ctx: Any, g_y: Tensor, g_end: Tensor) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "the kernel of the selective scan has first derivatives only; turn the kernels off "
                "with gramian.ops.use_triton(False)."
            )
        from gramian.ops.kernels._selective_scan import backward

        x, dt, rates, B, C, D, kept = ctx.saved_tensors
        (batch, length, channels), states = x.shape, rates.shape[1]
        grid, blocks = _layout(batch, channels, states)
        g_x, g_dt = torch.empty_like(x), torch.empty_like(dt)
        g_B, g_C = (x.new_empty(grid[1], batch, length, states) for _ in range(2))
        g_rates, g_start = (x.new_empty(batch, channels, states) for _ in range(2))
        g_D = x.new_empty(batch, channels)
        scratch = x.new_empty(batch, _CHUNK, channels, states)
        backward[grid](
            *(x, dt, rates, B, C, D, kept, g_y.contiguous(), g_end.contiguous()),
            *(g_x, g_dt, g_rates, g_B, g_C, g_D, g_start, scratch),
            *(length, channels, states),
            **blocks,
        )
        return g_x, g_dt, g_rates.sum(0), g_B.sum(0), g_C.sum(0), g_D.sum(0), g_start


def _layout(batch: int, channels: int, states: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid of programs, and the sizes of the part of the state that each has."""
    padded = 1 << (states - 1).bit_length()
    most = max(1, _ELEMENTS // padded)
    together = min(most, 1 << (channels - 1).bit_length())
    sizes = {"CHUNK": _CHUNK, "CHANNELS": together, "STATES": padded}
    return (batch, -(-channels // together)), sizes
