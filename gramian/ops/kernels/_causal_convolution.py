"""Programs of `fused_convolution` and `fused_correlation`. Importing this module needs Triton.

A program transforms two neighboring blocks of T samples of a row at a time, which are the real and
the imaginary part of one complex signal of 2T = P Q points. With n = Q n' + n'' and k = k' + P k'',
the transform is two products of matrices with factors between them,

    X[k', k''] = Σ_{n''} ω_N^(n'' k') ω_Q^(n'' k'') Σ_{n'} ω_P^(n' k') x[n', n''],

so a spectrum stays in the order [k', k''], and never leaves the chip. The lower half of x is
padding, so the products leave it out. Tables hold cosines and sines of negative angles.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["convolve", "correlate"]


@triton.jit
def _multiplied(
    a_re: tl.tensor,
    a_im: tl.tensor,
    b_re: tl.tensor,
    b_im: tl.tensor,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the product of two complex matrices."""
    re = tl.dot(a_re, b_re, input_precision=PRECISION, out_dtype=a_re.dtype)
    re -= tl.dot(a_im, b_im, input_precision=PRECISION, out_dtype=a_re.dtype)
    im = tl.dot(a_re, b_im, input_precision=PRECISION, out_dtype=a_re.dtype)
    im += tl.dot(a_im, b_re, input_precision=PRECISION, out_dtype=a_re.dtype)
    return re, im


