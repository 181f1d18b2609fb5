"""Try a plan: the loss on a text of the hybrid, and of others that replace as much."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gramian._json import to_json
from gramian._staging import staged_file
from gramian._tables import rich_table, text_table
from gramian.evaluation import Comparison, Perplexity, perplexity
from gramian.hybrids._measuring import rows_of
from gramian.hybrids._plan import HybridPlan
from gramian.hybrids._replacement import kind_of
from gramian.tasks import Document

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["HybridTrial", "TriedChoice", "try_hybrid"]

_FORMAT = "gramian.hybrid_trial/1"
_COLUMNS = ("chosen by", "seed", "replaced", "perplexity", "increase of the loss", "± its error")


@dataclass(frozen=True)
class TriedChoice:
    """What one choice of layers or heads costs.

    Attributes:
        criterion: what they were chosen by.
        seed: seed of the choice, if it was random; otherwise None.
        heads: number of replaced heads.
        loss: mean loss of the hybrid in nats per token.
        increase: increase of the loss against the model's.
        error: standard error of the increase, over sequences; None if it is not known.
    """

    criterion: str
    seed: int | None
    heads: int
    loss: float
    increase: float
    error: float | None

    @property
    def perplexity(self) -> float:
        """The perplexity of the hybrid."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True)
class HybridTrial:
    """The report that `try_hybrid` returns. It prints as a table with a row for each choice.

    Attributes:
        model: name of the model.
        window: number of the last tokens that replaced heads see.
        sinks: number of the first tokens that they see, too.
        heads: number of all heads that could be replaced.
        loss: mean loss of the model in nats per token.
        tokens: number of predicted tokens.
        length: number of tokens of a sequence.
        sequences: number of sequences.
        choices: what was tried; the plan's own choice is the first.
        kind: what replaced the heads, as in `HybridPlan`.
        state: number of states, if this was a recurrence.
    """

    model: str
    window: int
    sinks: int
    heads: int
    loss: float
    tokens: int
    length: int
    sequences: int
    choices: tuple[TriedChoice, ...]
    kind: str = "window"
    state: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON can hold."""
        return {"format": _FORMAT} | dataclasses.asdict(self)

    def to_json(self) -> str:
        """Return `to_dict` as indented JSON text."""
        return to_json(self.to_dict(), indent=2)

    def save(self, path: str | Path) -> Path:
        """Write the report as a JSON file, completely or not at all, and return the path."""
        path = Path(path)
        with staged_file(path) as stage:
            stage.write_text(self.to_json() + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_dict(cls, values: Any) -> HybridTrial:
        """Return the report from which `to_dict` made `values`.

        Raises:
            ValueError: if `values` do not have the format of a report.
        """
        found = values.get("format") if isinstance(values, dict) else None
        if found != _FORMAT:
            raise ValueError(f"a trial of format {_FORMAT!r} is needed; got {found!r}.")
        try:
            choices = tuple(TriedChoice(**choice) for choice in values["choices"])
            names = [field.name for field in dataclasses.fields(cls)]
            later = {"kind": "window", "state": 0}
            fields = {name: (later | values)[name] for name in names}
        except (KeyError, TypeError) as error:
            raise ValueError(f"the trial is not complete: {error!r}.") from error
        return cls(**fields | {"choices": choices})

    @classmethod
    def load(cls, path: str | Path) -> HybridTrial:
        """Return the report that `save` wrote.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if the file does not hold a report.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path} is not the trial of a hybrid: {error}") from error

    def __str__(self) -> str:
        return text_table(_COLUMNS, self._rows, self.summary)

    def __rich__(self) -> Table:
        return rich_table(_COLUMNS, self._rows, self.summary)

    @property
    def summary(self) -> str:
        """A sentence with the loss of the model and the size of the text."""
        heads = kind_of(self.kind)(self.window, self.sinks, self.state, {}).description()
        return (
            f"{self.model}: perplexity {math.exp(self.loss):.4g} with all of its attention, on "
            f"{self.tokens:,} tokens in {self.sequences} sequences of {self.length:,}; replaced "
            f"heads {heads}; losses in nats per token, with standard errors over the same "
            "sequences."
        )

    @property
    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                one.criterion,
                "" if one.seed is None else str(one.seed),
                f"{one.heads} of {self.heads} heads",
                f"{one.perplexity:.4g}",
                f"{one.increase:+.4f}",
                "" if one.error is None else f"{one.error:.4f}",
            )
            for one in self.choices
        ]


def try_hybrid(
    model: Any,
    plan: HybridPlan,
    text: str | Sequence[Document] | Sequence[Tensor],
    tokenizer: Any,
    *,
    against: Sequence[str] = ("magnitude", "random"),
    seeds: int = 3,
    length: int | None = None,
    sequences: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> HybridTrial:
    """Measure the loss of a plan's hybrid on a text, beside choices of other criteria.

    The replaced heads see a window, or have the recurrences of the plan; the model is not changed.
    The other choices replace as many layers or groups of heads.

    Args:
        model: The model that was planned for.
        plan: The plan.
        text: A text, documents or token ids, as in `plan_hybrid`, on which the plan was not made.
        tokenizer: The model's tokenizer.
        against: Criteria to compare with, each one of `CRITERIA`.
        seeds: Number of random choices, if "random" is one of them.
        length: Number of tokens of a sequence; by default that of the plan.
        sequences: Largest number of sequences. They are spread over the text.
        progress: A function that is called as `progress(done, total)` with numbers of choices.

    Returns:
        The losses.

    Raises:
        ValueError: if the model does not have the layers of the plan, if a criterion is unknown or
            was not measured, if an option is out of range, or if the text has too few tokens.
    """
    if seeds < 1 or sequences < 1:
        raise ValueError(f"seeds and sequences must be at least 1; got {seeds} and {sequences}.")
    plans, as_much = [plan], plan.as_much()
    for criterion in against:
        for seed in range(seeds if criterion == "random" else 1):
            plans.append(as_much.choose(criterion=criterion, seed=seed))
    rows = list(rows_of(text, tokenizer, length or plan.length, sequences))

    def score(one: HybridPlan) -> Perplexity:
        with one.applied(model):
            return perplexity(model, tokenizer, rows, window=len(rows[0]), stride=len(rows[0]))

    whole = perplexity(model, tokenizer, rows, window=len(rows[0]), stride=len(rows[0]))
    choices = []
    for number, one in enumerate(plans, 1):
        choices.append(_tried(one, whole, score(one)))
        if progress is not None:
            progress(number, len(plans))
    return HybridTrial(
        model=plan.model,
        window=plan.window,
        sinks=plan.sinks,
        heads=sum(layer.heads for layer in plan.layers),
        loss=whole.loss,
        tokens=whole.tokens,
        length=len(rows[0]),
        sequences=len(rows),
        choices=tuple(choices),
        kind=plan.kind,
        state=plan.state if kind_of(plan.kind).fitted else 0,
    )


def _tried(plan: HybridPlan, before: Perplexity, after: Perplexity) -> TriedChoice:
    # The first measure of a text is its loss.
    compared = Comparison(before.measures("text")[0], after.measures("text")[0])
    return TriedChoice(
        criterion=plan.chosen_by,
        seed=plan.seed if plan.chosen_by == "random" else None,
        heads=sum(len(layer.replaced) for layer in plan.layers),
        loss=after.loss,
        increase=compared.difference,
        error=compared.error,
    )
