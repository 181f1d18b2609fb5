"""Check labels and compute their losses, in the same way for every model with a head.

A label of -100 is never scored, neither as a class nor as a number: losses exclude it from their
sum and their count. All other labels are checked, because a NaN or a class out of range would
silently make the loss meaningless. The message of a `LabelError` says in one sentence which labels
were given. The check makes an accelerator wait once for each loss. In a compiled graph, the values
of labels are not checked.

Losses are means over the scored labels, in at least single precision. With `num_items_in_batch`,
they are sums divided by that number. Then the losses of the parts of a batch add up to the loss of
the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian._labels import IGNORED
from gramian.mixers.segments import has_values
from gramian.models.configuration import GramianConfig

__all__ = [
    "IGNORED",
    "LabelError",
    "binary_cross_entropy",
    "check_classes",
    "check_numbers",
    "classification_loss",
    "cross_entropy",
    "label_names",
    "squared_error",
    "token_labels",
]

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class LabelError(ValueError):
    """An error about labels that do not fit the model or the kind of problem that it solves."""


def check_classes(
    labels: Tensor, classes: int, shapes: Sequence[tuple[int, ...]], task: str = ""
) -> Tensor:
    """Check class labels and return them as int64.

    Args:
        labels: integers from 0 to `classes` - 1, or -100. If there are two classes, booleans are
            accepted, too.
        classes: number of classes.
        shapes: the shapes that are accepted.
        task: purpose of the labels, for the message of an error.

    Raises:
        LabelError: if labels have another dtype, shape or value.
    """
    _check_shape(labels, shapes, task)
    if labels.dtype not in INTEGERS and not (labels.dtype == torch.bool and classes == 2):
        raise LabelError(f"labels must be integers{_for(task)}; got {_name(labels.dtype)}.")
    labels = labels.long()
    wrong = ((labels < 0) & (labels != IGNORED)) | (labels >= classes)
    if _any(wrong):
        value, place = _first(labels, wrong)
        raise LabelError(
            f"labels must lie from 0 to {classes - 1}, or be {IGNORED} where nothing is due; got "
            f"{value} at {place}."
        )
    return labels


def token_labels(
    logits: Tensor,
    labels: Tensor,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> dict[str, Tensor]:
    """Check the labels of a causal language model and return them as int64.

    Args:
        logits: (batch, length, vocab_size), or the logits of selected positions.
        labels: (batch, length). The loss shifts them by one.
        shift_labels: labels that are already shifted. They replace `labels`, and have the shape of
            the logits without the last dimension.
        num_items_in_batch: divisor of the loss. If it is None, at least one label must be scored.

    Returns:
        The arguments of transformers' loss: `labels`, and `shift_labels` if they were given.

    Raises:
        LabelError: if labels have another dtype, shape or value, or if no label is scored and
            `num_items_in_batch` is None.
    """
    shape = tuple(logits.shape[:-1])
    given = labels if shift_labels is None else shift_labels
    given = check_classes(given, logits.shape[-1], [shape])
    if num_items_in_batch is None:
        _require((given[..., 1:] if shift_labels is None else given) != IGNORED)
    return {"labels": given} if shift_labels is None else {"labels": labels, "shift_labels": given}


def check_numbers(
    labels: Tensor,
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, ...]],
    task: str = "",
    *,
    real: Tensor | None = None,
    shares: bool = False,
) -> tuple[Tensor, Tensor]:
    """Check labels that are real numbers, and find which of them are scored.

    Args:
        labels: real numbers, or -100 for labels that are not scored.
        dtype: dtype of the returned labels.
        shapes: the shapes that are accepted.
        task: purpose of the labels, for the message of an error.
        real: booleans that broadcast against the labels. Labels where `real` is False are not
            scored and may have any value.
        shares: whether the numbers must lie from 0 to 1.

    Returns:
        The labels in `dtype`, with 0 in place of labels that are not scored; and booleans of the
        same shape, which are true where labels are scored.

    Raises:
        LabelError: if labels are complex, have another shape or are not finite, or if `shares` is
            True and a label is outside of [0, 1].
    """
    _check_shape(labels, shapes, task)
    if labels.is_complex():
        raise LabelError(f"labels must be real numbers{_for(task)}; got {_name(labels.dtype)}.")
    due = labels != IGNORED
    if real is not None:
        due = due & real
    values = labels.to(dtype)
    fitting = (values >= 0) & (values <= 1) if shares else values.isfinite()
    wrong = due & ~fitting
    if _any(wrong):
        value, place = _first(labels, wrong)
        accepted = "lie from 0 to 1" if shares else "be finite numbers"
        raise LabelError(
            f"labels must {accepted}, or be {IGNORED} where nothing is due; got {value:g} at "
            f"{place}."
        )
    return torch.where(due, values, 0), due


def cross_entropy(
    logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Return the mean cross-entropy of logits (…, classes) and checked class labels (…)."""
    logits, labels = _wide(logits).flatten(0, -2), labels.flatten()
    if num_items_in_batch is None:
        _require(labels != IGNORED)
        return nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED)
    total = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / num_items_in_batch


