r"""Gramian's own linear recurrences: linear attention, WLA, GLA, GLA-S6, Gated DeltaNet and S6.

Queries and keys are rows of the input projection that pass through a short convolution. S6 has
Mamba's layout. A layer's number of states is the option `state_size` of its mixer, which may differ
between layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from gramian.shrinking._family import Call, Family, Shape, pick, register
from gramian.shrinking._recurrence import Recurrence

_EPSILON = 1e-6


class _Ours(Family):
    """What all families of Gramian's mixers share."""

    per_layer = True

    def shape(self, layer: Any) -> Shape:
        return Shape(layer.heads, layer.state_size, layer.heads * layer.value_width)

    def watch(
        self, layer: Any, inputs: Tensor, visit: Callable[[Call], None]
    ) -> AbstractContextManager[object]:
        visit(self.read(layer, inputs))
        return nullcontext()

    def read(self, layer: Any, x: Tensor) -> Call:
        """Return the recurrence that a layer applies for an input (batch, length, width)."""
        steps, values, _, _ = layer.features(x, None, None)
        mixed = layer.short(layer.in_proj(x)[..., : layer.convolved])[0].to(values.dtype)

        def outputs() -> Tensor:
            memory = values.new_zeros(len(x), layer.heads, layer.state_size, layer.value_width)
            return self.without_skip(steps).run(values, memory)[0]

        return Call(self.recurrence(layer, steps, values, mixed), outputs)

    def without_skip(self, steps: Any) -> Any:
        """Return steps whose outputs are those of the state alone."""
        return steps

    def recurrence(self, layer: Any, steps: Any, values: Tensor, mixed: Tensor) -> Recurrence:
        """Return the recurrence of the steps and the values of `LinearRecurrence.features`.

        Args:
            layer: the layer.
            steps: the steps.
            values: (batch, heads, length, N).
            mixed: the features after the short convolution, (batch, length, convolved).
        """
        raise NotImplementedError

    def set_sizes(
        self,
        config: Any,
        sizes: dict[int, int],
        layers: dict[int, nn.Module],
        projected: bool = False,
    ) -> None:
        given = config.mixers
        entries = list(given) if isinstance(given, list) else [given] * config.num_hidden_layers
        for index, layer in layers.items():
            one = entries[index]
            one = {"type": one} if isinstance(one, str) else dict(one)
            options: Any = layer.config()  # type: ignore[operator]
            if "normalization" in options:  # its default depends on the number of states
                one["normalization"] = options["normalization"]
            if projected:
                one["feature_size"] = layer.feature_size
            entries[index] = one | {"state_size": sizes[index]}
        config.mixers = entries


