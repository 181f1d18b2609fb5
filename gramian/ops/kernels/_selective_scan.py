"""Programs of `selective_scan`. Importing this module needs Triton.

A program has one sequence and some channels, and keeps their states in registers while it goes
through time. Names of tensors are those of `selective_scan`; `g` marks a gradient. All tensors are
contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["backward", "forward"]


@triton.jit
def forward(
    x: tl.tensor,
    dt: tl.tensor,
    rates: tl.tensor,
    B: tl.tensor,
    C: tl.tensor,
    D: tl.tensor,
    start: tl.tensor,
    y: tl.tensor,
    end: tl.tensor,
    kept: tl.tensor,
    length: tl.tensor,
    channels: tl.tensor,
    states: tl.tensor,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
) -> None:
    """Compute the outputs and the last state, and keep the state before every chunk of steps."""
    batch = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)
    own, used = c < channels, n < states
    inside = own[:, None] & used[None, :]
    place = c[:, None] * states + n[None, :]
    rate = tl.load(rates + place, mask=inside, other=0.0)
    direct = tl.load(D + c, mask=own, other=0.0)
    h = tl.load(start + batch * channels * states + place, mask=inside, other=0.0)
    chunks = (length + CHUNK - 1) // CHUNK
    for t in range(length):
        if t % CHUNK == 0:
            at = (batch * chunks + t // CHUNK) * channels * states
            tl.store(kept + at + place, h, mask=inside)
        row = batch * length + t
        step = tl.load(dt + row * channels + c, mask=own, other=0.0)
        u = tl.load(x + row * channels + c, mask=own, other=0.0)
        b = tl.load(B + row * states + n, mask=used, other=0.0)
        read = tl.load(C + row * states + n, mask=used, other=0.0)
        h = tl.exp(-step[:, None] * rate) * h + (step * u)[:, None] * b[None, :]
        tl.store(y + row * channels + c, tl.sum(h * read[None, :], 1) + direct * u, mask=own)
    tl.store(end + batch * channels * states + place, h, mask=inside)


@triton.jit
def backward(
    x: tl.tensor,
    dt: tl.tensor,
    rates: tl.tensor,
    B: tl.tensor,
    C: tl.tensor,
    D: tl.tensor,
    kept: tl.tensor,
    g_y: tl.tensor,
    g_end: tl.tensor,
    g_x: tl.tensor,
    g_dt: tl.tensor,
    g_rates: tl.tensor,
    g_B: tl.tensor,
    g_C: tl.tensor,
    g_D: tl.tensor,
    g_start: tl.tensor,
    scratch: tl.tensor,
    length: tl.tensor,
    channels: tl.tensor,
    states: tl.tensor,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
) -> None:
    """Compute all gradients, backwards in time; `g_B`, `g_C`, `g_rates` and `g_D` are in parts.

    The states of a chunk are computed again from the state that `forward` kept, into `scratch`.
    The recurrence is not run backwards, since that would divide by gates.
    """
    batch = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)
    own, used = c < channels, n < states
    inside = own[:, None] & used[None, :]
    place = c[:, None] * states + n[None, :]
    size = channels * states
    rate = tl.load(rates + place, mask=inside, other=0.0)
    direct = tl.load(D + c, mask=own, other=0.0)
    adjoint = tl.load(g_end + batch * size + place, mask=inside, other=0.0)
    of_rate = tl.zeros_like(rate)
    of_direct = tl.zeros_like(direct)
    part = (tl.program_id(1) * tl.num_programs(0) + batch) * length  # of g_B and g_C
    chunks = (length + CHUNK - 1) // CHUNK
    for back in range(chunks):
        chunk = chunks - 1 - back
        first = chunk * CHUNK
        h = tl.load(kept + (batch * chunks + chunk) * size + place, mask=inside, other=0.0)
        for s in range(CHUNK):
            if first + s < length:
                tl.store(scratch + (batch * CHUNK + s) * size + place, h, mask=inside)
                row = batch * length + first + s
                step = tl.load(dt + row * channels + c, mask=own, other=0.0)
                u = tl.load(x + row * channels + c, mask=own, other=0.0)
                b = tl.load(B + row * states + n, mask=used, other=0.0)
                h = tl.exp(-step[:, None] * rate) * h + (step * u)[:, None] * b[None, :]
        tl.debug_barrier()
        for s in range(CHUNK):
            t = first + CHUNK - 1 - s
            if t < length:
                row = batch * length + t
                step = tl.load(dt + row * channels + c, mask=own, other=0.0)
                u = tl.load(x + row * channels + c, mask=own, other=0.0)
                g = tl.load(g_y + row * channels + c, mask=own, other=0.0)
                b = tl.load(B + row * states + n, mask=used, other=0.0)
                read = tl.load(C + row * states + n, mask=used, other=0.0)
                at = (batch * CHUNK + t - first) * size
                before = tl.load(scratch + at + place, mask=inside, other=0.0)
                gate = tl.exp(-step[:, None] * rate)
                after = gate * before + (step * u)[:, None] * b[None, :]
                adjoint += g[:, None] * read[None, :]
                entered = tl.sum(adjoint * b[None, :], 1)
                slope = adjoint * gate * before
                tl.store(g_C + (part + t) * states + n, tl.sum(g[:, None] * after, 0), mask=used)
                of_b = tl.sum(adjoint * (step * u)[:, None], 0)
                tl.store(g_B + (part + t) * states + n, of_b, mask=used)
                tl.store(g_x + row * channels + c, entered * step + direct * g, mask=own)
                of_step = entered * u - tl.sum(slope * rate, 1)
                tl.store(g_dt + row * channels + c, of_step, mask=own)
                of_rate -= slope * step[:, None]
                of_direct += g * u
                adjoint = adjoint * gate
        tl.debug_barrier()
    tl.store(g_rates + batch * size + place, of_rate, mask=inside)
    tl.store(g_D + batch * channels + c, of_direct, mask=own)
    tl.store(g_start + batch * size + place, adjoint, mask=inside)
