"""The program of `hyena_step`. Importing this module needs Triton.

A program has one sequence and some channels. It reads and writes each number of the state once.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["step"]


@triton.jit
def _convolved(
    z: tl.tensor,
    past: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    column: tl.tensor,
    own: tl.tensor,
    width: tl.tensor,
    TAPS: tl.constexpr,
) -> tl.tensor:
    """Return the short convolution of one third of the columns, and move its past on."""
    now = tl.load(z + column, mask=own, other=0.0)
    total = tl.load(bias + column, mask=own, other=0.0)
    total += now.to(total.dtype) * tl.load(weight + column * TAPS, mask=own, other=0.0)
    for j in tl.static_range(TAPS - 1):  # from the oldest input on
        row = past + j * 3 * width + column
        held = tl.load(row, mask=own, other=0.0)
        tap = tl.load(weight + column * TAPS + TAPS - 1 - j, mask=own, other=0.0)
        total += held.to(total.dtype) * tap
        if j > 0:
            tl.store(row - 3 * width, held, mask=own)
    if TAPS > 1:
        tl.store(past + (TAPS - 2) * 3 * width + column, now, mask=own)
    return total


@triton.jit
def step(
    z: tl.tensor,
    past: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    modes: tl.tensor,
    poles: tl.tensor,
    residues: tl.tensor,
    direct: tl.tensor,
    y: tl.tensor,
    width: tl.tensor,
    count: tl.tensor,
    TAPS: tl.constexpr,
    REAL: tl.constexpr,
    CHANNELS: tl.constexpr,
    MODES: tl.constexpr,
) -> None:
    """Compute one token's output, and overwrite the past and the modes."""
    batch = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    own = c < width
    z += batch * 3 * width
    past += batch * (TAPS - 1) * 3 * width
    last = _convolved(z, past, weight, bias, c, own, width, TAPS)
    gate = _convolved(z, past, weight, bias, c + width, own, width, TAPS)
    value = gate * _convolved(z, past, weight, bias, c + 2 * width, own, width, TAPS)
    output = value * tl.load(direct + c, mask=own, other=0.0)
    size = count * width
    modes += batch * size * (1 if REAL else 2)
    for first in range(0, count, MODES):
        m = first + tl.arange(0, MODES)
        inside = (m < count)[:, None] & own[None, :]
        at = m[:, None] * width + c[None, :]
        re = tl.load(modes + at, mask=inside, other=0.0)
        turn = tl.load(poles + at, mask=inside, other=0.0)
        read = tl.load(residues + at, mask=inside, other=0.0)
        if REAL:
            output += tl.sum(re * read, 0)
            tl.store(modes + at, re * turn + value[None, :], mask=inside)
        else:
            im = tl.load(modes + size + at, mask=inside, other=0.0)
            turn_im = tl.load(poles + size + at, mask=inside, other=0.0)
            read_im = tl.load(residues + size + at, mask=inside, other=0.0)
            output += tl.sum(re * read + im * read_im, 0)
            tl.store(modes + at, re * turn - im * turn_im + value[None, :], mask=inside)
            tl.store(modes + size + at, im * turn + re * turn_im, mask=inside)
    tl.store(y + batch * width + c, (last * output).to(y.dtype.element_ty), mask=own)
