r"""Products with Vandermonde matrices, as matrix products of about √L × √L blocks.

A modal impulse response is ``h_t = Re Σ_k c_k λ_k^t``. With ``t = iJ + j`` the power splits into
``λ^{iJ} λ^j``, so the L × m Vandermonde matrix is never formed: its product is one real matrix
product between ``c_k λ_k^{iJ}`` and ``λ_k^j``, each with about √L rows. The transposed product,
``Σ_j λ^{T-1-j} u_j``, is the final state of a modal recurrence and splits in the same way.

Powers are taken by doubling in double precision, so that a pole on the negative real axis keeps its
phase over thousands of steps, then rounded to the dtype of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "geometric_powers",
    "integer_power",
    "vandermonde_product",
    "vandermonde_transpose_product",
]


def geometric_powers(base: Tensor, count: int) -> Tensor:
    """The powers ``base^0, …, base^(count - 1)`` by doubling; exact at zero.

    Args:
        base: (*C, m), real or complex.
        count: Number of powers, at least 1.

    Returns:
        (*C, m, count), of the dtype of ``base``.
    """
    powers = torch.ones_like(base).unsqueeze(-1)
    step = base.unsqueeze(-1)  # base^(number of powers so far)
    while (have := powers.shape[-1]) < count:
        powers = torch.cat([powers, powers[..., : count - have] * step], dim=-1)
        step = step * step
    return powers


def integer_power(base: Tensor, exponent: int) -> Tensor:
    """``base`` to a power ≥ 0, by squaring; exact at zero, with ``0^0 = 1``."""
    result = torch.ones_like(base)
    while exponent:
        if exponent & 1:
            result = result * base
        base = base * base
        exponent >>= 1
    return result


def vandermonde_product(poles: Tensor, coefficients: Tensor, length: int) -> Tensor:
    """``Re Σ_k coefficients_k poles_k^t`` for t = 0 … length - 1.

    Args:
        poles: (*C, m), complex.
        coefficients: (*B, m), complex; ``C`` broadcasts against ``B``. Where ``C`` has size 1 the
            powers are shared, not repeated.
        length: Number of samples, at least 1.

    Returns:
        (*B, length), real, of the precision of ``coefficients``.
    """
    columns = max(1, math.isqrt(length))
    rows = -(-length // columns)
    wide = poles.to(torch.complex128)
    right = geometric_powers(wide, columns)  # (*C, m, J)
    stride = right[..., -1] * wide  # poles^J
    left = geometric_powers(stride, rows)  # (*C, m, I)

    grouped, restore = group_channels(coefficients, poles.shape[:-1])  # (G, R, m)
    groups, repeats, modes = grouped.shape
    dtype = coefficients.dtype
    left = left.reshape(groups, modes, rows).mT.to(dtype)  # (G, I, m)
    right = right.reshape(groups, modes, columns).to(dtype)  # (G, m, J)
    scaled = (grouped.unsqueeze(-2) * left.unsqueeze(1)).reshape(groups, repeats * rows, modes)
    samples = torch.cat([scaled.real, -scaled.imag], dim=-1) @ torch.cat(
        [right.real, right.imag], dim=-2
    )  # (G, R I, J)
    return restore(samples.reshape(groups, repeats, rows * columns)[..., :length])


def vandermonde_transpose_product(poles: Tensor, signal: Tensor) -> Tensor:
    """``Σ_j poles_k^(T-1-j) signal_j``: the state that a modal recurrence reaches after T inputs.

    Args:
        poles: (*C, m), complex.
        signal: (*B, T), real; ``C`` broadcasts against ``B``.

    Returns:
        (*B, m), complex, of the precision of ``signal``.
    """
    length = signal.shape[-1]
    columns = max(1, math.isqrt(length))
    rows = -(-length // columns)
    wide = poles.to(torch.complex128)
    inner = geometric_powers(wide, columns)  # (*C, m, J)
    outer = geometric_powers(inner[..., -1] * wide, rows)  # (*C, m, I)

    # The signal is padded in front, so that its last sample meets the power zero.
    padded = torch.nn.functional.pad(signal, (rows * columns - length, 0))
    grouped, restore = group_channels(padded, poles.shape[:-1])  # (G, R, I J)
    groups, repeats = grouped.shape[:2]
    dtype = signal.dtype.to_complex()
    modes = poles.shape[-1]
    inner = inner.flip(-1).reshape(groups, modes, columns).mT.to(dtype)  # (G, J, m)
    outer = outer.flip(-1).reshape(groups, modes, rows).mT.to(dtype)  # (G, I, m)
    basis = torch.cat([inner.real, inner.imag], dim=-1)  # (G, J, 2m)
    partial = grouped.reshape(groups, repeats * rows, columns) @ basis
    partial = partial.reshape(groups, repeats, rows, 2 * modes)
    inner_sums = torch.complex(partial[..., :modes], partial[..., modes:])  # (G, R, I, m)
    state = (inner_sums * outer.unsqueeze(1)).sum(-2)  # (G, R, m)
    return restore(state)


def group_channels(tensor: Tensor, shape: torch.Size) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Bring ``tensor`` (*B, k) to (G, R, k): G runs over the axes where ``shape`` varies.

    Returns the grouped tensor and the function that brings a (G, R, k') result back to (*B, k').
    """
    lead = torch.broadcast_shapes(tensor.shape[:-1], shape)
    tensor = tensor.expand(*lead, tensor.shape[-1])
    varies = [False] * (len(lead) - len(shape)) + [size != 1 for size in shape]
    order = [i for i, v in enumerate(varies) if v] + [i for i, v in enumerate(varies) if not v]
    groups = math.prod(lead[i] for i, v in enumerate(varies) if v)
    inverse = sorted(range(len(order)), key=order.__getitem__)

    def restore(result: Tensor) -> Tensor:
        result = result.reshape(*(lead[i] for i in order), result.shape[-1])
        return result.permute(*inverse, len(order))

    permuted = tensor.permute(*order, len(order))
    repeats = math.prod(lead) // max(groups, 1)
    return permuted.reshape(groups, repeats, tensor.shape[-1]), restore
