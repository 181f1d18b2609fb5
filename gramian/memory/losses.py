"""Compute the losses on memory that training adds to the loss of a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian.filters import Filter
from gramian.memory.hankel import hankel_penalty
from gramian.memory.observation import Observer, some
from gramian.memory.penalties import ess_penalty, gate_regularizer
from gramian.mixers import LinearRecurrence, Mixer

__all__ = ["MemoryLosses"]


class MemoryLosses:
    """A weighted sum of losses on a model's memory: of its last forward pass, and of its filters.

    Args:
        model: A module that contains mixers.
        gates: Weight of `gate_regularizer` on the model's linear recurrences. 0 leaves this loss
            out.
        ess: Weight of `ess_penalty` on the model's mixers. 0 leaves this loss out.
        target: As for `ess_penalty`.
        share: As for `ess_penalty`.
        sequences: Maximal number of sequences of a pass for which `ess_penalty` is computed. By
            default, it is computed for all.
        channels: Maximal number of heads or channels of a layer for which `ess_penalty` is
            computed. By default, it is computed for all.
        hankel: Weight of `hankel_penalty` on the model's filters, over the `max_length` taps of
            each. 0 leaves this loss out.
        hankel_channels: Maximal number of channels of a filter for which `hankel_penalty` is
            computed. If there are more, every n-th is used, beginning at random. None uses all.
        normalize_gates: As `normalize` for `gate_regularizer`.
        gate_layers: Numbers of the layers whose gates `gate_regularizer` reads, as `layers` for
            `Observer`. By default, all linear recurrences are used.

    Raises:
        ValueError: if the model has no mixers or filters for a loss whose weight is positive, if
            `hankel_channels` is below 1, or if a layer in `gate_layers` has no linear recurrence.
    """

    def __init__(
        self,
        model: nn.Module,
        gates: float = 0.0,
        ess: float = 0.0,
        *,
        target: float | None = None,
        share: float | None = None,
        sequences: int | None = None,
        channels: int | None = None,
        hankel: float = 0.0,
        hankel_channels: int | None = 16,
        normalize_gates: bool = True,
        gate_layers: Sequence[int] | None = None,
    ) -> None:
        if hankel_channels is not None and hankel_channels < 1:
            raise ValueError(f"hankel_channels must be at least 1 or None; got {hankel_channels}.")
        self.gates, self.ess, self.hankel = gates, ess, hankel
        self.hankel_channels = hankel_channels
        self.normalize_gates = normalize_gates
        self.filters: list[Filter] = []
        self.goal = {"target": target, "share": share}
        self.most = {"sequences": sequences, "channels": channels}
        self.gated: Observer | None = None
        self.mixing: Observer | None = None
        if gates > 0:
            needed = "gates needs linear recurrences, such as gated_linear_attention"
            _check_any(model, LinearRecurrence, needed)
            self.gated = Observer(model, LinearRecurrence, layers=gate_layers)
        if ess > 0:
            _check_any(model, Mixer, "ess needs mixers")
            self.mixing = Observer(model)
        if hankel > 0:
            self.filters = _filters(model)

    def __call__(self) -> tuple[Tensor, dict[str, float]]:
        """Return the weighted sum, and a mapping from names in logs to the unweighted losses."""
        losses: dict[str, float] = {}
        total: Any = 0.0
        if self.gated is not None:
            loss = gate_regularizer(self.gated.operators(), normalize=self.normalize_gates)
            losses["gate_regularizer"] = loss.item()
            total = total + self.gates * loss
        if self.mixing is not None:
            loss = self._penalty(self.mixing)
            losses["ess_penalty"] = loss.item()
            total = total + self.ess * loss
        if self.filters:
            loss = torch.stack([self._nuclear(filter) for filter in self.filters]).mean()
            losses["hankel_penalty"] = loss.item()
            total = total + self.hankel * loss
        return total, losses

    def _nuclear(self, filter: Filter) -> Tensor:
        """Return the mean of `hankel_penalty` over some channels of a filter."""
        system = filter(filter.max_length)[some(filter.channels, self.hankel_channels)]
        return hankel_penalty(system, filter.max_length)

    def _penalty(self, observer: Observer) -> Tensor:
        """Return the mean penalty over the mixers and the sequences, whose padding is left out."""
        total, sequences = torch.zeros(()), 0
        for system, length, count in observer.sequences(**self.most):
            at = sorted({length * quarter // 4 for quarter in (1, 2, 3)} - {0})
            if at:  # a single token has no past
                penalty = ess_penalty(system, **self.goal, at=at, horizon=length)
                total = total.to(penalty.device) + count * penalty
                sequences += count
        return total / max(sequences, 1)


def _check_any(model: nn.Module, kind: type, needed: str) -> None:
    """Raise a ValueError that says what is needed, unless the model has a module of a class."""
    if not any(isinstance(module, kind) for module in model.modules()):
        raise ValueError(f"{needed}; this model has none.")


def _filters(model: nn.Module) -> list[Filter]:
    """Return the filters of a model that have a Hankel matrix, each once.

    Raises:
        ValueError: if the model has none.
    """
    filters = [module for module in model.modules() if isinstance(module, Filter)]
    filters = [filter for filter in filters if filter.max_length > 1]
    if not filters:
        raise ValueError(
            "hankel needs filters of at least 2 taps, as in long convolutions; this model has none."
        )
    return filters
