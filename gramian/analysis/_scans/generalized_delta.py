r"""Read delta rules that erase along other vectors than the keys.

`S_t = (diag(e^{g_t}) + b_t a_tᵀ) S_{t-1} + k_t u_tᵀ` and `y_t = scale · S_tᵀ q_t`. RWKV-7 (Peng et
al. 2025) and Comba (Hu et al. 2025) are of this form.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gramian.analysis._scans._heads import decays, of_heads, unit
from gramian.analysis._scans._reading import ScanReading, heads_first, of_state, register
from gramian.systems import System


@register("chunk_dplr_delta_rule", "fused_recurrent_dplr_delta_rule")
def diagonal_plus_low_rank(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor | None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    **options: Any,
) -> ScanReading:
    """Return the reading of the delta rule with general vectors and gates.

    Args:
        q: The queries, (batch, L, groups, n).
        k: The keys, (batch, L, groups, n).
        v: The values, (batch, L, heads, N).
        a: What the correction reads, (batch, L, groups, n).
        b: What the correction writes, (batch, L, groups, n).
        gk: Logarithms of the gates, (batch, L, heads, n); None if all gates are 1.
        scale: The factor of the outputs, by default n^(-1/2).
        initial_state: (batch, heads, n, N); None if it is zero.
        **options: Further options, as in `of_heads`.
    """
    heads = v.shape[2]
    factor = k.shape[-1] ** -0.5 if scale is None else float(scale)
    decay = decays(gk, v)

    def system(channels: slice) -> System:
        inputs, outputs, read, write = (heads_first(x, heads, channels) for x in (k, q, a, b))
        return of_state(decay(channels), inputs, factor * outputs, p=write, q=read)

    return of_heads(system, v, initial_state=initial_state, **options)


@register("chunk_iplr_delta_rule", "fused_recurrent_iplr_delta_rule")
def identity_plus_low_rank(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, *args: Any, **kwargs: Any
) -> ScanReading:
    """Return the reading of the delta rule with general vectors and no gates.

    Args:
        q: The queries, (batch, L, heads, n).
        k: The keys, (batch, L, heads, n).
        v: The values, (batch, L, heads, N).
        a: What the correction reads, (batch, L, heads, n).
        b: What the correction writes, (batch, L, heads, n).
        *args: Further arguments, as in `diagonal_plus_low_rank`.
        **kwargs: Further arguments, as in `diagonal_plus_low_rank`.
    """
    return diagonal_plus_low_rank(q, k, v, a, b, None, *args, **kwargs)


@register("chunk_rwkv7")
def rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = 1.0,
    **options: Any,
) -> ScanReading:
    """Return the reading of RWKV-7.

    Args:
        r: The receptances, (batch, L, heads, n).
        w: Logarithms of the gates, (batch, L, heads, n).
        k: The keys, (batch, L, heads, n).
        v: The values, (batch, L, heads, N).
        a: What the correction reads, (batch, L, heads, n).
        b: What the correction writes, (batch, L, heads, n).
        scale: The factor of the outputs; n^(-1/2) if it is None.
        **options: Further arguments, as in `diagonal_plus_low_rank`.
    """
    return diagonal_plus_low_rank(r, k, v, a, b, w, scale, **options)


@register("fused_recurrent_rwkv7")
def recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = None,
    **options: Any,
) -> ScanReading:
    """Return the reading of RWKV-7 in its recurrent form, whose scale is n^(-1/2) by default.

    Args:
        r: The receptances, (batch, L, heads, n).
        w: Logarithms of the gates, (batch, L, heads, n).
        k: The keys, (batch, L, heads, n).
        v: The values, (batch, L, heads, N).
        a: What the correction reads, (batch, L, heads, n).
        b: What the correction writes, (batch, L, heads, n).
        scale: The factor of the outputs, by default n^(-1/2).
        **options: Further arguments, as in `diagonal_plus_low_rank`.
    """
    return diagonal_plus_low_rank(r, k, v, a, b, w, scale, **options)


@register("fused_mul_recurrent_rwkv7")
def multiplied_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kk: Tensor,
    a: Tensor,
    scale: float | None = 1.0,
    **options: Any,
) -> ScanReading:
    """Return the reading of RWKV-7 with the keys that it erases and their rates.

    Args:
        r: The receptances, (batch, L, heads, n).
        w: Logarithms of the gates, (batch, L, heads, n).
        k: The keys, (batch, L, heads, n).
        v: The values, (batch, L, heads, N).
        kk: The keys that are erased, (batch, L, heads, n).
        a: The rates at which they are erased, (batch, L, heads, n).
        scale: The factor of the outputs; n^(-1/2) if it is None.
        **options: Further arguments, as in `diagonal_plus_low_rank`.
    """
    write = kk.double() * a.double()
    return diagonal_plus_low_rank(r, k, v, -kk, write, w, scale, **options)


@register("chunk_comba")
def comba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **options: Any,
) -> ScanReading:
    """Return the reading of Comba, `S_t = (e^{g_t} I - β_t k_t p_tᵀ) S_{t-1} + β_t k_t u_tᵀ`.

    Args:
        q: The queries, (batch, L, key heads, n).
        k: The keys, (batch, L, key heads, n).
        v: The values, (batch, L, heads, N).
        p: The keys that are erased, (batch, L, key heads, n).
        g: Logarithms of the gates, (batch, L, heads).
        beta: The factors β, (batch, L, heads); 1 if they are None.
        scale: The factor of the outputs, by default n^(-1/2).
        initial_state: (batch, heads, n, N); None if it is zero.
        output_final_state: Whether the scan also returns its last state.
        use_qk_l2norm_in_kernel: Whether the scan normalizes queries and both keys.
        **options: Further options, as in `of_heads`.
    """
    if use_qk_l2norm_in_kernel:
        q, k, p = (unit(x.double()) for x in (q, k, p))
    write = k.double().repeat_interleave(v.shape[2] // k.shape[2], dim=2)
    if beta is not None:
        write = write * beta.double().unsqueeze(-1)
    return diagonal_plus_low_rank(
        q, write, v, p, -write, g, scale, initial_state=initial_state, **options
    )


@register("fused_recurrent_comba")
def recurrent_comba(
    q: Tensor, k: Tensor, p: Tensor, v: Tensor, *args: Any, **kwargs: Any
) -> ScanReading:
    """Return the reading of Comba in its recurrent form, whose values come after the erased keys.

    Args:
        q: The queries, (batch, L, key heads, n).
        k: The keys, (batch, L, key heads, n).
        p: The keys that are erased, (batch, L, key heads, n).
        v: The values, (batch, L, heads, N).
        *args: Further arguments, as in `comba`.
        **kwargs: Further arguments, as in `comba`.
    """
    return comba(q, k, v, p, *args, **kwargs)
