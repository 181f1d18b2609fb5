"""The norms of `"mlp"` blocks and after the last block, by the names that `GramianConfig` knows.

`"rms"` is `w x / √(mean(x²) + ε)`; `"rms_plus_eps"` is StripedHyena's `w x / (√mean(x²) + ε)`,
which differs where activations are small; `"layer"` is PyTorch's, with a bias; `"none"` is the
identity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

NORMS = ("rms", "rms_plus_eps", "layer")
"""The norms that have weights."""

FINAL_NORMS = (*NORMS, "none")
"""The norms that may follow the last block."""


class PlusEpsRMSNorm(nn.Module):
    """The norm `w x / (√mean(x²) + ε)` over the last dimension.

    Args:
        width: size of the last dimension.
        eps: ε.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, width) to the same shape."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        root = norm * (1 / math.sqrt(x.shape[-1])) + self.eps
        return self.weight * (wide / root).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def make_norm(kind: str, width: int, eps: float) -> nn.Module:
    """Build the norm `kind` of `width` features."""
    if kind == "none":
        return nn.Identity()
    kinds = {"rms": nn.RMSNorm, "rms_plus_eps": PlusEpsRMSNorm, "layer": nn.LayerNorm}
    return kinds[kind](width, eps=eps)


def apply_norm(norm: nn.Module, hidden_states: Tensor) -> Tensor:
    """Apply a norm in its own precision to a residual stream, whose precision may be higher."""
    weight = getattr(norm, "weight", hidden_states)  # the identity has none
    return norm(hidden_states.to(weight.dtype))
