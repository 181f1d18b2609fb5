r"""Mamba (Gu and Dao 2023): `S_t = exp(Δ_t A) S_{t-1} + Δ_t B_t u_t`, `y_t = C_t · S_t + D u_t`.

Every channel has n states, and all channels share B and C, which are rows of `x_proj`. A coordinate
also has a rate for every channel, a column of `A_log`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from gramian.shrinking._families._scans import state_outputs, time_steps, watch_scan
from gramian.shrinking._family import Call, Family, Shape, pick, register
from gramian.shrinking._recurrence import Recurrence


@register
class Mamba(Family):
    """Mamba's layers in transformers."""

    layers = {"MambaMixer": "state_size"}  # noqa: RUF012 (families are not dataclasses)
    fused = ("out_proj",)

    def shape(self, layer: Any) -> Shape:
        return Shape(1, layer.ssm_state_size, layer.intermediate_size)

    def watch(
        self, layer: Any, inputs: Tensor, visit: Callable[[Call], None]
    ) -> AbstractContextManager[object]:
        return watch_scan(layer, "mamba_selective_scan", _read, visit)

    def cut(self, layer: Any, kept: Tensor, energies: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        n, start = layer.ssm_state_size, layer.time_step_rank
        return {
            "x_proj.weight": pick(layer.x_proj.weight, [start, start + n], n, kept),
            "A_log": pick(layer.A_log, [0], n, kept, dim=1),
        }


@register
class NormalizedMamba(Mamba):
    """Mamba with RMS norms of B and C over the states, without weights (Falcon-Mamba)."""

    layers = {"FalconMambaMixer": "state_size"}  # noqa: RUF012
    note = "Norms of B and C now average over the kept states alone, which rescales both."


@register
class WeightedMamba(NormalizedMamba):
    """Mamba with RMS norms of B and C over the states, whose weights take a constant (Jamba).

    The norm of the kept coordinates divides by their own root mean square. So the weights are
    multiplied by that root mean square of the normalized coordinates, averaged over the text.
    """

    layers = {"JambaMambaMixer": "mamba_d_state"}  # noqa: RUF012
    note = (
        "Norms of B and C now average over the kept states alone; their weights hold the mean of "
        "the rescaling, and the rest varies with the token."
    )

    def cut(self, layer: Any, kept: Tensor, energies: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        found = super().cut(layer, kept, energies)
        for name, energy in zip(("b_layernorm", "c_layernorm"), energies, strict=True):
            weight = getattr(layer, name).weight
            squares = energy[0].to(weight.device) / weight.double().square().clamp(min=1e-12)
            of_kept = squares[kept[0].to(weight.device)].mean().sqrt()
            found[f"{name}.weight"] = (pick(weight, [0], len(weight), kept) * of_kept).to(weight)
        return found


@register
class MambaHeads(Mamba):
    """Mamba in heads, each with its own B and C (Zamba). Every head calls its own scan."""

    layers = {"ZambaMambaMixer": "mamba_d_state"}  # noqa: RUF012

    def shape(self, layer: Any) -> Shape:
        return Shape(layer.n_mamba_heads, layer.ssm_state_size, layer.intermediate_size)

    def cut(self, layer: Any, kept: Tensor, energies: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        n, start = layer.ssm_state_size, layer.time_step_rank
        heads = range(layer.n_mamba_heads)
        rows = [pick(layer.x_proj_weight[h], [start, start + n], n, kept[h : h + 1]) for h in heads]
        rates = [pick(layer.A_log[h], [0], n, kept[h : h + 1], dim=1) for h in heads]
        return {"x_proj_weight": torch.stack(rows), "A_log": torch.stack(rates)}


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
    """Read the scan. Values and steps are (batch, channels, L), B and C are (batch, n, L)."""
    bias = options.get("delta_bias")
    bias = None if bias is None else bias[:, None]
    step = time_steps(dt, bias, options.get("delta_softplus", False))
    recurrence = Recurrence(
        keys=B.mT.unsqueeze(1),
        queries=C.mT.unsqueeze(1),
        values=hidden_states.unsqueeze(-1),
        log_decays=step.unsqueeze(-1),
        decay_rates=A,
        rates=step,
    )
    return Call(recurrence, state_outputs(scan, hidden_states, dt, A, B, C, **options))
