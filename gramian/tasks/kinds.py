"""Kinds of tasks: which model a kind trains, how its labels lie in a batch, how answers are scored.

Everything that depends on the kind of a task is a method of one object, which training and
evaluation look up by the name in `Description.kind`. A kind of one's own is a subclass of
`ClassLabels`, `NumberLabels` or `Kind` under the decorator `register_kind`:

    @register_kind("ages")
    class Ages(NumberLabels):
        def model_class(self):
            return ModelOfAges

A batch is scored row by row: `score` gives a few sums for each row, and `summarize` makes metrics
of the sums of all rows, so that no metric depends on how rows were batched.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gramian._labels import IGNORED
from gramian._nearest import unknown

if TYPE_CHECKING:
    from gramian.tasks._task import Description

# `gramian.models` loads transformers, so methods import it when a model is wanted.

__all__ = [
    "KINDS",
    "ClassLabels",
    "Column",
    "Kind",
    "Metric",
    "NumberLabels",
    "find_kind",
    "register_kind",
]


class Column(NamedTuple):
    """The layout of the inputs or the labels of one row.

    Attributes:
        integers: whether the numbers are integers, or real numbers.
        shape: their shape, in which None stands for the row's length.
    """

    integers: bool
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Metric:
    """One metric, as sums over rows: `Σ totals / Σ weights`.

    Attributes:
        name: its name.
        totals: (rows,) what each row adds.
        weights: (rows,) by how much it counts.
        higher_is_better: whether a larger value is the better one.
        unit: the ratio is divided by it.
        root: whether the metric is the square root of the ratio.
    """

    name: str
    totals: np.ndarray
    weights: np.ndarray
    higher_is_better: bool
    unit: float = 1.0
    root: bool = False

    @property
    def defined(self) -> bool:
        """Whether any row counts."""
        return bool(np.any(self.weights))

    def value(self) -> float:
        """Compute the metric over all rows."""
        total, weight = np.stack([self.totals, self.weights], axis=1).sum(0)
        mean = float(total / weight) / self.unit
        return math.sqrt(mean) if self.root else mean


class Kind(ABC):
    """Everything that training and evaluation need to know about one kind of task.

    Attributes:
        name: of the kind, set by `register_kind`.
        metrics: those by which the best model can be chosen, and whether higher values are better.
        packable: whether several sequences can share a row of a batch.
        accepts_foreign_models: whether `evaluate_task` takes models of transformers as well.
        call_options: what a model is called with in evaluation besides its inputs.
    """

    name: ClassVar[str]
    metrics: ClassVar[Mapping[str, bool]] = {"loss": False}
    packable: ClassVar[bool] = False
    accepts_foreign_models: ClassVar[bool] = False
    call_options: ClassVar[Mapping[str, Any]] = {}

    # The model.

    @abstractmethod
    def model_class(self) -> type[Any]:
        """Return the class of models that are trained."""

    def model_options(self) -> dict[str, Any]:
        """Return fields of `GramianConfig` that the kind sets where the user leaves them out."""
        return {}

    def accepts_model(self, model: Any) -> bool:
        """Return whether a model of this library answers tasks of this kind."""
        return isinstance(model, self.model_class())

    def check_description(self, description: Description) -> None:  # noqa: B027 (need not check)
        """Check that there is something to learn.

        Raises:
            ValueError: if there is not; the message goes on from "the task NAME".
        """

    # Rows and batches.

    def input_names(self, description: Description) -> tuple[str, ...]:
        """Return the names of a row's inputs."""
        return ("input_ids",) if description.input_size is None else ("input_values",)

    @abstractmethod
    def label_column(self, description: Description) -> Column:
        """Return the layout of a row's labels."""

    def columns(self, description: Description) -> dict[str, Column]:
        """Return the layout of a row's inputs and labels, by their names."""
        values = Column(False, (None, description.input_size))
        found = {
            name: Column(True, (None,)) if name.startswith("input_ids") else values
            for name in self.input_names(description)
        }
        return found | {"labels": self.label_column(description)}

    @abstractmethod
    def label_tensor(self, labels: Any) -> Tensor:
        """Convert the labels of one row, without refusing any."""

    def batch_labels(self, labels: Tensor) -> dict[str, Tensor]:
        """Name the labels of a batch as the model wants them."""
        return {"labels": labels}

    def select_due(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Restrict a training batch to the positions with an answer, where that saves work."""
        return batch

    # Answers.

    @abstractmethod
    def logits_shape(self, batch: int, length: int, config: Any) -> tuple[int, ...]:
        """Return the shape of the model's answers to a batch of sequences of one length."""

    @abstractmethod
    def check_labels(self, labels: Tensor, logits_shape: tuple[int, ...]) -> None:
        """Check the labels of a batch.

        Raises:
            LabelError: on another dtype or shape, or values that do not fit.
        """

    @abstractmethod
    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        """Return whether the answers are of the kind that the labels are, whatever their size."""

    def check_size(self, size: int, description: Description) -> None:  # noqa: B027 (need not)
        """Check the last size of a model's answers.

        Raises:
            ValueError: if it is not the task's; the message goes on from "the task NAME".
        """

    @abstractmethod
    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum up every row of a batch: (batch, sums) of float64, for `summarize`."""

    @abstractmethod
    def summarize(self, scores: np.ndarray, description: Description) -> list[Metric]:
        """Make metrics of the scores (rows, sums) of all rows; the first one is the loss.

        Where the first one is not defined, no answer is due in any row.
        """

    @abstractmethod
    def show(self, logits: Tensor, labels: Tensor, length: int) -> dict[str, Any]:
        """Write down what was due in one row and what was predicted, as plain values.

        Args:
            logits: of the row, without a batch dimension.
            labels: of the row.
            length: of the part of a signal that is shown.
        """


class ClassLabels(Kind):
    """A kind whose labels are classes, at every position or one for a sequence.

    Subclasses give `model_class`.

    Attributes:
        per_position: whether there are labels at every position, or for the whole sequence.
    """

    metrics: ClassVar[Mapping[str, bool]] = {"loss": False, "accuracy": True}
    per_position: ClassVar[bool] = False

    def label_column(self, description: Description) -> Column:
        return Column(True, (None,) if self.per_position else ())

    def label_tensor(self, labels: Any) -> Tensor:
        """Convert integers to int64; others stay as they are, so that scoring may refuse them."""
        tensor = torch.as_tensor(labels)
        return tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.long()

    def check_description(self, description: Description) -> None:
        if not self.per_position and description.num_labels == 1:
            raise ValueError(
                "has one class, so there is nothing to tell apart; a number is the label of a "
                "task of the kind 'signal' or 'regression'."
            )

    def logits_shape(self, batch: int, length: int, config: Any) -> tuple[int, ...]:
        return (
            (batch, length, config.vocab_size) if self.per_position else (batch, config.num_labels)
        )

    def check_labels(self, labels: Tensor, logits_shape: tuple[int, ...]) -> None:
        from gramian.models.labels import check_classes

        check_classes(labels, logits_shape[-1], [logits_shape[:-1]])

    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        return logits.ndim == labels.ndim + 1

    def check_size(self, size: int, description: Description) -> None:
        wanted = description.num_labels
        if wanted is not None and size < wanted:
            raise ValueError(f"has {wanted} classes and the model has {size}.")

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Count right answers and all answers, and sum up -log p; where logits are NaN, right
        answers are too."""
        if labels.ndim == 1:
            logits, labels = logits[:, None], labels[:, None]
        due = labels != IGNORED
        losses = nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        right = ((logits.argmax(-1) == labels) & due).double()
        right = torch.where(losses.isnan(), torch.nan, right)  # among NaN there is no largest
        columns = (right.sum(1), due.sum(1).double(), losses.double().sum(1))
        return torch.stack(columns, dim=-1)

    def summarize(self, scores: np.ndarray, description: Description) -> list[Metric]:
        right, due, losses = scores.T
        metrics = [Metric("loss", losses, due, False), Metric("accuracy", right, due, True)]
        if self.per_position:
            whole = np.where(np.isnan(right), np.nan, right == due)  # rows without a mistake
            metrics.append(Metric("sequence_accuracy", whole, np.ones_like(due), True))
        if description.text:
            metrics.append(Metric("bits_per_byte", losses, due, False, unit=math.log(2)))
        return metrics

    def show(self, logits: Tensor, labels: Tensor, length: int) -> dict[str, Any]:
        predicted = logits.argmax(-1)
        if labels.ndim:
            predicted, labels = predicted[labels != IGNORED], labels[labels != IGNORED]
        return {"due": labels.tolist(), "predicted": predicted.tolist()}


class NumberLabels(Kind):
    """A kind whose labels are real numbers, scored by squared errors.

    Subclasses give `model_class`.

    Attributes:
        per_position: whether there are labels at every position, or for the whole sequence.
    """

    metrics: ClassVar[Mapping[str, bool]] = {"loss": False, "mse": False, "relative_error": False}
    per_position: ClassVar[bool] = False

    def label_column(self, description: Description) -> Column:
        size = description.num_labels
        return Column(False, (None, size) if self.per_position else (size,))

    def label_tensor(self, labels: Any) -> Tensor:
        """Convert to single precision; complex numbers stay, so that scoring may refuse them."""
        tensor = torch.as_tensor(labels)
        return tensor if tensor.is_complex() else tensor.float()

    def logits_shape(self, batch: int, length: int, config: Any) -> tuple[int, ...]:
        return (batch, *([length] if self.per_position else []), config.num_labels)

    def check_labels(self, labels: Tensor, logits_shape: tuple[int, ...]) -> None:
        from gramian.models.labels import check_numbers

        check_numbers(labels, torch.float32, [logits_shape])

    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        return logits.ndim == labels.ndim

    def check_size(self, size: int, description: Description) -> None:
        if description.num_labels not in (None, size):
            where = "at a position" if self.per_position else "for a sequence"
            raise ValueError(
                f"has {description.num_labels} numbers {where} and the model has {size}."
            )

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum up squared errors, count numbers that are due, and sum up their squares."""
        labels, due = labels.double(), labels != IGNORED
        errors = torch.where(due, logits.double() - labels, 0).square()
        energies = torch.where(due, labels, 0).square()
        columns = (errors, due.double(), energies)
        return torch.stack([column.flatten(1).sum(1) for column in columns], dim=-1)

    def summarize(self, scores: np.ndarray, description: Description) -> list[Metric]:
        """Make `mse` and, unless every target is 0, `relative_error`: the root mean squared error
        divided by the root mean square of the targets."""
        errors, count, energies = scores.T
        metrics = [Metric("mse", errors, count, False)]
        if np.any(energies):
            metrics.append(Metric("relative_error", errors, energies, False, root=True))
        return metrics

    def show(self, logits: Tensor, labels: Tensor, length: int) -> dict[str, Any]:
        shown = slice(-length, None) if self.per_position else slice(None)
        return {"due": labels[shown].tolist(), "predicted": logits[shown].tolist()}


_REGISTRY: dict[str, Kind] = {}

KINDS: Mapping[str, Kind] = MappingProxyType(_REGISTRY)
"""Every kind that a `Description` may name."""

_T = TypeVar("_T", bound=type[Kind])


def register_kind(name: str) -> Callable[[_T], _T]:
    """Decorate a subclass of `Kind` to make it known as `name`.

    Raises:
        ValueError: if the name is taken, or the kind and another one disagree on whether higher
            values of a metric are better.
    """

    def add(kind: _T) -> _T:
        if name in _REGISTRY:
            raise ValueError(f"there is a kind {name!r} already: {type(_REGISTRY[name]).__name__}.")
        for metric, higher in kind.metrics.items():
            for other in _REGISTRY.values():
                if other.metrics.get(metric, higher) != higher:
                    raise ValueError(
                        f"the kind {name!r} calls {'higher' if higher else 'lower'} values of "
                        f"{metric} better, and the kind {other.name!r} does not."
                    )
        kind.name = name
        _REGISTRY[name] = kind()
        return kind

    return add


def find_kind(name: str) -> Kind:
    """Return the kind `name`.

    Raises:
        ValueError: if there is none.
    """
    if name not in _REGISTRY:
        raise ValueError(unknown("kind of task", name, _REGISTRY))
    return _REGISTRY[name]


def higher_is_better(metric: str) -> bool:
    """Return whether larger values of a metric are better, by the kinds that choose models by it.

    Raises:
        KeyError: for a metric of no kind.
    """
    return next(kind.metrics[metric] for kind in KINDS.values() if metric in kind.metrics)


def metric_names() -> list[str]:
    """List the metrics by which a model can be chosen, of all kinds."""
    return list(dict.fromkeys(metric for kind in KINDS.values() for metric in kind.metrics))


@register_kind("tokens")
class Tokens(ClassLabels):
    """A label at every position, for a causal language model."""

    packable = True
    accepts_foreign_models = True
    per_position = True
    call_options: ClassVar[Mapping[str, Any]] = {"use_cache": False}

    def model_class(self) -> type[Any]:
        from gramian.models import GramianForCausalLM

        return GramianForCausalLM

    def batch_labels(self, labels: Tensor) -> dict[str, Tensor]:
        """Give the labels as `shift_labels` too, which transformers does not shift."""
        return {"labels": labels, "shift_labels": labels}

    def select_due(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ask for the logits of those positions alone where less than half have an answer.

        Recall tasks ask at a few positions, and the logits over a large vocabulary are most of the
        work of a small model.
        """
        due = batch["shift_labels"] != IGNORED
        if 2 * int(due.sum()) >= due.numel():
            return batch
        return {**batch, "logits_to_keep": due, "shift_labels": batch["shift_labels"][due]}


@register_kind("classification")
class Classification(ClassLabels):
    """One class for a sequence."""

    packable = True
    accepts_foreign_models = True

    def model_class(self) -> type[Any]:
        from gramian.models import GramianForSequenceClassification

        return GramianForSequenceClassification

    def accepts_model(self, model: Any) -> bool:
        return super().accepts_model(model) and model.config.problem_type != "regression"


@register_kind("pairs")
class Pairs(ClassLabels):
    """One class for two sequences, `input_ids` and `input_ids_2`."""

    def model_class(self) -> type[Any]:
        from gramian.models import GramianForPairClassification

        return GramianForPairClassification

    def input_names(self, description: Description) -> tuple[str, ...]:
        (name,) = super().input_names(description)
        return (name, f"{name}_2") if name == "input_ids" else (name,)


@register_kind("signal")
class Signal(NumberLabels):
    """Real numbers at every position."""

    packable = True
    per_position = True

    def model_class(self) -> type[Any]:
        from gramian.models import GramianForSignalRegression

        return GramianForSignalRegression


@register_kind("reconstruction")
class Reconstruction(ClassLabels):
    """The whole input, from the last position."""

    per_position = True

    def model_class(self) -> type[Any]:
        from gramian.models import GramianForReconstruction

        return GramianForReconstruction

    def model_options(self) -> dict[str, Any]:
        return {"pooling": "last"}


@register_kind("regression")
class Regression(NumberLabels):
    """Real numbers for a sequence."""

    packable = True

    def model_class(self) -> type[Any]:
        from gramian.models import GramianForSequenceClassification

        return GramianForSequenceClassification

    def model_options(self) -> dict[str, Any]:
        return {"problem_type": "regression"}

    def accepts_model(self, model: Any) -> bool:
        return super().accepts_model(model) and model.config.problem_type == "regression"
