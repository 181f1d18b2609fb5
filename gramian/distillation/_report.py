"""Define the report of a distillation. It has the orders and errors of all filters."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gramian._json import to_json
from gramian._tables import rich_table, text_table
from gramian.memory.correlation import rank_correlation

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["DistillationReport", "LayerReport", "Quality", "Trial"]

_COLUMNS = (
    "layer",
    "filters",
    "ESS",
    "order min/mean/max",
    "l2 error mean/max",
    "bound",
    "missed",
)

_AUDIBLE = 1e-2
"""A summary mentions the energy past the taps if its ratio to the taps' energy is larger."""

_ENOUGH = 16
"""The smallest number of filters for which a rank correlation is reported."""


@dataclass(frozen=True)
class LayerReport:
    """The report on the filters of one layer.

    Except for `unconverged`, every tuple has one entry for each filter.

    Attributes:
        layer: index of the layer in the model, or path of the submodule.
        mixer: name of the class of the mixer to which the filters belong.
        taps: number of taps of the kernels that were reduced.
        orders: real state dimension of each reduced filter.
        relative_errors: relative error `‖h − ĥ‖₂ / ‖h‖₂` over the taps. Here h is the original
            kernel, and ĥ is the kernel of the filter in the new model.
        lower_bounds: lower bound on the relative error. It holds for every recurrence of the same
            order, stable or not.
        l1_errors: `‖h − ĥ‖₁` over the taps. It is an upper bound of `‖y − ŷ‖∞ / ‖u‖∞` for inputs
            that are no longer than the number of taps.
        tail_energies: energy of ĥ past the taps, divided by the energy of h.
        hankel_singular_values: leading Hankel singular values of each kernel, in descending order;
            at most 64, and fewer if the reduction needed fewer.
        effective_state_sizes: effective state-size (entropy-ESS) of each original filter, which
            measures the memory that the filter uses. It is measured at the middle of the taps, with
            the number of taps as horizon. If there are more than 1,024 taps, it is an estimate.
        unconverged: indices of the filters whose relative error stayed above the tolerance; empty
            if an order was given.
        kept: whether the layer keeps its own filters, because these have so few taps that the state
            of reduced filters would not be smaller. The orders and errors are then those of the
            kept filters.
    """

    layer: int | str
    mixer: str
    taps: int
    orders: tuple[int, ...]
    relative_errors: tuple[float, ...]
    lower_bounds: tuple[float, ...]
    l1_errors: tuple[float, ...]
    tail_energies: tuple[float, ...]
    hankel_singular_values: tuple[tuple[float, ...], ...]
    effective_state_sizes: tuple[float, ...]
    unconverged: tuple[int, ...]
    kept: bool = False

    @property
    def mean_order(self) -> float:
        """The mean of `orders`."""
        return sum(self.orders) / len(self.orders)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON can hold."""
        return {
            "layer": self.layer,
            "mixer": self.mixer,
            "filters": len(self.orders),
            "taps": self.taps,
            "effective_state_size": _spread(self.effective_state_sizes),
            "order": _spread(self.orders),
            "relative_error": _spread(self.relative_errors),
            "lower_bound": _spread(self.lower_bounds),
            "l1_error": _spread(self.l1_errors),
            "tail_energy": _spread(self.tail_energies),
            "orders": list(self.orders),
            "relative_errors": list(self.relative_errors),
            "lower_bounds": list(self.lower_bounds),
            "l1_errors": list(self.l1_errors),
            "tail_energies": list(self.tail_energies),
            "hankel_singular_values": [list(row) for row in self.hankel_singular_values],
            "effective_state_sizes": list(self.effective_state_sizes),
            "unconverged": list(self.unconverged),
            "kept": self.kept,
        }


@dataclass(frozen=True)
class Trial:
    """A distillation to one tolerance or order, and the loss of the distilled model.

    Attributes:
        tol: tolerance of every filter's relative l2 error, or None if an order was given.
        mean_order: mean order of the filters.
        loss: mean cross-entropy on the text, in nats.
        increase: increase of the loss, relative to the loss of the original model.
    """

    tol: float | None
    mean_order: float
    loss: float
    increase: float


@dataclass(frozen=True)
class Quality:
    """The loss on a text before and after a distillation.

    Attributes:
        tokens: number of tokens of the text.
        max_increase: the allowed relative increase of the loss, or None if there was no budget.
        loss: mean cross-entropy of the original model on the text, in nats.
        trials: all trials, in the order in which they were made.
        finetuned: loss on held-out windows before and after fine-tuning, or None if the model was
            not fine-tuned.
    """

    tokens: int
    max_increase: float | None
    loss: float
    trials: tuple[Trial, ...]
    finetuned: tuple[float, float] | None = None


@dataclass(frozen=True)
class DistillationReport:
    """The report that `distill` returns. It prints as a table.

    For every layer, the table shows the mean effective state-size, the orders, the relative l2
    errors, the largest of their lower bounds, and the number of filters whose error stayed above
    the tolerance.

    Attributes:
        tol: tolerance of every filter's relative l2 error, or None if an order was given.
        order: order of every filter, or None if a tolerance was given.
        layers: one report for every layer that had long filters.
        context: number of taps of the original filters. The next two attributes hold for sequences
            of this length.
        original_state_bytes: bytes of the state of one sequence in the original model, which uses
            exact online convolution.
        distilled_state_bytes: bytes of the state of one sequence in the distilled model. Except for
            attention, this number is the same at any length.
        seconds: duration of the distillation in seconds.
        quality: the loss on a text before and after the distillation; None if no text was given.
    """

    tol: float | None
    order: int | None
    layers: tuple[LayerReport, ...]
    context: int
    original_state_bytes: int
    distilled_state_bytes: int
    seconds: float
    quality: Quality | None = None

    @property
    def orders(self) -> tuple[int, ...]:
        """The orders of all filters, layer by layer."""
        return tuple(order for layer in self.layers for order in layer.orders)

    @property
    def mean_order(self) -> float:
        """The mean of the orders of all filters."""
        return sum(self.orders) / len(self.orders)

    @property
    def effective_state_sizes(self) -> tuple[float, ...]:
        """The effective state-sizes of all original filters, layer by layer."""
        return tuple(size for layer in self.layers for size in layer.effective_state_sizes)

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's rank correlation of the effective state-size with the cost of distillation.

        The correlation shows how well the effective state-size of a filter predicts the cost. The
        cost is the relative error if an order was given, and the order if a tolerance was given.
        The correlation is None if there are fewer than 16 filters, or if all state-sizes or all
        costs are equal.
        """
        if len(self.orders) < _ENOUGH:
            return None
        errors = [error for layer in self.layers for error in layer.relative_errors]
        cost = errors if self.tol is None else self.orders
        return rank_correlation(self.effective_state_sizes, cost)

    @property
    def max_relative_error(self) -> float:
        """The largest relative l2 error of all filters."""
        return max(error for layer in self.layers for error in layer.relative_errors)

    @property
    def max_tail_energy(self) -> float:
        """The largest energy of a filter past its taps, relative to the energy of the taps.

        This energy affects only inputs that are longer than `context`. The errors in this report do
        not include it.
        """
        return max(energy for layer in self.layers for energy in layer.tail_energies)

    @property
    def converged(self) -> bool:
        """Whether every filter reached the tolerance; True if an order was given."""
        return not any(layer.unconverged for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON can hold."""
        return {
            "tol": self.tol,
            "order": self.order,
            "filters": len(self.orders),
            "mean_effective_state_size": sum(self.effective_state_sizes) / len(self.orders),
            "rank_correlation": self.rank_correlation,
            "mean_order": self.mean_order,
            "max_order": max(self.orders),
            "max_relative_error": self.max_relative_error,
            "max_tail_energy": self.max_tail_energy,
            "converged": self.converged,
            "context": self.context,
            "original_state_bytes": self.original_state_bytes,
            "distilled_state_bytes": self.distilled_state_bytes,
            "seconds": self.seconds,
            "quality": None if self.quality is None else dataclasses.asdict(self.quality),
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def to_json(self) -> str:
        """Return `to_dict` as indented JSON text."""
        return to_json(self.to_dict(), indent=2)

    def __str__(self) -> str:
        return text_table(_COLUMNS, map(_row, self.layers), self.summary)

    def __rich__(self) -> Table:
        return rich_table(_COLUMNS, map(_row, self.layers), self.summary)

    @property
    def summary(self) -> str:
        """A few sentences with the goal, the mean order, and the state before and after."""
        goal = f"tolerance {self.tol:g}" if self.tol is not None else f"order {self.order}"
        missed = sum(len(layer.unconverged) for layer in self.layers)
        outcome = f"; {missed} filters stayed above it" if missed else ""
        words = (
            f"{len(self.orders)} filters to {goal} in {self.seconds:.1f} s: mean order "
            f"{self.mean_order:.1f}{outcome}. State of one sequence at context {self.context:,}: "
            f"{self.original_state_bytes:,} bytes before, {self.distilled_state_bytes:,} after."
        )
        kept = [str(layer.layer) for layer in self.layers if layer.kept]
        if kept:
            words += (
                f" The filters of layer{'s' if len(kept) > 1 else ''} {', '.join(kept)} stay, as "
                "reduced ones would need no smaller a state."
            )
        if self.max_tail_energy > _AUDIBLE:
            words += (
                f" Past {self.context:,} tokens the filters go on with up to "
                f"{self.max_tail_energy:.1e} times their energy, which no error here counts; "
                'tail="zero" fits filters that fade.'
            )
        correlation = self.rank_correlation
        if correlation is not None:
            cost = "error" if self.tol is None else "order"
            words += f" Rank correlation of ESS with the {cost}: {correlation:.2f}."
        return (
            words
            if self.quality is None
            else f"{words}\n{_describe_quality(self.quality, self.tol)}"
        )


def _row(layer: LayerReport) -> tuple[str, ...]:
    """Return the cells of a layer in the table of a report. `_COLUMNS` has their headings."""
    order, error = _spread(layer.orders), _spread(layer.relative_errors)
    return (
        str(layer.layer),
        str(len(layer.orders)),
        f"{_spread(layer.effective_state_sizes)['mean']:.1f}",
        f"{order['min']} / {order['mean']:.1f} / {order['max']}",
        f"{error['mean']:.1e} / {error['max']:.1e}",
        f"{max(layer.lower_bounds):.1e}",
        str(len(layer.unconverged)),
    )


def _describe_quality(quality: Quality, tol: float | None) -> str:
    """Return a sentence about the loss on the text. `tol` is the tolerance of the distillation."""
    words = f"Loss on {quality.tokens:,} tokens: {quality.loss:.4f} nats before"
    chosen = [trial for trial in quality.trials if trial.tol == tol]
    if chosen:
        words += f", {chosen[-1].loss:.4f} ({chosen[-1].increase:+.3%}) after"
    if quality.max_increase is not None:
        tried = f"{len(quality.trials)} tolerance{'s' if len(quality.trials) > 1 else ''} tried"
        words += f"; {quality.max_increase:.3%} were allowed, {tried}"
    if quality.finetuned is not None:
        before, after = quality.finetuned
        words += f"; fine-tuned, held-out loss {before:.4f} to {after:.4f}"
    return words + "."


def _spread(values: tuple[Any, ...]) -> dict[str, Any]:
    return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}
