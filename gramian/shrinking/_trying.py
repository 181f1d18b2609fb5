"""Build smaller models by several criteria, and take the best of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gramian.shrinking._choosing import Choices, Plan, count_within
from gramian.shrinking._family import Layer
from gramian.shrinking._folding import fold
from gramian.shrinking._passes import Scores, window_scores
from gramian.shrinking._report import ShrinkTrial, relative_increase
from gramian.shrinking._texts import Windows

__all__ = ["MEASURES", "Run", "Small", "search"]

MEASURES = ("loss", "accuracy")
"""What criteria can be chosen by."""


@dataclass(frozen=True)
class Small:
    """A smaller model.

    Attributes:
        model: the model.
        layers: its cut layers, by path.
        kept: the coordinates that were kept, (groups, k), by path.
        criterion: how they were chosen.
        criteria: the loss of every criterion on the first windows to choose by, or the share of
            wrong tokens there, the best criterion first.
    """

    model: Any
    layers: Mapping[str, Layer]
    kept: Mapping[str, Tensor]
    criterion: str
    criteria: Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """What all sizes of one model share.

    Attributes:
        model: the model.
        layers: its layers.
        choices: the sizes and coordinates that can be chosen.
        first: the first of the windows to choose by, on which all criteria are compared.
        chosen_by: the windows to choose by, on which criteria with close accuracies are compared.
        held_out: windows on which losses are measured.
        measure_by: "loss" or "accuracy", by which criteria are compared.
        scores: what was measured on either, by the windows and the coordinates.
    """

    model: Any
    layers: Sequence[Layer]
    choices: Choices
    first: Windows
    chosen_by: Windows
    held_out: Windows
    measure_by: str = "loss"
    scores: dict[tuple[str, ...], Scores] = field(default_factory=dict)

    def shrink(self, plan: Plan) -> Small:
        """Return the model with the sizes of a plan, by the best criterion."""
        return self.several(plan, 1)[0]

    def several(self, plan: Plan, count: int) -> list[Small]:
        """Return the models of the best criteria, which keep different coordinates, best first.

        Few answers cannot tell close accuracies apart. So criteria that are close to the best one
        on the first windows are compared again on all windows to choose by.
        """
        candidates = self.choices.candidates(plan)
        built: dict[str, Any] = {}
        scores = self._compare(candidates, list(candidates), "first", count, built)
        ranks = {name: one.rank(self.measure_by) for name, one in scores.items()}
        order = sorted(ranks, key=ranks.__getitem__)
        criteria = {name: ranks[name][0] for name in order}
        close = [name for name in order if scores[name].is_close_to(scores[order[0]])]
        alike = all(self._same(candidates[name], candidates[close[0]]) for name in close)
        if self.measure_by == "accuracy" and not alike and len(self.first) < len(self.chosen_by):
            again = self._compare(candidates, close, "chosen_by", count, built)
            close.sort(key=lambda name: again[name].rank(self.measure_by))
            order = close + [name for name in order if name not in close]
            criteria = {name: criteria[name] for name in order}
        found: list[Small] = []
        for name in order:
            kept = candidates[name]
            if len(found) < count and not any(self._same(kept, one.kept) for one in found):
                model, layers = built.get(name) or self._fold(kept)
                found.append(Small(model, layers, kept, name, criteria))
        return found

    def _compare(
        self,
        candidates: Mapping[str, Mapping[str, Tensor]],
        names: Sequence[str],
        windows: str,
        count: int,
        built: dict[str, Any],
    ) -> dict[str, Scores]:
        """Return the scores of some criteria, by name.

        Args:
            candidates: the coordinates of every criterion, by its name and the layer's path.
            names: the criteria.
            windows: "first" or "chosen_by".
            count: number of models to hold.
            built: models and layers that were built before, by criterion. It then holds those of
                the best of these criteria.
        """
        scores: dict[str, Scores] = {}
        for name in names:
            small, scores[name] = self.measure(candidates[name], windows, built.get(name))
            if small is not None:
                built[name] = small
            ranks = {name: one.rank(self.measure_by) for name, one in scores.items()}
            for worst in sorted(built.keys() & ranks, key=ranks.__getitem__)[count:]:
                del built[worst]
        return scores

    def measure(
        self, kept: Mapping[str, Tensor], windows: str, small: Any = None
    ) -> tuple[Any, Scores]:
        """Return the model with some coordinates, and its scores on windows.

        Scores are measured once. The model is None if they are known.

        Args:
            kept: the coordinates, by path.
            windows: "first", "chosen_by" or "held_out".
            small: the model and its layers, if it was built before.
        """
        key = (windows, *(str(kept[layer.path].tolist()) for layer in self.layers))
        if key in self.scores:
            return None, self.scores[key]
        if small is None:
            small = self._fold(kept)
        self.scores[key] = window_scores(small[0], getattr(self, windows))
        return small, self.scores[key]

    def _fold(self, kept: Mapping[str, Tensor]) -> tuple[Any, dict[str, Layer]]:
        return fold(self.model, self.layers, kept, self.choices.importance)

    def _same(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
        return all(one[x.path].equal(other[x.path]) for x in self.layers)


def search(
    run: Run, per_layer: bool, max_increase: float, before: Tensor, trials: list[ShrinkTrial]
) -> Plan:
    """Return the plan of the smallest model within the budget that the search finds.

    Args:
        run: the run.
        per_layer: whether layers may have different sizes.
        max_increase: largest increase of the loss, relative to that of the model.
        before: losses of the model on the held-out windows.
        trials: the list to which sizes that were tried with all criteria are added.

    Raises:
        ValueError: if no smaller size is within the budget.
    """
    plans = run.choices.plans(per_layer)
    if not plans:
        raise ValueError(
            "max_increase needs a smaller size to try; got layers of the smallest size that "
            "kernels take."
        )
    whole = float(before.mean())

    def greedy(at: int) -> bool:
        _, scores = run.measure(run.choices.candidates(plans[at])["error"], "held_out")
        return relative_increase(whole, float(scores.losses.mean())) <= max_increase

    def within(at: int) -> bool:
        small = run.shrink(plans[at])
        _, scores = run.measure(small.kept, "held_out", (small.model, small.layers))
        loss = float(scores.losses.mean())
        states = sum(layer.shape.groups * layer.shape.states for layer in small.layers.values())
        trials.append(ShrinkTrial(states, loss, relative_increase(whole, loss)))
        return trials[-1].increase <= max_increase  # NaN is not within the budget

    count = count_within(len(plans), within, guess=count_within(len(plans), greedy))
    if not count:
        best = min(trials, key=lambda trial: math.inf if math.isnan(trial.loss) else trial.increase)
        raise ValueError(
            f"max_increase must allow the loss of a smaller state, which is {best.increase:.3%} "
            f"above the original's with {best.states} states in all; got {max_increase:.3%}."
        )
    return plans[count - 1]
