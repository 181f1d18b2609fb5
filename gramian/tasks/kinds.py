"""Define the kinds of tasks. The kind determines the class of models, the labels and the metrics.

Everything that depends on the kind of a task is a method of one object. Training and evaluation
find this object by the name in `Description.kind`. To define a new kind, decorate a subclass of
`ClassLabels`, `NumberLabels` or `Kind` with `register_kind`:

    @register_kind("ages")
    class Ages(NumberLabels):
        def model_class(self):
            return ModelOfAges

A batch is scored row by row: `score` returns a few sums for each row, and `summarize` computes
metrics from the sums of all rows. So no metric depends on the batches to which the rows belong.
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

# `gramian.models` loads transformers, so methods import it when they need a model.

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
        integers: whether the numbers are integers. If not, they are real.
        shape: shape of the column, with None for the row's length.
    """

    integers: bool
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Metric:
    """A metric: the ratio `Σ totals / Σ weights / unit` of sums over rows, or its square root.

    Attributes:
        name: name of the metric.
        totals: (rows,) each row's term of the numerator.
        weights: (rows,) each row's term of the denominator.
        higher_is_better: whether larger values are better.
        unit: number by which the ratio is divided.
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
        """Return whether any row has a positive weight."""
        return bool(np.any(self.weights))

    def value(self) -> float:
        """Return the metric over all rows."""
        total, weight = np.stack([self.totals, self.weights], axis=1).sum(0)
        mean = float(total / weight) / self.unit
        return math.sqrt(mean) if self.root else mean


class Kind(ABC):
    """Everything that training and evaluation need to know about one kind of task.

    Attributes:
        name: name of the kind, set by `register_kind`.
        metrics: the metrics that can select the best model, as a mapping from their names to
            booleans. The value is True if larger values of the metric are better.
        packable: whether several sequences can share a row of a batch.
        accepts_foreign_models: whether `evaluate_task` also accepts models of transformers.
        call_options: arguments with which evaluation calls the model, besides its inputs.
    """

    name: ClassVar[str]
    metrics: ClassVar[Mapping[str, bool]] = {"loss": False}
    packable: ClassVar[bool] = False
    accepts_foreign_models: ClassVar[bool] = False
    call_options: ClassVar[Mapping[str, Any]] = {}

    # The model.

    @abstractmethod
    def model_class(self) -> type[Any]:
        """Return the class of the models that are trained."""

    def model_options(self) -> dict[str, Any]:
        """Return the fields of `GramianConfig` that the kind sets if the user does not."""
        return {}

    def accepts_model(self, model: Any) -> bool:
        """Return whether a Gramian model can be scored on tasks of this kind."""
        return isinstance(model, self.model_class())

    def check_description(self, description: Description) -> None:  # noqa: B027 (need not check)
        """Check that the task has something to learn.

        Raises:
            ValueError: if it has nothing to learn. The caller puts "the task NAME" before the
                message.
        """

    # Rows and batches.

    def input_names(self, description: Description) -> tuple[str, ...]:
        """Return the names of a row's inputs."""
        return ("input_ids",) if description.input_size is None else ("input_values",)

    @abstractmethod
    def label_column(self, description: Description) -> Column:
        """Return the layout of a row's labels."""

    def columns(self, description: Description) -> dict[str, Column]:
        """Return a mapping from the names of a row's inputs and labels to their layouts."""
        values = Column(False, (None, description.input_size))
        found = {
            name: Column(True, (None,)) if name.startswith("input_ids") else values
            for name in self.input_names(description)
        }
        return found | {"labels": self.label_column(description)}

    @abstractmethod
    def label_tensor(self, labels: Any) -> Tensor:
        """Convert the labels of one row to a tensor, without checking them."""

    def batch_labels(self, labels: Tensor) -> dict[str, Tensor]:
        """Return the labels of a batch under the names of the model's arguments."""
        return {"labels": labels}

    def select_due(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a training batch, restricted to the labelled positions if that saves work."""
        return batch

    # Answers.

    @abstractmethod
    def logits_shape(self, batch: int, length: int, config: Any) -> tuple[int, ...]:
        """Return the shape of the logits for a batch of sequences of one length."""

    @abstractmethod
    def check_labels(self, labels: Tensor, logits_shape: tuple[int, ...]) -> None:
        """Check the labels of a batch.

        Raises:
            LabelError: if the labels have the wrong dtype or shape, or a value is invalid.
        """

    @abstractmethod
    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        """Return whether the layout of the logits matches the layout of the labels.

        The size of the logits' last dimension is ignored. `check_size` checks this size.
        """

    def check_size(self, size: int, description: Description) -> None:  # noqa: B027 (need not)
        """Check the size of the last dimension of the logits.

        Raises:
            ValueError: if the size does not match the task. The caller puts "the task NAME" before
                the message.
        """

    @abstractmethod
    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the sums that `summarize` needs for every row of a batch.

        Returns:
            (batch, sums), float64.
        """

    @abstractmethod
    def summarize(self, scores: np.ndarray, description: Description) -> list[Metric]:
        """Compute the metrics from the scores (rows, sums) of all rows.

        The first metric is the loss. It is undefined if no row has a label to score.
        """

    def check_teaching(self, temperature: float) -> None:
        """Check that a model can learn such a task from a teacher's logits, by `divergence`.

        Args:
            temperature: temperature of the divergence, above 0.

        Raises:
            ValueError: if it cannot. The caller puts "the task NAME" before the message.
        """
        raise ValueError(f"is of the kind {self.name!r}, which has no divergence from a teacher.")

    def divergence(
        self, logits: Tensor, targets: Tensor, labels: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Return how far the logits of a model are from those of its teacher.

        Args:
            logits: logits of the model.
            targets: logits of the teacher, of the same shape.
            labels: labels of the batch. Only logits that have a label count.
            temperature: temperature of both distributions, above 0.

        Returns:
            The sum of the divergences over the labels, a number with gradients.

        Raises:
            ValueError: if `check_teaching` raises one.
        """
        self.check_teaching(temperature)
        raise NotImplementedError(f"the kind {self.name!r} must define its divergence.")

    @abstractmethod
    def show(self, logits: Tensor, labels: Tensor, length: int) -> dict[str, Any]:
        """Return the targets and the predictions of one row as plain values.

        Args:
            logits: logits of the row, without a batch dimension.
            labels: labels of the row.
            length: if labels are numbers at positions, how many of the last positions to show.
        """


class ClassLabels(Kind):
    """A kind whose labels are classes.

    Subclasses implement `model_class`.

    Attributes:
        per_position: whether each position has a label. If not, each sequence has one label.
    """

    metrics: ClassVar[Mapping[str, bool]] = {"loss": False, "accuracy": True}
    per_position: ClassVar[bool] = False

    def label_column(self, description: Description) -> Column:
        return Column(True, (None,) if self.per_position else ())

    def label_tensor(self, labels: Any) -> Tensor:
        """Convert integers to int64, and keep other numbers, which `check_labels` refuses."""
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
        """Return each row's number of correct predictions, number of labels, and sum of -log p.

        Here p is the predicted probability of a label. If logits are NaN, the number of correct
        predictions is also NaN.
        """
        if labels.ndim == 1:
            logits, labels = logits[:, None], labels[:, None]
        due = labels != IGNORED
        losses = nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        right = ((logits.argmax(-1) == labels) & due).double()
        right = torch.where(losses.isnan(), torch.nan, right)  # NaN logits have no largest value
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

    def check_teaching(self, temperature: float) -> None:
        """Accept every temperature, because logits of classes are distributions."""

    def divergence(
        self, logits: Tensor, targets: Tensor, labels: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Return `T² Σ KL(p ‖ q)`, in nats (Hinton, Vinyals and Dean, arXiv 1503.02531).

        At each label, p and q are the distributions of the teacher and of the model at the
        temperature T. The factor T² keeps the size of the gradients.

        Args:
            logits: (…, classes) logits of the model.
            targets: (…, classes) logits of the teacher.
            labels: (…) classes. Where a label is -100, the logits do not count.
            temperature: T, above 0.

        Returns:
            The sum, a number in at least single precision.
        """
        due = labels != IGNORED
        wide = torch.promote_types(logits.dtype, torch.float32)
        q, p = (
            nn.functional.log_softmax(one[due].to(wide) / temperature, dim=-1)
            for one in (logits, targets)
        )
        return temperature**2 * nn.functional.kl_div(q, p, reduction="sum", log_target=True)

    def show(self, logits: Tensor, labels: Tensor, length: int) -> dict[str, Any]:
        predicted = logits.argmax(-1)
        if labels.ndim:
            predicted, labels = predicted[labels != IGNORED], labels[labels != IGNORED]
        return {"due": labels.tolist(), "predicted": predicted.tolist()}


class NumberLabels(Kind):
    """A kind whose labels are real numbers, scored by squared errors.

    Subclasses implement `model_class`.

    Attributes:
        per_position: whether each position has labels. If not, each sequence has labels.
    """

    metrics: ClassVar[Mapping[str, bool]] = {"loss": False, "mse": False, "relative_error": False}
    per_position: ClassVar[bool] = False

    def label_column(self, description: Description) -> Column:
        size = description.num_labels
        return Column(False, (None, size) if self.per_position else (size,))

    def label_tensor(self, labels: Any) -> Tensor:
        """Convert real numbers to float32. Keep complex numbers, which `check_labels` refuses."""
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
        """Return each row's sum of squared errors, count of targets, and sum of squared targets."""
        labels, due = labels.double(), labels != IGNORED
        errors = torch.where(due, logits.double() - labels, 0).square()
        energies = torch.where(due, labels, 0).square()
        columns = (errors, due.double(), energies)
        return torch.stack([column.flatten(1).sum(1) for column in columns], dim=-1)

    def summarize(self, scores: np.ndarray, description: Description) -> list[Metric]:
        """Compute `mse` and, unless every target is 0, `relative_error`.

        The relative error is the root mean square of the errors, divided by the root mean square of
        the targets.
        """
        errors, count, energies = scores.T
        metrics = [Metric("mse", errors, count, False)]
        if np.any(energies):
            metrics.append(Metric("relative_error", errors, energies, False, root=True))
        return metrics

    def check_teaching(self, temperature: float) -> None:
        if temperature != 1:
            raise ValueError(
                "has numbers for labels, which have no temperature other than 1; got "
                f"{temperature:g}."
            )

    def divergence(
        self, logits: Tensor, targets: Tensor, labels: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Return the sum of the squared differences from the teacher's numbers.

        Args:
            logits: numbers that the model predicts.
            targets: numbers that the teacher predicts, of the same shape.
            labels: labels, of the same shape. Where a label is -100, the numbers do not count.
            temperature: 1, because numbers are no distribution.

        Raises:
            ValueError: if the temperature is not 1.
        """
        self.check_teaching(temperature)
        errors = logits.to(torch.promote_types(logits.dtype, torch.float32)) - targets
        return torch.where(labels != IGNORED, errors, 0).square().sum()

    def show(self, logits: Tensor, labels: Tensor, length: int) -> dict[str, Any]:
        shown = slice(-length, None) if self.per_position else slice(None)
        return {"due": labels[shown].tolist(), "predicted": logits[shown].tolist()}


_REGISTRY: dict[str, Kind] = {}

KINDS: Mapping[str, Kind] = MappingProxyType(_REGISTRY)
"""The registered kinds by the names that `Description.kind` accepts."""

_T = TypeVar("_T", bound=type[Kind])


def register_kind(name: str) -> Callable[[_T], _T]:
    """Return a decorator that registers a subclass of `Kind` under `name`.

    Raises:
        ValueError: if another kind is registered under `name`, or if another kind has a metric of
            the same name and disagrees on whether larger values are better.
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
        ValueError: if no kind has this name.
    """
    if name not in _REGISTRY:
        raise ValueError(unknown("kind of task", name, _REGISTRY))
    return _REGISTRY[name]


def higher_is_better(metric: str) -> bool:
    """Return whether larger values of a metric are better.

    Raises:
        KeyError: if no kind has the metric in `metrics`.
    """
    return next(kind.metrics[metric] for kind in KINDS.values() if metric in kind.metrics)


def metric_names() -> list[str]:
    """Return the names of the metrics, of all kinds, that can select the best model."""
    return list(dict.fromkeys(metric for kind in KINDS.values() for metric in kind.metrics))


@register_kind("tokens")
class Tokens(ClassLabels):
    """The kind of tasks with a class at every position, for causal language models."""

    packable = True
    accepts_foreign_models = True
    per_position = True
    call_options: ClassVar[Mapping[str, Any]] = {"use_cache": False}

    def model_class(self) -> type[Any]:
        from gramian.models import GramianForCausalLM

        return GramianForCausalLM

    def batch_labels(self, labels: Tensor) -> dict[str, Tensor]:
        """Return the labels also as `shift_labels`, because transformers shifts `labels`."""
        return {"labels": labels, "shift_labels": labels}

    def select_due(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Restrict the logits to the labelled positions if these are fewer than half of all.

        Recall tasks label few positions, and the logits over a large vocabulary are most of the
        work of a small model.
        """
        due = batch["shift_labels"] != IGNORED
        if 2 * int(due.sum()) >= due.numel():
            return batch
        return {**batch, "logits_to_keep": due, "shift_labels": batch["shift_labels"][due]}


@register_kind("classification")
class Classification(ClassLabels):
    """The kind of tasks with one class for each sequence."""

    packable = True
    accepts_foreign_models = True

    def model_class(self) -> type[Any]:
        from gramian.models import GramianForSequenceClassification

        return GramianForSequenceClassification

    def accepts_model(self, model: Any) -> bool:
        return super().accepts_model(model) and model.config.problem_type != "regression"


@register_kind("token_classification")
class TokenClassification(ClassLabels):
    """The kind of tasks with a class at every position. The classes are not token ids."""

    packable = True
    accepts_foreign_models = True
    per_position = True

    def model_class(self) -> type[Any]:
        from gramian.models import GramianForTokenClassification

        return GramianForTokenClassification

    def model_options(self) -> dict[str, Any]:
        return {"problem_type": "single_label_classification"}

    def check_description(self, description: Description) -> None:
        if description.num_labels == 1:
            raise ValueError("has one class, so there is nothing to tell apart.")

    def logits_shape(self, batch: int, length: int, config: Any) -> tuple[int, ...]:
        return (batch, length, config.num_labels)


@register_kind("pairs")
class Pairs(ClassLabels):
    """The kind of tasks with one class for two sequences, `input_ids` and `input_ids_2`."""

    def model_class(self) -> type[Any]:
        from gramian.models import GramianForPairClassification

        return GramianForPairClassification

    def input_names(self, description: Description) -> tuple[str, ...]:
        (name,) = super().input_names(description)
        return (name, f"{name}_2") if name == "input_ids" else (name,)


@register_kind("signal")
class Signal(NumberLabels):
    """The kind of tasks with real numbers at every position."""

    packable = True
    per_position = True

    def model_class(self) -> type[Any]:
        from gramian.models import GramianForSignalRegression

        return GramianForSignalRegression


@register_kind("reconstruction")
class Reconstruction(ClassLabels):
    """The kind of tasks that decode the whole input from its last position."""

    per_position = True

    def model_class(self) -> type[Any]:
        from gramian.models import GramianForReconstruction

        return GramianForReconstruction

    def model_options(self) -> dict[str, Any]:
        return {"pooling": "last"}


@register_kind("regression")
class Regression(NumberLabels):
    """The kind of tasks with real numbers for each sequence."""

    packable = True

    def model_class(self) -> type[Any]:
        from gramian.models import GramianForSequenceClassification

        return GramianForSequenceClassification

    def model_options(self) -> dict[str, Any]:
        return {"problem_type": "regression"}

    def accepts_model(self, model: Any) -> bool:
        return super().accepts_model(model) and model.config.problem_type == "regression"
