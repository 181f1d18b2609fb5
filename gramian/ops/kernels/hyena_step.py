r"""A step of a Hyena layer with modal filters between its projections, as one kernel.

    (q, k, v)_t = Σ_j w_j z_{t-j} + bias,   e_t = k_t v_t,
    y_t = q_t (Re Σ_m r_m x_{m,t} + d e_t),   x_{m,t+1} = λ_m x_{m,t} + e_t

PyTorch's operations read and write the state several times. The kernel reads and writes it once.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["hyena_step"]

_ELEMENTS = 1024  # modes in one pass of a program
_CHANNELS = 64


@torch.no_grad()
def hyena_step(
    z: Tensor,
    past: Tensor,
    weight: Tensor,
    bias: Tensor,
    modes: Tensor,
    poles: Tensor,
    residues: Tensor,
    direct: Tensor,
) -> Tensor:
    """Compute the output of one token, and overwrite the state.

    Args:
        z: (batch, 3 width): the input projection of the token, in the order q, k, v.
        past: (batch, taps - 1, 3 width), contiguous, of the dtype of z: the last inputs of the
            short convolution, the oldest first. It is overwritten.
        weight: (3 width, taps): the short convolution, the present input first.
        bias: (3 width).
        modes: (batch, 1 or 2, m, width), contiguous, float32 or float64: the real and imaginary
            parts of x, or only the former if all poles and residues are real. It is overwritten.
        poles: (1 or 2, m, width), of the dtype of `modes`: the real and imaginary parts of λ.
        residues: (1 or 2, m, width), of the dtype of `modes`: Re r and -Im r.
        direct: (width), of the dtype of `modes`: d.

    Returns:
        (batch, width), in the dtype of z. Sums are computed in the dtype of `modes`.
    """
    from gramian.ops.kernels._hyena_step import step

    (batch, parts, count, width), taps = modes.shape, weight.shape[1]
    y = z.new_empty(batch, width)
    together = min(_CHANNELS, 1 << (width - 1).bit_length())
    at_once = min(max(_ELEMENTS // together, 1), 1 << max(count - 1, 0).bit_length())
    inputs = (one.to(modes.dtype).contiguous() for one in (weight, bias))
    step[batch, -(-width // together)](
        z.contiguous(),
        past,
        *inputs,
        modes,
        *(poles.contiguous(), residues.contiguous(), direct.contiguous()),
        y,
        width,
        count,
        TAPS=taps,
        REAL=parts == 1,
        CHANNELS=together,
        MODES=at_once,
    )
    return y
