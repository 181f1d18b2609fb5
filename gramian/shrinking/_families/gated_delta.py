r"""Gated DeltaNet (Yang et al. 2024): `S_t = α_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ`.

The outputs are `y_t = S_tᵀ q_t / √n`. Queries and keys are normalized to length 1 in the scan, and
a norm of every head follows. Without some coordinates, keys and queries become unit vectors of the
other coordinates. So the layer also erases and stores along other directions, and the error that
the Gram matrix predicts is not that of the smaller layer. The norm behind the scan removes changes
of the length of queries and of the factor 1/√n, up to the number that it adds to the mean square.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gramian.shrinking._families._scans import watch_scan
from gramian.shrinking._family import Call, Family, Shape, pick, register
from gramian.shrinking._recurrence import Recurrence

_EPSILON = 1e-6


@register
class GatedDelta(Family):
    """Layers of transformers with the gated delta rule."""

    layers = {  # noqa: RUF012 (families are not dataclasses)
        "Qwen3NextGatedDeltaNet": "linear_key_head_dim",
        "Qwen3_5GatedDeltaNet": "linear_key_head_dim",
        "Qwen3_5MoeGatedDeltaNet": "linear_key_head_dim",
        "Qwen4ExpTextGatedDeltaNet": "linear_key_head_dim",
        "OlmoHybridGatedDeltaNet": "linear_key_head_dim",
    }
    multiple = 16  # the smallest matrix product of the kernels
    note = "Queries and keys are normalized to length 1 over the kept states alone."

    def shape(self, layer: Any) -> Shape:
        return Shape(layer.num_k_heads, layer.head_k_dim, layer.num_v_heads * layer.head_v_dim)

    def watch(
        self, layer: Any, inputs: Tensor, visit: Callable[[Call], None]
    ) -> AbstractContextManager[object]:
        norm = layer.o_norm if hasattr(layer, "o_norm") else layer.norm
        read = partial(_read, norm.variance_epsilon)
        return watch_scan(layer, "torch_chunk_gated_delta_rule", read, visit)

    def cut(self, layer: Any, kept: Tensor, energies: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        n, heads = layer.head_k_dim, layer.num_k_heads
        both = [n * part for part in range(2 * heads)]
        found = {"conv1d.weight": pick(layer.conv1d.weight, both, n, kept)}
        if hasattr(layer, "in_proj_qkvz"):  # rows of q, k, v and z for one head after the other
            rows = layer.in_proj_qkvz.weight.unflatten(0, (heads, -1))
            cut = [pick(rows[h], [0, n], n, kept[h : h + 1]) for h in range(heads)]
            found["in_proj_qkvz.weight"] = torch.cat(cut)
        elif hasattr(layer, "in_proj_qkv"):
            found["in_proj_qkv.weight"] = pick(layer.in_proj_qkv.weight, both, n, kept)
        else:
            for name in ("q_proj", "k_proj"):
                weight = getattr(layer, name).weight
                found[f"{name}.weight"] = pick(weight, both[:heads], n, kept)
        return found

    def scale(self, layer: Any, kept: int) -> float:
        return math.sqrt(kept / layer.head_k_dim)


def _read(
    epsilon: float,
    scan: Callable[..., Any],
    result: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    **options: Any,
) -> Call:
    """Read the scan. Tensors are (batch, L, heads, …)."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    q, k = (x.to(dtype).transpose(1, 2) for x in (query, key))
    if options.get("use_qk_l2norm_in_kernel"):
        q, k = (x * (x.square().sum(-1, keepdim=True) + _EPSILON).rsqrt() for x in (q, k))
    recurrence = Recurrence(
        keys=k,
        queries=q * q.shape[-1] ** -0.5,
        values=value.transpose(1, 2),
        log_decays=g.to(dtype).mT.unsqueeze(-1),
        rates=beta.mT,
        delta=True,
        epsilon=epsilon,
    )
    return Call(recurrence, lambda: result[0])