@triton.jit
def _spectrum(
    x: tl.tensor,
    factor: tl.tensor,
    tables: tl.tensor,
    start: tl.tensor,
    length: tl.tensor,
    x_step: tl.tensor,
    factor_step: tl.tensor,
    FACTOR: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the spectrum (P, Q) of the block that starts at `start` and of the one after it.

    Samples before the beginning and after the end are 0.
    """
    half: tl.constexpr = P // 2
    N: tl.constexpr = P * Q
    T: tl.constexpr = half * Q
    dtype = tables.dtype.element_ty
    n = start + tl.arange(0, half)[:, None] * Q + tl.arange(0, Q)[None, :]
    inside = (n >= 0) & (n < length)
    second = (n >= -T) & (n < length - T)
    at, after = n.to(tl.int64), n.to(tl.int64) + T
    re = tl.load(x + at * x_step, mask=inside, other=0.0).to(dtype)
    im = tl.load(x + after * x_step, mask=second, other=0.0).to(dtype)
    if FACTOR:
        re *= tl.load(factor + at * factor_step, mask=inside, other=0.0).to(dtype)
        im *= tl.load(factor + after * factor_step, mask=second, other=0.0).to(dtype)
    k = tl.arange(0, P)
    q = tl.arange(0, Q)
    place = k[:, None] * half + tl.arange(0, half)[None, :]
    re, im = _multiplied(
        tl.load(tables + 2 * N + place),
        tl.load(tables + 2 * N + P * half + place),
        re,
        im,
        PRECISION,
    )
    place = k[:, None] * Q + q[None, :]
    turn_re, turn_im = tl.load(tables + place), tl.load(tables + N + place)
    re, im = re * turn_re - im * turn_im, re * turn_im + im * turn_re
    place = 2 * N + 2 * P * half + q[:, None] * Q + q[None, :]
    return _multiplied(re, im, tl.load(tables + place), tl.load(tables + Q * Q + place), PRECISION)


@triton.jit
def _signal(
    re: tl.tensor,
    im: tl.tensor,
    tables: tl.tensor,
    P: tl.constexpr,
    Q: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the first half (P // 2, Q) of the signal of a spectrum, times P Q."""
    half: tl.constexpr = P // 2
    N: tl.constexpr = P * Q
    k = tl.arange(0, P)
    q = tl.arange(0, Q)
    place = 2 * N + 2 * P * half + q[:, None] * Q + q[None, :]
    re, im = _multiplied(
        re, im, tl.load(tables + place), -tl.load(tables + Q * Q + place), PRECISION
    )
    place = k[:, None] * Q + q[None, :]
    turn_re, turn_im = tl.load(tables + place), tl.load(tables + N + place)
    re, im = re * turn_re + im * turn_im, im * turn_re - re * turn_im
    place = 2 * N + tl.arange(0, half)[:, None] + k[None, :] * half
    return _multiplied(
        tl.load(tables + place), -tl.load(tables + P * half + place), re, im, PRECISION
    )


@triton.jit
def convolve(
    x: tl.tensor,
    factor: tl.tensor,
    transfer: tl.tensor,
    gate: tl.tensor,
    y: tl.tensor,
    tables: tl.tensor,
    channels: tl.tensor,
    length: tl.tensor,
    reach: tl.tensor,
    x_row: tl.tensor,
    x_channel: tl.tensor,
    x_step: tl.tensor,
    factor_row: tl.tensor,
    factor_channel: tl.tensor,
    factor_step: tl.tensor,
    gate_row: tl.tensor,
    gate_channel: tl.tensor,
    gate_step: tl.tensor,
    y_row: tl.tensor,
    y_channel: tl.tensor,
    y_step: tl.tensor,
    FACTOR: tl.constexpr,
    GATE: tl.constexpr,
    ADJOINT: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Compute two neighboring blocks of the output of a row.

    `transfer`, (channels, reach, 2, P, Q), has the spectra of the kernel between blocks of each
    distance. The blocks before these enter, or for the adjoint those after them.
    """
    half: tl.constexpr = P // 2
    N: tl.constexpr = P * Q
    T: tl.constexpr = half * Q
    blocks = (length + T - 1) // T
    pairs = (blocks + 1) // 2
    program = tl.program_id(0)
    block = program % pairs * 2
    channel = (program // pairs % channels).to(tl.int64)
    row = (program // pairs // channels).to(tl.int64)
    x += row * x_row + channel * x_channel
    factor += row * factor_row + channel * factor_channel
    transfer += channel * reach * 2 * N
    place = tl.arange(0, P)[:, None] * Q + tl.arange(0, Q)[None, :]
    total_re = tl.zeros((P, Q), dtype=tables.dtype.element_ty)
    total_im = tl.zeros((P, Q), dtype=tables.dtype.element_ty)
    last = tl.minimum(reach, blocks - block if ADJOINT else block + 2)
    for distance in range(last):
        other = block + distance if ADJOINT else block - distance
        re, im = _spectrum(
            x,
            factor,
            tables,
            other * T,
            length,
            x_step,
            factor_step,
            FACTOR,
            P,
            Q,
            PRECISION,
        )
        own_re = tl.load(transfer + distance * 2 * N + place)
        own_im = tl.load(transfer + (distance * 2 + 1) * N + place)
        if ADJOINT:
            own_im = -own_im
        total_re += re * own_re - im * own_im
        total_im += re * own_im + im * own_re
    re, im = _signal(total_re, total_im, tables, P, Q, PRECISION)
    n = block * T + tl.arange(0, half)[:, None] * Q + tl.arange(0, Q)[None, :]
    inside, second = n < length, n < length - T
    at, after = n.to(tl.int64), n.to(tl.int64) + T
    re, im = re / N, im / N
    if GATE:
        gate += row * gate_row + channel * gate_channel
        re *= tl.load(gate + at * gate_step, mask=inside, other=0.0).to(re.dtype)
        im *= tl.load(gate + after * gate_step, mask=second, other=0.0).to(re.dtype)
    y += row * y_row + channel * y_channel
    tl.store(y + at * y_step, re.to(y.dtype.element_ty), mask=inside)
    tl.store(y + after * y_step, im.to(y.dtype.element_ty), mask=second)


@triton.jit
def correlate(
    g: tl.tensor,
    factor: tl.tensor,
    x: tl.tensor,
    spectra: tl.tensor,
    tables: tl.tensor,
    batch: tl.tensor,
    length: tl.tensor,
    reach: tl.tensor,
    g_row: tl.tensor,
    g_channel: tl.tensor,
    g_step: tl.tensor,
    factor_row: tl.tensor,
    factor_channel: tl.tensor,
    factor_step: tl.tensor,
    x_row: tl.tensor,
    x_channel: tl.tensor,
    x_step: tl.tensor,
    FACTOR: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Sum, over all rows, the spectra of the correlations of blocks at one distance.

    The real parts of the signals of `spectra`, (channels, reach, 2, P, Q), are the gradients of the
    kernel between blocks of each distance.
    """
    N: tl.constexpr = P * Q
    T: tl.constexpr = P // 2 * Q
    distance = tl.program_id(0) % reach
    channel = (tl.program_id(0) // reach).to(tl.int64)
    g += channel * g_channel
    factor += channel * factor_channel
    x += channel * x_channel
    total_re = tl.zeros((P, Q), dtype=tables.dtype.element_ty)
    total_im = tl.zeros((P, Q), dtype=tables.dtype.element_ty)
    blocks = (length + T - 1) // T
    for batch_row in range(batch):
        row = tl.zeros((), tl.int64) + batch_row
        for block in range(distance, blocks, 2):
            re, im = _spectrum(
                g + row * g_row,
                factor + row * factor_row,
                tables,
                block * T,
                length,
                g_step,
                factor_step,
                FACTOR,
                P,
                Q,
                PRECISION,
            )
            own_re, own_im = _spectrum(
                x + row * x_row,
                factor,
                tables,
                (block - distance) * T,
                length,
                x_step,
                factor_step,
                False,
                P,
                Q,
                PRECISION,
            )
            total_re += re * own_re + im * own_im
            total_im += im * own_re - re * own_im
    place = tl.arange(0, P)[:, None] * Q + tl.arange(0, Q)[None, :]
    spectra += (channel * reach + distance) * 2 * N
    tl.store(spectra + place, total_re)
    tl.store(spectra + N + place, total_im)
