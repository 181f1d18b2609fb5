"""Parameter groups for an optimizer, from the hints of filters and common practice."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gramian._checks import check_not_negative
from gramian.filters._filter import Filter

__all__ = ["parameter_groups"]


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, *, decay_all: bool = False
) -> list[dict[str, Any]]:
    """Make parameter groups for `torch.optim.AdamW` and similar optimizers, from any module.

    The module may or may not contain filters of this library. Every trainable parameter is in
    exactly one group. Parameters with equal options share a group, and a parameter that is used in
    several places counts once. The options in `Filter.optimizer_hints` are absolute values, not
    factors. Other parameters have weight decay. By default, the exceptions are parameters with
    fewer than two dimensions (biases and norms), embeddings, and parameters that are tied to an
    embedding.

    Args:
        model: Any module. Parameters that do not require gradients are left out.
        lr: The learning rate of parameters without a hint.
        weight_decay: The weight decay of parameters without a hint, if they are decayed at all.
        decay_all: Whether these exceptions have weight decay too, as they have in
            `torch.optim.AdamW` without groups, and in the published code of Hyena, RTF and Zoology.

    Returns:
        Dicts with `params`, `lr`, `weight_decay` and further options of the hints, in the
        order of `model.parameters()`. Schedulers of torch scale the `lr` of each group.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: if `lr` or `weight_decay` is not a finite number of at least 0, if a filter
            gives a hint for a parameter that it does not have, or if two filters that share a
            parameter give different hints for it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"parameter_groups takes a module; got {type(model).__name__}.")
    check_not_negative(lr=lr, weight_decay=weight_decay)

    hints: dict[nn.Parameter, dict[str, float]] = {}
    embeddings: set[Tensor] = set()
    for path, module in model.named_modules():
        if isinstance(module, Filter):
            _collect(hints, path, module)
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            embeddings.add(module.weight)

    groups: dict[tuple[tuple[str, float], ...], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decayed = decay_all or (parameter.ndim > 1 and parameter not in embeddings)
            options = {"lr": lr, "weight_decay": weight_decay if decayed else 0.0}
            options |= hints.get(parameter, {})
            groups.setdefault(tuple(sorted(options.items())), []).append(parameter)
    return [{"params": members, **dict(options)} for options, members in groups.items()]


def _collect(hints: dict[nn.Parameter, dict[str, float]], path: str, filter: Filter) -> None:
    parameters = dict(filter.named_parameters(remove_duplicate=False))
    for name, options in filter.optimizer_hints().items():
        place = f"{path}.{name}".lstrip(".")
        if name not in parameters:
            raise ValueError(
                f"{type(filter).__name__} gives an optimizer hint for {place}, a parameter that it "
                "does not have."
            )
        if hints.setdefault(parameters[name], options) != options:
            raise ValueError(f"two filters give different optimizer hints for {place}, shared.")
