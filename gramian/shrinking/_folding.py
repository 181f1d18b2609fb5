"""Build a model with smaller states from a model and the coordinates to keep."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian.shrinking._family import Layer, find_layers
from gramian.shrinking._passes import Importance

__all__ = ["fold"]


@torch.no_grad()
def fold(
    model: Any,
    layers: Sequence[Layer],
    kept: Mapping[str, Tensor],
    importance: Mapping[str, Importance],
) -> tuple[Any, dict[str, Layer]]:
    """Return a model of the same class whose states have only the kept coordinates.

    The model is built from its configuration with the smaller sizes, and loads the cut weights.

    Args:
        model: the model. It stays unchanged.
        layers: the layers to cut.
        kept: indices of the coordinates to keep, (groups, k), by the path of the layer.
        importance: the importance of the states, by the path of the layer. If it has a basis, the
            coordinates are those of the basis, and the states are projected.

    Returns:
        The model, in evaluation mode, and its cut layers by path.

    Raises:
        ValueError: if the model has weights that its configuration does not describe.
    """
    config = copy.deepcopy(model.config)
    for family in dict.fromkeys(layer.family for layer in layers):
        own = [layer for layer in layers if layer.family is family]
        sizes = {layer.index: kept[layer.path].shape[1] for layer in own}
        projected = all(importance[layer.path].basis is not None for layer in own)
        family.set_sizes(config, sizes, {layer.index: layer.module for layer in own}, projected)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in layers:
        for name, tensor in _changes(layer, kept[layer.path], importance[layer.path]).items():
            weights[f"{layer.path}.{name}"] = tensor.detach().clone()
    with torch.random.fork_rng(devices=[]):
        small = type(model)(config)
    unknown = sorted(set(weights) ^ set(small.state_dict()))
    if unknown:
        raise ValueError(
            "shrink needs a model with the weights that its configuration describes, without "
            f"adapters, which can be merged first; got {unknown[0]}."
        )
    small.load_state_dict(weights, assign=True)
    _match_buffers(small, model)
    small.tie_weights()
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(grads.get(name, True))  # maps are new
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        small.generation_config = copy.deepcopy(generation)
    chosen = {layer.path for layer in layers}
    return small.eval(), {x.path: x for x in find_layers(small) if x.path in chosen}


def _changes(layer: Layer, kept: Tensor, importance: Importance) -> dict[str, Tensor]:
    """Return the tensors of a layer that change, by their names."""
    basis = importance.basis
    if basis is None:
        return layer.family.cut(layer.module, kept, importance.energies)
    index = kept.unsqueeze(-1).expand(-1, -1, basis.keys.shape[-1])
    maps = (each.gather(1, index) for each in (basis.keys, basis.queries))
    return layer.family.project(layer.module, *maps)


def _match_buffers(small: nn.Module, model: nn.Module) -> None:
    """Give the buffers that are not saved the dtypes and devices of those in a model."""
    theirs = dict(model.named_buffers())
    for name, buffer in list(small.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(small.get_submodule(owner), leaf, buffer.to(theirs[name]))
