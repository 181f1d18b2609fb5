"""Define the report of `shrink`: states, errors and losses before and after."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gramian._json import to_json
from gramian._tables import rich_table, text_table
from gramian.shrinking._projection import Projection

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "LayerShrinkage",
    "ShrinkRecovery",
    "ShrinkReport",
    "ShrinkTrial",
    "relative_increase",
]

_COLUMNS = ("layer", "mixer", "groups", "states", "predicted", "projected", "measured", "output")
_GIB = 2**30


@dataclass(frozen=True)
class LayerShrinkage:
    """The report on the recurrence of one layer.

    Errors are relative: the root of the squared change on the text, divided by the root of the
    squared size. If a norm of every head follows the scan, the outputs of each head and token are
    divided by their root mean square first.

    Attributes:
        layer: path of the module.
        mixer: name of the module's class.
        groups: number of groups of heads that share keys and queries. Each group has its own choice
            of coordinates.
        states_before: number of coordinates of each group's state before.
        states_after: the same number after.
        kept: indices of the kept coordinates of each group, in ascending order; if the states were
            projected, in the order of the singular values of the balanced basis.
        predicted_error: error of the scan's outputs if the coordinates are held at zero.
        measured_error: error of the scan's outputs in the smaller layer, for the same input, on
            4,096 tokens of the text.
        output_error: error of the smaller layer's output on the same tokens, for the same input.
        spectrum: predicted error if the greedy elimination keeps 1, 2, …, n coordinates. The last
            one is 0.
        note: what changes besides the dropped coordinates; empty if nothing does.
        projection: what a projection of the states would do at this size, or does if the states
            were projected; None if the layer has no scalar gates.
    """

    layer: str
    mixer: str
    groups: int
    states_before: int
    states_after: int
    kept: tuple[tuple[int, ...], ...]
    predicted_error: float
    measured_error: float
    output_error: float
    spectrum: tuple[float, ...]
    note: str = ""
    projection: Projection | None = None


@dataclass(frozen=True)
class ShrinkTrial:
    """A size that was tried, and the loss on the held-out text.

    Attributes:
        states: number of coordinates that all groups of all layers kept.
        loss: mean cross-entropy, in nats.
        increase: increase of the loss, relative to the loss of the original model.
    """

    states: int
    loss: float
    increase: float


@dataclass(frozen=True)
class ShrinkRecovery:
    """The report on a recovery: training towards the predictions of the original model.

    Attributes:
        steps: number of steps.
        method: "full" or "lora".
        learning_rate: peak of the learning rate.
        batch: number of windows in each step.
        rank: rank of the changes of "lora".
        candidates: number of criteria whose models were trained.
        divergence_before: divergence from the original's predictions before, in nats, on a tenth of
            the windows by which coordinates were chosen, on which the recovery did not train.
        divergence_after: the same after. Both are equal if the recovery did not help and was
            undone.
        loss: mean cross-entropy of the model after the recovery on the held-out text, in nats.
        increase: increase of this loss, relative to the loss of the original model.
        standard_error: standard error of the difference of both losses, over windows; NaN for one
            window.
        accuracy: share of the tokens of the held-out text that are the most probable ones.
    """

    steps: int
    method: str
    learning_rate: float
    batch: int
    rank: int
    candidates: int
    divergence_before: float
    divergence_after: float
    loss: float
    increase: float
    standard_error: float
    accuracy: float


@dataclass(frozen=True)
class ShrinkReport:
    """The report that `shrink` returns. It prints as a table.

    Attributes:
        keep: the share or number of states to keep; None if `max_increase` was given.
        max_increase: the allowed relative increase of the loss; None if `keep` was given.
        per_layer: whether layers could have different sizes.
        projection: whether the states were projected.
        multiple: the numbers of which the layers' sizes are multiples.
        criterion: how the coordinates were chosen. "error" is the greedy elimination by the exact
            error, "diagonal" keeps the largest contributions, "energy" the largest keys and
            queries, and "weights" the largest weights. "label error" and "label diagonal" are the
            first two by the errors where labels are due. If a recovery trained several models,
            it is the criterion of the one that was best afterwards.
        criteria: the loss of the smaller model by each criterion, on 4,096 tokens of the text by
            which coordinates were chosen; or the share of wrong tokens there, if `choose_by` is
            "accuracy". The best criterion is the first. By accuracy, criteria that are close there
            were compared again on all of this text.
        choose_by: "loss" or "accuracy", by which criteria were compared.
        labelled: whether labels were given. Then only they count in losses and accuracies.
        layers: one report for every layer whose state could be made smaller.
        left: path and reason of every recurrence that was left as it is.
        tokens: number of tokens by which coordinates were chosen.
        held_out_tokens: number of other tokens on which losses were measured.
        context: number of tokens of a window.
        loss_before: cross-entropy of the original model on the held-out text, in nats: the mean
            over windows of the mean over their tokens, or over their labels.
        loss_after: mean cross-entropy of the smaller model there, before a recovery.
        standard_error: standard error of the difference of both, over windows; NaN for one window.
        accuracy_before: share of the tokens of the held-out text, or of its labels, that the
            original model predicts, as a mean over windows.
        accuracy_after: the same for the smaller model, before a recovery.
        original_state_bytes: bytes that the original model stores for one sequence of `context`
            tokens, keys and values of attention included.
        shrunk_state_bytes: the same for the smaller model.
        trials: the sizes that were tried for `max_increase`.
        seconds: duration in seconds.
        recovery: the report on the recovery; None if there was none. Errors of layers are those
            before it.
    """

    keep: float | int | None
    max_increase: float | None
    per_layer: bool
    projection: bool
    multiple: tuple[int, ...]
    criterion: str
    criteria: dict[str, float]
    choose_by: str
    labelled: bool
    layers: tuple[LayerShrinkage, ...]
    left: tuple[tuple[str, str], ...]
    tokens: int
    held_out_tokens: int
    context: int
    loss_before: float
    loss_after: float
    standard_error: float
    accuracy_before: float
    accuracy_after: float
    original_state_bytes: int
    shrunk_state_bytes: int
    trials: tuple[ShrinkTrial, ...]
    seconds: float
    recovery: ShrinkRecovery | None = None

    @property
    def increase(self) -> float:
        """The increase of the loss, relative to the loss of the original model.

        It is that before a recovery, whose own report has the increase after it.
        """
        return relative_increase(self.loss_before, self.loss_after)

    @property
    def states(self) -> tuple[int, int]:
        """The coordinates of all groups of all layers, before and after."""
        before = sum(layer.groups * layer.states_before for layer in self.layers)
        return before, sum(layer.groups * layer.states_after for layer in self.layers)

    def sequences(self, memory: int) -> tuple[int, int]:
        """Return how many sequences of `context` tokens a memory holds, before and after.

        Args:
            memory: bytes for states, without the weights.
        """
        return memory // self.original_state_bytes, memory // self.shrunk_state_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON can hold."""
        before, after = self.sequences(_GIB)
        return {
            **dataclasses.asdict(self),
            "increase": self.increase,
            "states_before": self.states[0],
            "states_after": self.states[1],
            "sequences_in_a_gibibyte": {"before": before, "after": after},
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
        """A few sentences with the states, the losses, and the memory before and after."""
        before, after = self.states
        wanted = (
            f"at most {self.max_increase:.3%} more loss"
            if self.max_increase is not None
            else f"keep {self.keep:g}"
        )
        change = self._change(self.increase, self.standard_error)
        words = (
            f"{before} states to {after} ({wanted}), chosen by the criterion {self.criterion} on "
            f"{self.tokens:,} tokens in {self.seconds:.1f} s. "
            f"Loss on {self.held_out_tokens:,} other tokens{' (labels only)' * self.labelled}: "
            f"{self.loss_before:.4f} nats before, {self.loss_after:.4f} ({change}) after"
            f"{self._recovered}.{self._answered} One sequence of {self.context:,} tokens: "
            f"{self.original_state_bytes:,} bytes before, "
            f"{self.shrunk_state_bytes:,} after. One GiB holds {self.sequences(_GIB)[0]:,} "
            f"sequences before, {self.sequences(_GIB)[1]:,} after."
        )
        steps = [step for step in self.multiple if step > 1]
        if steps:
            words += (
                f" Sizes are multiples of {' or '.join(map(str, steps))}, which fused kernels need."
            )
        if self.projection:
            errors = [x.projection.coordinates_error for x in self.layers if x.projection]
            words += (
                " The states were projected; as many coordinates would have predicted errors of "
                f"{min(errors):.1e} to {max(errors):.1e}."
            )
        notes = dict.fromkeys(layer.note for layer in self.layers if layer.note)
        words += "".join(f" {note}" for note in notes)
        words += "".join(f" {path} is left: {reason}" for path, reason in self.left)
        return words

    @property
    def _recovered(self) -> str:
        done = self.recovery
        if done is None:
            return ""
        change = self._change(done.increase, done.standard_error)
        kept = done.divergence_after < done.divergence_before
        undone = "" if kept else "; it did not help and was undone"
        return (
            f", and {done.loss:.4f} ({change}) after {done.steps} steps of recovery "
            f"({done.method}{undone})"
        )

    @property
    def _answered(self) -> str:
        if not self.labelled:
            return ""
        words = f" Right labels: {self.accuracy_before:.2%} before, {self.accuracy_after:.2%} after"
        done = self.recovery
        return words + ("." if done is None else f", {done.accuracy:.2%} after the recovery.")

    def _change(self, increase: float, error: float) -> str:
        known = math.isfinite(error) and self.loss_before > 0
        return f"{increase:+.3%}" + (
            f", standard error {error / self.loss_before:.3%}" if known else ""
        )


def relative_increase(before: float, after: float) -> float:
    """Return the increase of a loss, relative to the loss before, which may be 0."""
    if before == 0:
        return 0.0 if after == 0 else math.inf
    return after / before - 1


def _row(layer: LayerShrinkage) -> tuple[str, ...]:
    return (
        layer.layer,
        layer.mixer,
        str(layer.groups),
        f"{layer.states_before} to {layer.states_after}",
        f"{layer.predicted_error:.1e}",
        "" if layer.projection is None else f"{layer.projection.error:.1e}",
        f"{layer.measured_error:.1e}",
        f"{layer.output_error:.1e}",
    )
