r"""Drop modes of filters that hold little energy, during training.

The kernel of a channel is `h_t = Σ_k m_k(t)` with the modes `m_k(t) = Re(r_k λ_k^{t-1})`, t ≥ 1.
Their inner products over the taps are geometric sums,
`⟨m_k, m_l⟩ = ½ Re Σ_t (r_k r_l (λ_k λ_l)^t + r_k r̄_l (λ_k λ̄_l)^t)`. Modes are dropped in the order
of their energies `⟨m_k, m_k⟩`, the smallest first, as long as the sum of the dropped modes has at
most a given share of the energy of the kernel. So the kernel changes by at most the root of this
share in the relative l2 norm, however the modes overlap.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gramian.filters import ModeFilter, build
from gramian.reduction.basis import geometric_sum, pole_products

__all__ = ["DroppedModes", "mode_filters", "restore_modes", "truncate_modes"]

_ROUNDING = 64 * torch.finfo(torch.float64).eps
"""Rounding errors of a sum of inner products, relative to the sum of their moduli."""


@dataclass(frozen=True)
class DroppedModes:
    """The numbers of modes of a filter before and after a truncation.

    Attributes:
        name: path of the filter in the model.
        before: number of modes of all channels before.
        after: number of modes of all channels after.
    """

    name: str
    before: int
    after: int


def mode_filters(model: nn.Module) -> dict[str, ModeFilter]:
    """Return a mapping from paths to the filters of a model whose modes can be dropped."""
    return {path: one for path, one in model.named_modules() if isinstance(one, ModeFilter)}


@torch.no_grad()
def truncate_modes(
    model: nn.Module, share: float, optimizer: torch.optim.Optimizer | None = None
) -> tuple[DroppedModes, ...]:
    """Drop the weakest modes of the modal filters and S4Ds of a model, in place.

    In every channel, modes are dropped in the order of their energies over the filter's
    `max_length` taps, the smallest first. Together, the dropped modes have at most `share` of the
    energy of the kernel without its direct term. So at least one mode of a channel stays. The
    parameters stay the same objects and get smaller. The configuration of a Gramian model describes
    the smaller filters, so that the model can be saved and loaded.

    Args:
        model: A module that contains `ModalFilter`s or `S4D`s.
        share: The largest share of a kernel's energy that is dropped, at least 0 and below 1.
        optimizer: The optimizer of the model. Tensors in its state that have the shape of a
            parameter are reduced as the parameter is. None if there is none.

    Returns:
        The numbers of modes of every filter.

    Raises:
        ValueError: if `share` is out of range, or if the model has no such filter.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be at least 0 and below 1; got {share!r}.")
    filters = mode_filters(model)
    if not filters:
        raise ValueError(
            f"modes are dropped of modal filters and S4Ds; this {type(model).__name__} has none."
        )
    dropped = []
    for path, filter in filters.items():
        system = filter(1)
        before = int((system.residues != 0).sum())
        kept = _kept(system.poles, system.residues, max(1, filter.max_length - 1), share)
        after = int(kept.sum())
        if after < before:
            shapes = {name: value.shape for name, value in filter.named_parameters()}
            for name, select in filter.keep_modes(kept).items():
                _reduce_state(optimizer, filter.get_parameter(name), shapes[name], select)
        dropped.append(DroppedModes(path, before, after))
    if _is_ours(model):
        _describe(model)
    return tuple(dropped)


def restore_modes(model: Any, folder: str | Path) -> None:
    """Give the filters of a new model the sizes that they have in a folder of the same model.

    Filters whose sizes differ are replaced by new ones, so that the weights in the folder fit.

    Args:
        model: A Gramian model.
        folder: The folder of a checkpoint, whose configuration describes truncated filters.

    Raises:
        TypeError: if the model is not a Gramian model.
    """
    if not _is_ours(model):
        raise TypeError(f"restore_modes takes a Gramian model; got {type(model).__name__}.")
    saved = type(model.config).from_pretrained(folder, local_files_only=True)
    for index, mixer in enumerate(_mixers(model)):
        config = saved.filter_of(index)
        old = getattr(mixer, "filter", None)
        if isinstance(old, ModeFilter) and config is not None:
            new = build(config, channels=old.channels, max_length=old.max_length)
            if new.config() != old.config():
                mixer.filter = new.to(next(old.parameters()).device).train(old.training)
    _describe(model)


def _is_ours(model: Any) -> bool:
    """Return whether the configuration of a model describes the filter of every layer."""
    return hasattr(getattr(model, "config", None), "filter_of")


def _mixers(model: Any) -> list[Any]:
    return [layer.mixer for layer in model.base_model.layers]


def _describe(model: Any) -> None:
    """Make the configuration of a model describe its present filters."""
    configs = [model.config.filter_of(layer) for layer in range(len(_mixers(model)))]
    for layer, mixer in enumerate(_mixers(model)):
        if isinstance(getattr(mixer, "filter", None), ModeFilter):
            configs[layer] = mixer.filter.config()
    if any(config is not None for config in configs):
        model.config.filter = configs


def _kept(poles: Tensor, residues: Tensor, taps: int, share: float) -> Tensor:
    """Choose the modes to keep, (C, m), bool, of modes (C, m) over so many taps."""
    present = residues != 0
    if not present.shape[-1]:
        return present
    r = torch.where(present, residues, 0).to(torch.complex128)
    z = torch.where(present, poles, 0).to(torch.complex128)
    sums = geometric_sum(pole_products(z), taps)  # (2, C, m, m)
    products = pole_products(r) * sums
    inner = products.sum(0).real / 2
    size = products.abs().sum(0) / 2
    order = inner.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, stable=True)

    def sorted_sums(matrix: Tensor) -> Tensor:
        """Return the sums of the leading blocks of a matrix whose modes are sorted, (C, m)."""
        rows = matrix.gather(-2, order.unsqueeze(-1).expand_as(matrix))
        blocks = rows.gather(-1, order.unsqueeze(-2).expand_as(matrix)).cumsum(-1).cumsum(-2)
        return blocks.diagonal(dim1=-2, dim2=-1)

    energy, doubt = sorted_sums(inner), _ROUNDING * sorted_sums(size)
    allowed = share * (energy[:, -1:] - doubt[:, -1:])
    small = (energy + doubt <= allowed) & (allowed > 0)  # false where a sum is not finite
    small[:, -1] = False
    place = torch.arange(1, small.shape[-1] + 1, device=small.device)
    count = (small * place).amax(-1, keepdim=True)  # modes to drop, the weakest first
    rank = order.argsort(dim=-1)
    return present & (rank >= count)


def _reduce_state(
    optimizer: torch.optim.Optimizer | None, parameter: Tensor, shape: torch.Size, select: Any
) -> None:
    """Reduce what an optimizer holds for the entries of a parameter that had the shape `shape`."""
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape:
            state[name] = select(value)
