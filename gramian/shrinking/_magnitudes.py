"""Measure the weights of every coordinate of a state: what a layer loses that is cut without it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from gramian.shrinking._family import Layer

__all__ = ["magnitudes"]


@torch.no_grad()
def magnitudes(layer: Layer, energies: tuple[Tensor, Tensor]) -> Tensor:
    """Return the sum of squares of the weights of every coordinate, up to a constant of each group.

    The family's own cut says which weights those are. Each coordinate is kept alone, so the sums
    differ by what belongs to it.

    Args:
        layer: the layer.
        energies: mean squares of the keys and of the queries on the text, (groups, n) each.

    Returns:
        (groups, n), in double precision.
    """
    groups, n = layer.shape.groups, layer.shape.states
    kept = torch.zeros(groups, 1, dtype=torch.long)
    thin = copy.deepcopy(layer.module)
    for name, cut in layer.family.cut(layer.module, kept, energies).items():
        _compress(thin, name, cut)

    def size() -> float:
        cut = layer.family.cut(thin, kept, energies)
        return sum(float(tensor.double().square().sum()) for tensor in cut.values())

    found = torch.zeros(groups, n, dtype=torch.float64)
    for group in range(groups):
        for j in range(n):
            kept[group] = j
            found[group, j] = size()
        kept[group] = 0
    return found


def _compress(module: nn.Module, name: str, cut: Tensor) -> None:
    """Replace the dimensions of a tensor behind the one that is cut by their norm."""
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(module.get_submodule(owner), leaf)
    last = max((d for d in range(tensor.ndim) if tensor.shape[d] != cut.shape[d]), default=-1)
    behind = tuple(range(last + 1, tensor.ndim))
    if last >= 0 and behind:
        tensor.data = tensor.double().norm(dim=behind, keepdim=True)
