"""Choose how many and which coordinates of every state to keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from gramian.shrinking._elimination import eliminate
from gramian.shrinking._family import Layer
from gramian.shrinking._magnitudes import magnitudes
from gramian.shrinking._passes import Importance

__all__ = ["Choices", "Plan", "count_within"]

Plan = dict[str, int]
"""The number of states to keep, by the path of the layer."""


@dataclass(frozen=True)
class Choices:
    """The sizes and coordinates that can be chosen.

    Attributes:
        layers: the layers.
        orders: the order in which coordinates are dropped, (groups, n), by path.
        errors: the relative error of a layer's scan if k coordinates are kept, for k = 0 … n, by
            path.
        importance: the importance of the states, by path.
        multiple: number of which sizes are multiples; None for that of each family.
    """

    layers: Sequence[Layer]
    orders: Mapping[str, Tensor]
    errors: Mapping[str, list[float]]
    importance: Mapping[str, Importance]
    multiple: int | None = None

    @classmethod
    def of(
        cls,
        layers: Sequence[Layer],
        importance: Mapping[str, Importance],
        multiple: int | None = None,
    ) -> Choices:
        """Return the choices that follow from the importance of the states."""
        orders, errors = {}, {}
        for layer in layers:
            gram = importance[layer.path].gram
            orders[layer.path], squared = eliminate(gram)
            whole = float(gram.sum())
            relative = (squared.sum(0) / whole).sqrt() if whole > 0 else squared.sum(0)
            errors[layer.path] = relative.tolist()
        return cls(layers, orders, errors, importance, multiple)

    def step(self, layer: Layer) -> int:
        """Return the number of which a layer's sizes are multiples.

        It is 1 if the layer's own size is no multiple of it: kernels do not take the layer then.
        """
        step = layer.family.multiple if self.multiple is None else self.multiple
        return 1 if layer.shape.states % step else step

    def sizes(self, layer: Layer) -> range:
        """Return the sizes of a layer that can be chosen, its own among them."""
        step = self.step(layer)
        return range(step, layer.shape.states + 1, step)

    def share(self, keep: float | int) -> Plan:
        """Return the plan that keeps a share, or a number, of the states of every layer.

        Sizes are rounded up to the next that can be chosen.

        Raises:
            ValueError: if no state, or every state of every layer, would be left.
        """
        plan = {}
        for layer in self.layers:
            n = layer.shape.states
            wanted = keep * n if isinstance(keep, float) else keep
            if round(wanted) < 1:
                raise ValueError(
                    f"keep must leave at least one of the {n} states of {layer.path}; got {keep!r}."
                )
            plan[layer.path] = self._at_least(layer, wanted)
        if all(plan[layer.path] == layer.shape.states for layer in self.layers):
            sizes = sorted({layer.shape.states for layer in self.layers})
            steps = sorted({self.step(layer) for layer in self.layers})
            raise ValueError(
                f"keep must leave fewer states than the {' or '.join(map(str, sizes))} of the "
                f"layers, in multiples of {' or '.join(map(str, steps))}; got {keep!r}."
            )
        return plan

    def within(self, error: float) -> Plan:
        """Return the plan in which every layer has the smallest size with at most this error."""
        return {  # the error of a layer's own size is 0
            layer.path: next(k for k in self.sizes(layer) if self.errors[layer.path][k] <= error)
            for layer in self.layers
        }

    def plans(self, per_layer: bool) -> list[Plan]:
        """Return all plans that make a state smaller, in the order of decreasing size."""
        if per_layer:
            levels = {self.errors[x.path][k] for x in self.layers for k in self.sizes(x)}
            found = [self.within(level) for level in sorted(levels)]
        else:
            shares = {k / x.shape.states for x in self.layers for k in self.sizes(x)}
            found = [
                {x.path: self._at_least(x, share * x.shape.states) for x in self.layers}
                for share in sorted(shares, reverse=True)
            ]
        whole = {layer.path: layer.shape.states for layer in self.layers}
        return [plan for i, plan in enumerate(found) if plan not in (whole, *found[:i])]

    def of_total(self, keep: float) -> Plan:
        """Return the plan of one error for all layers that keeps at most a share of all states.

        Raises:
            ValueError: if even the smallest sizes are more than that.
        """
        numbers = {layer.path: layer.shape.numbers for layer in self.layers}
        whole = sum(layer.shape.states * layer.shape.numbers for layer in self.layers)
        plans = self.plans(True)
        for plan in plans:
            if sum(k * numbers[path] for path, k in plan.items()) <= keep * whole + 1e-9:
                return plan
        least = sum(self.sizes(layer)[0] * layer.shape.numbers for layer in self.layers)
        raise ValueError(
            f"keep must leave at least {least / whole:.3g} of the states, with which every layer "
            f"has its smallest size; got {keep!r}."
        )

    def candidates(self, plan: Plan) -> dict[str, dict[str, Tensor]]:
        """Return the coordinates that each criterion keeps, by its name and the layer's path.

        "error" is the greedy elimination, "diagonal" keeps the largest contributions, "energy" the
        largest keys and queries, and "weights" the largest weights, unless states are projected.
        "label error" and "label diagonal" are the first two for the positions with an answer alone,
        if these are labelled. The coordinates are (groups, k), in ascending order.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for layer in self.layers:
            size, one = plan[layer.path], self.importance[layer.path]
            orders = {
                "error": self.orders[layer.path],
                "diagonal": one.gram.diagonal(dim1=1, dim2=2).argsort(1),
                "energy": (one.keys * one.queries).argsort(1),
            }
            if one.basis is None:
                orders["weights"] = self._weights[layer.path].argsort(1)
            if one.due is not None:
                orders["label error"] = eliminate(one.due)[0]
                orders["label diagonal"] = one.due.diagonal(dim1=1, dim2=2).argsort(1)
            for name, order in orders.items():
                kept = order[:, layer.shape.states - size :]
                found.setdefault(name, {})[layer.path] = kept.sort(1).values
        return found

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        """The squares of the coordinates' weights, (groups, n), by path."""
        return {x.path: magnitudes(x, self.importance[x.path].energies) for x in self.layers}

    def _at_least(self, layer: Layer, size: float) -> int:
        step = self.step(layer)
        return min(layer.shape.states, step * math.ceil((size - 1e-9) / step))


def count_within(count: int, within: Callable[[int], bool], guess: int | None = None) -> int:
    """Return how many of some plans are within a budget, by bisection.

    Args:
        count: number of plans. If one is within the budget, those before it count as being so.
        within: function of the index of a plan. The last call that is true is that of the last plan
            within the budget.
        guess: the expected result. The plans on both sides of it are tried first, and then others
            at growing distances.
    """
    low, high = 0, count  # plans before `low` are within the budget, those from `high` are not
    step = 0 if guess is None else 1
    while low < high:
        at = (low + high) // 2
        if guess is not None and (low, high) == (0, count):
            at = max(guess, 1) - 1
        elif step and high == count:  # all plans so far were within the budget
            at, step = min(low + step, count) - 1, 2 * step
        elif step and low == 0:
            at, step = max(high - step, 0), 2 * step
        if within(at):
            low = at + 1
        else:
            high = at
    return low