def squared_error(
    logits: Tensor, labels: Tensor, due: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Return the mean squared error of logits and the labels that `check_numbers` returned."""
    errors = torch.where(due, _wide(logits) - labels, 0).square()
    return _mean(errors, due, num_items_in_batch)


def binary_cross_entropy(
    logits: Tensor, labels: Tensor, due: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Return the binary cross-entropy of logits and the labels that `check_numbers` returned."""
    losses = nn.functional.binary_cross_entropy_with_logits(_wide(logits), labels, reduction="none")
    return _mean(torch.where(due, losses, 0), due, num_items_in_batch)


def classification_loss(
    logits: Tensor,
    labels: Tensor,
    config: GramianConfig,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Return the loss for the kind of problem that `config.problem_type` names.

    If `problem_type` is None, the kind is inferred from the labels and their number, and stored in
    the configuration. A label of -100 is not scored, but other labels of the same sequence are.

    Args:
        logits: (batch, num_labels).
        labels: (batch) or (batch, num_labels), depending on the kind of problem.
        config: configuration of the model. Its `problem_type` is set if it is None.
        num_items_in_batch: divisor of the summed loss; by default, the number of scored labels.

    Raises:
        LabelError: if labels have another shape or dtype than the kind of problem requires; if a
            class is out of range; if a number is not finite; if a sequence has several labels, and
            one of them is outside of [0, 1]; or if no label is scored and `num_items_in_batch` is
            None.
    """
    batch, count = logits.shape
    labels, problem = labels.to(logits.device), config.problem_type
    if problem is None:
        single = not labels.is_floating_point() and (labels.dtype != torch.bool or labels.ndim == 1)
        several = "single_label_classification" if single else "multi_label_classification"
        problem = "regression" if count == 1 else several
    accepted: list[tuple[int, ...]] = [(batch, count)]
    if count == 1:
        accepted.append((batch,))
    if problem == "single_label_classification":
        labels = check_classes(labels, count, [(batch,)], problem)
        loss = cross_entropy(logits, labels, num_items_in_batch)
    else:
        wide = torch.promote_types(logits.dtype, torch.float32)
        shares = problem == "multi_label_classification"
        labels, due = check_numbers(labels, wide, accepted, problem, shares=shares)
        error = binary_cross_entropy if shares else squared_error
        shape = logits.shape
        loss = error(logits, labels.reshape(shape), due.reshape(shape), num_items_in_batch)
    config.problem_type = problem
    return loss


def label_names(config: Any) -> list[str] | None:
    """Return the names of a model's labels in the order of their numbers.

    Args:
        config: configuration of a model of transformers.

    Returns:
        The names; or None if the labels have none besides those that transformers makes up.
    """
    names = getattr(config, "id2label", None) or {}
    numbered = [str(names.get(number, "")) for number in range(len(names))]
    made_up = [f"LABEL_{number}" for number in range(len(names))]
    return None if numbered == made_up or not all(numbered) else numbered


def _mean(losses: Tensor, due: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    if num_items_in_batch is None:
        _require(due)
        return losses.sum() / due.sum()
    return losses.sum() / num_items_in_batch


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _require(due: Tensor) -> None:
    if _any(~due.any()):
        raise LabelError(f"labels must leave something to score; all of them are {IGNORED}.")


def _check_shape(labels: Tensor, shapes: Sequence[tuple[int, ...]], task: str) -> None:
    if tuple(labels.shape) not in shapes:
        accepted = " or ".join(map(str, shapes))
        raise LabelError(f"labels must be {accepted}{_for(task)}; got {tuple(labels.shape)}.")


def _any(wrong: Tensor) -> bool:
    """Return whether any entry is true; return False if the tensor's values cannot be read."""
    return has_values(wrong) and bool(wrong.any())


def _first(labels: Tensor, wrong: Tensor) -> tuple[float, str]:
    """Return the first wrong label and its index."""
    place = wrong.nonzero()[0].tolist()
    return labels[tuple(place)].item(), f"[{', '.join(map(str, place))}]"


def _for(task: str) -> str:
    return f" for {task}" if task else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
