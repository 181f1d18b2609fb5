"""Build the norms of `"mlp"` blocks, and the norm after the last block, from their names.

`GramianConfig` uses the same names. `"rms"` is `w x / √(mean(x²) + ε)`. `"rms_plus_eps"` is
StripedHyena's `w x / (√mean(x²) + ε)`; the two differ for small activations. `"layer"` is PyTorch's
layer norm, with a bias. `"none"` is the identity.
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
        eps: the number ε, which is added to the root.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (…, width) and return a tensor of its shape and dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        root = norm * (1 / math.sqrt(x.shape[-1])) + self.eps
        return self.weight * (wide / root).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def make_norm(kind: str, width: int, eps: float) -> nn.Module:
    """Build the norm with the name `kind`, for vectors of `width` features."""
    if kind == "none":
        return nn.Identity()
    kinds = {"rms": nn.RMSNorm, "rms_plus_eps": PlusEpsRMSNorm, "layer": nn.LayerNorm}
    return kinds[kind](width, eps=eps)


def apply_norm(norm: nn.Module, hidden_states: Tensor) -> Tensor:
    """Cast a residual stream to the dtype of a norm's weight, and apply the norm."""
    weight = getattr(norm, "weight", hidden_states)  # the identity has none
    return norm(hidden_states.to(weight.dtype))
