r"""Linear attention: `S_t = S_{t-1} + k_t v_tᵀ`, `y_t = q_tᵀ S_t` in every head.

These are equations 18–20 of Katharopoulos et al. 2020 with two changes. A norm of the output
replaces the denominator (TransNormer, Qin et al. 2022), and the output has a gate (Gated Linear
Attention, Yang et al. 2024, section 4.4). This mixer is called LA in arXiv 2504.19561. In the
variants of this mixer, gates make the memory decay. The gates are the same for every input
(weighted linear attention, WLA), or they are computed from the input (gated linear attention, GLA).

Linear maps may follow the feature map, `k = Wₖᵀ φ(k')` and `q = W_qᵀ φ(q')`, which make the memory
smaller than the features. If one gate decays the whole memory of a head, the maps of a balanced
truncation (`gramian.shrink` with `projection=True`) give the recurrence of the reduced memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, rms_norm, silu

from gramian._checks import check_divides, check_sizes
from gramian.mixers.linear_recurrence import Coefficients, LinearRecurrence
from gramian.mixers.registry import register
from gramian.systems import working_dtype

__all__ = ["FEATURE_MAPS", "LinearAttention"]

FEATURE_MAPS = {
    "identity": lambda x: x,
    "silu": silu,
    "elu": lambda x: elu(x) + 1,
}
_EPS = 1e-5


@register("linear_attention")
class LinearAttention(LinearRecurrence):
    """Linear attention with a norm in every head and an output gate.

    The output is `y = W (silu(g) ∘ rms(o))`, with `o_t = q_tᵀ S_t` and `S_t = S_{t-1} + k_t v_tᵀ`.
    Queries, keys and values pass through a short convolution. The rows of the input projection
    belong to the queries of all heads, then to all keys, all values, the gates of a variant if it
    has any, and the output gate. Within each of these groups, the heads are in order.

    Args:
        width: Channels of input and output.
        heads: Number of heads.
        state_size: n, the number of features of a query or key behind the feature map and the
            linear map, which is the state size of each column of values (the TSS of the layer); by
            default `width / heads`.
        value_width: N, the number of features of a head's value; by default `width / heads`.
        short_kernel: Taps of the short convolution.
        feature_map: The feature map of queries and keys: "identity", "silu" or "elu" (elu + 1).
        feature_size: The number of features of a query or key before a linear map of every head to
            n numbers; None for n features and no map.

    Raises:
        ValueError: if a number is out of range, or if the feature map is unknown. Also if
            `state_size` or `value_width` is not given and the heads do not divide the width.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        state_size: int | None = None,
        value_width: int | None = None,
        *,
        short_kernel: int = 3,
        feature_map: str = "identity",
        feature_size: int | None = None,
    ) -> None:
        sizes = state_size, value_width, feature_size
        self._build(width, heads, sizes, short_kernel, feature_map, 0)

    def _build(
        self,
        width: int,
        heads: int,
        sizes: tuple[int | None, int | None, int | None],
        short_kernel: int,
        feature_map: str,
        gates: int,
    ) -> None:
        """Construct the modules.

        The arguments are the same as in the class.

        Args:
            sizes: `state_size`, `value_width` and `feature_size` of the class.
            gates: Number of features of the input projection from which a variant computes gates.
        """
        state_size, value_width, feature_size = sizes
        check_sizes(width=width, heads=heads)
        if state_size is None or value_width is None:
            check_divides("heads", heads, width)
        state_size = width // heads if state_size is None else state_size
        value_width = width // heads if value_width is None else value_width
        features = state_size if feature_size is None else feature_size
        check_sizes(state_size=state_size, value_width=value_width, feature_size=features)
        if feature_map not in FEATURE_MAPS:
            raise ValueError(
                f"feature_map must be one of {', '.join(map(repr, FEATURE_MAPS))}; got "
                f"{feature_map!r}."
            )
        inner = heads * value_width
        super().__init__(
            width,
            heads,
            state_size,
            value_width,
            convolved=2 * heads * features + inner,
            others=gates + inner,
            inner=inner,
            short_kernel=short_kernel,
        )
        self.feature_map = feature_map
        self.gate_features = gates
        self.norm = _HeadNorm(value_width, eps=_EPS)
        self.feature_size = features
        self.key_map = self.query_map = None
        if feature_size is not None:
            self.key_map = nn.Parameter(torch.empty(heads, features, state_size))
            self.query_map = nn.Parameter(torch.empty(heads, features, state_size))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the maps of keys and queries to one orthogonal projection, drawn for each head."""
        if self.key_map is not None and self.query_map is not None:
            single = torch.empty_like(self.key_map, dtype=torch.float32, requires_grad=False)
            for head in single:  # half precision has no QR decomposition
                nn.init.orthogonal_(head)
            self.key_map.detach().copy_(single)
            self.query_map.detach().copy_(single)

    @property
    def scalar_gates(self) -> bool:
        """Whether the memory of a head is multiplied by one number in each step.

        Then it may have any basis: a change of basis of keys and queries changes nothing.
        """
        return True

    @classmethod
    def splits_width(cls, options: Mapping[str, Any]) -> bool:
        return not {"state_size", "value_width"} <= set(options)

    def config(self) -> dict[str, Any]:
        own = {"heads": self.heads, "value_width": self.value_width}
        mapped = None if self.key_map is None else self.feature_size
        features = {"feature_map": self.feature_map, "feature_size": mapped}
        return super().config() | own | features

    def _gates(self, features: Tensor) -> Tensor:
        """Return the gates a_t from their features (batch, length, gate features).

        The gates broadcast to (batch, heads, length, n).
        """
        return features.new_ones((), dtype=working_dtype(features))

    def _qkv(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys (batch, heads, length, features), and values with N features.

        The results are in float32, or in float64 if `mixed` is in float64.
        """
        n, N = self.heads * self.feature_size, self.heads * self.value_width
        heads = (
            part.to(working_dtype(mixed)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in mixed.split((n, n, N), dim=-1)
        )
        q, k, v = heads
        return q, k, v

    def map_features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries and keys of the memory, (batch, heads, length, n).

        They are the features behind the linear maps, if there are any. Features of queries are
        divided by the root of their number.
        """
        phi = FEATURE_MAPS[self.feature_map]
        q, k = phi(q) * self.feature_size**-0.5, phi(k)
        if self.key_map is None or self.query_map is None:
            return q, k
        return q @ self.query_map.to(q.dtype), k @ self.key_map.to(k.dtype)

    def _read(self, mixed: Tensor, rest: Tensor) -> tuple[Coefficients, Tensor]:
        q, k, v = self._qkv(mixed)
        q, k = self.map_features(q, k)
        a = self._gates(rest[..., : self.gate_features]).expand_as(k)
        return Coefficients(a, k, a * q, (q * k).sum(-1)), v

    def _write(self, y: Tensor, rest: Tensor) -> Tensor:
        y = self.norm(y)
        gate = rest[..., self.gate_features :].to(y.dtype)
        return y.transpose(1, 2).flatten(-2) * silu(gate)


class _HeadNorm(nn.RMSNorm):
    """An RMS norm that computes in the dtype of its input, even if its weight has another dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def powered_sigmoid(logits: Tensor, temperature: float) -> Tensor:
    """Return `σ(logits)^(1 / temperature)` in (0, 1), which is near 1 for a high temperature."""
    return torch.exp(nn.functional.logsigmoid(logits) / temperature)
