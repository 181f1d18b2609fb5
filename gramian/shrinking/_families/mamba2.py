r"""Mamba2 (Dao and Gu 2024): `S_t = exp(Δ_t a) S_{t-1} + Δ_t B_t u_tᵀ`, `y_t = S_tᵀ C_t + D u_t`.

B and C are rows of the input projection, and pass through the short convolution. All heads of a
group share them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from gramian.shrinking._families._scans import state_outputs, time_steps, watch_scan
from gramian.shrinking._family import Call, Family, Shape, pick, register
from gramian.shrinking._recurrence import Recurrence


@register
class Mamba2(Family):
    """Mamba2's layers in transformers, alone and in hybrid models."""

    layers = {  # noqa: RUF012 (families are not dataclasses)
        "Mamba2Mixer": "state_size",
        "BambaMixer": "mamba_d_state",
        "FalconH1Mixer": "mamba_d_state",
        "GraniteMoeHybridMambaLayer": "mamba_d_state",
        "NemotronHMamba2Mixer": "ssm_state_size",
        "Zamba2MambaMixer": "mamba_d_state",
    }
    multiple = 8  # channels of the convolution's kernel
    fused = ("out_proj",)

    def shape(self, layer: Any) -> Shape:
        return Shape(layer.n_groups, layer.ssm_state_size, layer.num_heads * layer.head_dim)

    def commutes(self, layer: Any) -> bool:
        return True

    def watch(
        self, layer: Any, inputs: Tensor, visit: Callable[[Call], None]
    ) -> AbstractContextManager[object]:
        return watch_scan(layer, "mamba2_chunk_scan", _read, visit)

    def cut(self, layer: Any, kept: Tensor, energies: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        n, groups = layer.ssm_state_size, layer.n_groups
        convolved = [layer.intermediate_size + n * part for part in range(2 * groups)]
        before = layer.in_proj.out_features - layer.num_heads - layer.conv_dim
        starts = {"in_proj": [before + start for start in convolved], "conv1d": convolved}
        return {
            f"{name}.{key}": pick(tensor, starts[name], n, kept)
            for name in starts
            for key, tensor in getattr(layer, name).state_dict().items()
        }


def _read(
    scan: Callable[..., Any],
    result: Any,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    **options: Any,
) -> Call:
    """Read the scan. Values are (batch, L, heads, N), B and C are (batch, L, groups, n)."""
    step = time_steps(dt, options.get("dt_bias"), options.get("dt_softplus", False))
    low, high = options.get("dt_limit", (0.0, float("inf")))
    step = step.clamp(low, high).mT  # (batch, heads, L)
    recurrence = Recurrence(
        keys=B.transpose(1, 2),
        queries=C.transpose(1, 2),
        values=hidden_states.transpose(1, 2),
        log_decays=(A.to(step.dtype)[:, None] * step).unsqueeze(-1),
        rates=step,
    )
    return Call(recurrence, state_outputs(scan, hidden_states, dt, A, B, C, **options))