@register
class GramianAttention(_Ours):
    """Linear attention with and without gates."""

    layers = dict.fromkeys(
        ("LinearAttention", "WeightedLinearAttention", "GatedLinearAttention", "GLAS6"),
        "state_size",
    )
    maps = True

    def commutes(self, layer: Any) -> bool:
        return bool(layer.scalar_gates)

    def recurrence(self, layer: Any, steps: Any, values: Tensor, mixed: Tensor) -> Recurrence:
        coefficients = steps.coefficients()
        query, _ = layer.map_features(*(_heads(mixed, layer, kind) for kind in (0, 1)))
        gates = 1 if layer.scalar_gates else None
        logs = _logarithms(coefficients.A[..., :gates])
        return Recurrence(coefficients.B, query, values, logs, epsilon=layer.norm.eps)

    def cut(self, layer: Any, kept: Tensor, energies: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        n, heads = layer.state_size, layer.heads
        mapped = layer.key_map is not None
        found = {} if mapped else _cut_projection(layer, kept)
        for name, tensor in layer.state_dict().items():
            if name.endswith("_map"):
                index = kept.to(tensor.device).unsqueeze(1).expand(-1, tensor.shape[1], -1)
                found[name] = tensor.gather(2, index)
            elif name == "gate_proj.weight" and len(tensor) == heads * n:
                found[name] = pick(tensor, [n * head for head in range(heads)], n, kept)
            elif name.startswith("dynamics.") and tensor.shape == (heads, n):
                found[name] = tensor.gather(1, kept.to(tensor.device))
        # Queries are divided by the root of the number of features, and outputs are linear in
        # values. Behind maps, the number of features stays.
        for name in () if mapped else ("short.weight", "short.bias"):
            rows = found[name].clone()
            rows[2 * kept.numel() :] *= math.sqrt(kept.shape[1] / n)
            found[name] = rows
        return found

    def project(self, layer: Any, keys: Tensor, queries: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, new in (("key_map", keys), ("query_map", queries)):
            old = getattr(layer, name)
            given = layer.in_proj.weight if old is None else old
            new = new.to(given.device).mT  # (heads, n, r)
            found[name] = (new if old is None else old.to(new.dtype) @ new).to(given.dtype)
        return found


@register
class GramianDelta(_Ours):
    """Gated DeltaNet."""

    layers = {"GatedDeltaNet": "state_size"}  # noqa: RUF012
    note = "Queries and keys are normalized to length 1 over the kept states alone."

    def recurrence(self, layer: Any, steps: Any, values: Tensor, mixed: Tensor) -> Recurrence:
        coefficients = steps.coefficients()
        query, key = (silu(_heads(mixed, layer, kind)) for kind in (0, 1))
        query, key = (
            x * (x.square().sum(-1, keepdim=True) + _EPSILON).rsqrt() for x in (query, key)
        )
        beta = (coefficients.B * key).sum(-1) / key.square().sum(-1).clamp(min=1e-30)
        return Recurrence(
            keys=key,
            queries=query * layer.state_size**-0.5,
            values=values,
            log_decays=_logarithms(coefficients.A[..., :1]),
            rates=beta,
            delta=True,
            epsilon=layer.norm.eps,
        )

    def cut(self, layer: Any, kept: Tensor, energies: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return _cut_projection(layer, kept)

    def scale(self, layer: Any, kept: int) -> float:
        return math.sqrt(kept / layer.state_size)


@register
class GramianS6(_Ours):
    """S6, whose channels share B and C."""

    layers = {"S6": "state_size"}  # noqa: RUF012

    def shape(self, layer: Any) -> Shape:
        return Shape(1, layer.state_size, layer.heads)

    def without_skip(self, steps: Any) -> Any:
        return steps._replace(skip=0 * steps.skip)

    def recurrence(self, layer: Any, steps: Any, values: Tensor, mixed: Tensor) -> Recurrence:
        step = steps.dt.mT  # (batch, channels, length)
        return Recurrence(
            keys=steps.B.unsqueeze(1),
            queries=steps.C.unsqueeze(1),
            values=values,
            log_decays=step.unsqueeze(-1),
            decay_rates=-steps.rates,
            rates=step,
        )

    def cut(self, layer: Any, kept: Tensor, energies: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        n, start = layer.state_size, layer.step_rank
        return {
            "x_proj.weight": pick(layer.x_proj.weight, [start, start + n], n, kept),
            "dynamics.A_log": pick(layer.dynamics.A_log, [0], n, kept, dim=1),
        }


def _logarithms(gates: Tensor) -> Tensor:
    """Return the logarithms of gates; those that have become 0 count as the smallest number."""
    return gates.clamp(min=torch.finfo(gates.dtype).tiny).log()


def _heads(mixed: Tensor, layer: Any, kind: int) -> Tensor:
    """Return the features of queries (kind 0) or keys (kind 1) before the feature map."""
    size = layer.heads * layer.feature_size
    part = mixed[..., kind * size : (kind + 1) * size]
    return part.unflatten(-1, (layer.heads, layer.feature_size)).transpose(1, 2)


def _cut_projection(layer: Any, kept: Tensor) -> dict[str, Tensor]:
    """Cut the queries and keys out of the input projection and the short convolution."""
    starts = [layer.state_size * part for part in range(2 * layer.heads)]
    names = ("in_proj.weight", "short.weight", "short.bias")
    state = layer.state_dict()
    return {
        name: pick(state[name], starts, layer.state_size, kept) for name in names if name in state
    }
