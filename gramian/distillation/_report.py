"""What distilling reached: orders and errors of every filter, and the state before and after."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gramian._json import to_json
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
"""Energy past the taps, relative to that of the taps, that a summary mentions."""

_ENOUGH = 16
"""Filters from which a rank correlation is told."""


@dataclass(frozen=True)
class LayerReport:
    """One layer's filters; every tuple has one entry for each filter.

    Attributes:
        layer: index of the layer in the model, or path of the submodule.
        mixer: class of the mixer that the filters belong to.
        taps: length of the kernels that were reduced.
        orders: real state dimension of each reduced filter.
        relative_errors: `‖h − ĥ‖₂ / ‖h‖₂` over the taps, of the filter as the new model holds it.
        lower_bounds: what no recurrence of that order, stable or not, can go below (relative too).
        l1_errors: `‖h − ĥ‖₁` over the taps: bounds `‖y − ŷ‖∞ / ‖u‖∞` for inputs up to that length.
        tail_energies: energy of ĥ past the taps, over that of h.
        hankel_singular_values: leading ones of each kernel, descending; fewer where fewer were
            needed.
        effective_state_sizes: entropy-ESS of each original filter before the middle of its taps,
            with the taps as horizon: how much memory it uses. Estimated above 1,024 taps.
        unconverged: indices of the filters whose relative error stayed above the tolerance; empty
            if an order was asked for.
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

    @property
    def mean_order(self) -> float:
        """Mean of `orders`."""
        return sum(self.orders) / len(self.orders)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as what JSON can hold."""
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
        }

    def _row(self) -> tuple[str, ...]:
        order, error = _spread(self.orders), _spread(self.relative_errors)
        return (
            str(self.layer),
            str(len(self.orders)),
            f"{_spread(self.effective_state_sizes)['mean']:.1f}",
            f"{order['min']} / {order['mean']:.1f} / {order['max']}",
            f"{error['mean']:.1e} / {error['max']:.1e}",
            f"{max(self.lower_bounds):.1e}",
            str(len(self.unconverged)),
        )


@dataclass(frozen=True)
class Trial:
    """Filters that were tried, and the loss with them.

    Attributes:
        tol: the relative l2 error asked of every filter, or None if an order was.
        mean_order: of the filters.
        loss: mean cross-entropy on the text, in nats.
        increase: of the loss, relative to the original's.
    """

    tol: float | None
    mean_order: float
    loss: float
    increase: float


@dataclass(frozen=True)
class Quality:
    """What was measured on a text.

    Attributes:
        tokens: of the text.
        max_increase: the relative increase of the loss that was allowed, or None if none was asked.
        loss: the original's mean cross-entropy on the text, in nats.
        trials: everything that was tried, in that order.
        finetuned: loss on held-out windows before and after a fine-tuning, if there was one.
    """

    tokens: int
    max_increase: float | None
    loss: float
    trials: tuple[Trial, ...]
    finetuned: tuple[float, float] | None = None


@dataclass(frozen=True)
class DistillationReport:
    """What `distill` reached. Printing it gives a table: of every layer the mean effective
    state-size, the orders, the relative l2 errors, the largest lower bound of them, and how many
    filters missed the tolerance.

    Attributes:
        tol: the relative l2 error asked of every filter, or None if an order was asked for.
        order: the order asked of every filter, or None if a tolerance was.
        layers: one report for every layer that had long filters.
        context: the context length of the two figures that follow: the original's filter length.
        original_state_bytes: what one sequence of that length carries in the original (exact online
            convolution).
        distilled_state_bytes: the same in the distilled model, at any length.
        seconds: how long it took.
        quality: what was measured on a text, where one was given.
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
        """Orders of all filters, layer by layer."""
        return tuple(order for layer in self.layers for order in layer.orders)

    @property
    def mean_order(self) -> float:
        """Mean order over all filters."""
        return sum(self.orders) / len(self.orders)

    @property
    def effective_state_sizes(self) -> tuple[float, ...]:
        """Effective state-size of all original filters, layer by layer."""
        return tuple(size for layer in self.layers for size in layer.effective_state_sizes)

    @property
    def rank_correlation(self) -> float | None:
        """Whether ESS tells in advance what distilling costs: Spearman's rank correlation over all
        filters of effective state-size with the relative error, where an order was asked for; with
        the order, where a tolerance was. None for fewer than 16 filters, or if all are equal."""
        if len(self.orders) < _ENOUGH:
            return None
        errors = [error for layer in self.layers for error in layer.relative_errors]
        cost = errors if self.tol is None else self.orders
        return rank_correlation(self.effective_state_sizes, cost)

    @property
    def max_relative_error(self) -> float:
        """The largest relative l2 error of any filter."""
        return max(error for layer in self.layers for error in layer.relative_errors)

    @property
    def max_tail_energy(self) -> float:
        """The largest energy of any filter past its taps, relative to that of the taps: what an
        input longer than `context` meets, and no error here counts."""
        return max(energy for layer in self.layers for energy in layer.tail_energies)

    @property
    def converged(self) -> bool:
        """Whether every filter reached the tolerance; True if an order was asked for."""
        return not any(layer.unconverged for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as what JSON can hold."""
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
        """`to_dict` as indented JSON text."""
        return to_json(self.to_dict(), indent=2)

    def __str__(self) -> str:
        rows = [_COLUMNS, *(layer._row() for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
        lines = [
            "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows
        ]
        return "\n".join([*lines, self.summary])

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(caption=self.summary, caption_justify="left", caption_style="")
        for column in _COLUMNS:
            table.add_column(column, justify="right")
        for layer in self.layers:
            table.add_row(*layer._row())
        return table

    @property
    def summary(self) -> str:
        """One sentence or two: what was asked for and reached, and the state before and after."""
        goal = f"tolerance {self.tol:g}" if self.tol is not None else f"order {self.order}"
        missed = sum(len(layer.unconverged) for layer in self.layers)
        outcome = f"; {missed} filters stayed above it" if missed else ""
        words = (
            f"{len(self.orders)} filters to {goal} in {self.seconds:.1f} s: mean order "
            f"{self.mean_order:.1f}{outcome}. State of one sequence at context {self.context:,}: "
            f"{self.original_state_bytes:,} bytes before, {self.distilled_state_bytes:,} after."
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
        return words if self.quality is None else f"{words}\n{_told(self.quality, self.tol)}"


def _told(quality: Quality, tol: float | None) -> str:
    """What was measured on the text, in words."""
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
