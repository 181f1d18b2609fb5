"""Compute the metrics of a model on a split of a task of `gramian.tasks`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gramian._modules import in_mode
from gramian.evaluation._measure import Measure, ratio
from gramian.tasks import choose_split, find_kind
from gramian.tasks.encoding import load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from gramian.tasks import Description, Task

__all__ = ["evaluate_task"]


def evaluate_task(
    model: Any,
    task: Task,
    *,
    name: str = "task",
    split: str | None = None,
    seed: int = 0,
    examples: int | None = None,
    batch_size: int = 32,
    tokenizer: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Measure]:
    """Score a model over all labels of a split, as `gramian train` does.

    Args:
        model: a Gramian model of the class that `gramian train` makes for the task; or a model of
            transformers. The latter must have logits at every position for a task of the kind
            `"tokens"`, and logits for the whole sequence for `"classification"`.
        task: a task from `gramian.tasks.build`.
        name: name of the task in the measures.
        split: split of the task; by default test, or validation if the task has no test split.
        seed: seed of the generated rows. Training with this seed used the same training split.
        examples: largest number of rows; None uses all.
        batch_size: number of rows in a batch.
        tokenizer: the model's own tokenizer; by default, the tokenizer in the model's folder, if
            the folder has one. It encodes tasks of text. If the model has no tokenizer, the task's
            own token ids are used, and the model's EOS and padding tokens must have the same ids.
        progress: function called as `progress(done, total)` with numbers of rows, or None.

    Returns:
        One measure for each metric, with a standard error over rows. If labels are classes, the
        metrics are `loss` and `accuracy`. Tasks of the kinds `"tokens"` and `"reconstruction"` also
        have `sequence_accuracy`, the share of rows without a mistake, and text also has
        `bits_per_byte`. If labels are numbers, the metrics are `mse` and `relative_error`, the RMSE
        divided by the RMS of the targets. If the model's outputs are NaN, the values are NaN too.

    Raises:
        ValueError: if the task does not match the model's class, sizes or tokenizer; if the split
            is unknown or empty; or if labels are invalid.
        ImportError: if a package that `gramian.training` needs is not installed.
    """
    from gramian.models.labels import label_names
    from gramian.training.collation import Collator

    task = _in_tokens_of(model, name, task, tokenizer)
    names = label_names(model.config)
    if names is not None:
        task = task.with_classes(names)
    description = task.description()
    kind = find_kind(description.kind)
    _check(model, name, description)
    split = choose_split(task, name, split)
    rows = list(islice(task.checked_rows(split, seed), examples))
    if not rows:
        raise ValueError(f"the task {name} has no {split} rows with these settings.")
    collate = Collator(description)
    device = next(model.parameters()).device
    scores = []
    with in_mode(model, training=False), torch.no_grad():
        for first in range(0, len(rows), batch_size):
            batch = collate(rows[first : first + batch_size])
            labels = batch.pop("labels").to(device)
            batch.pop("shift_labels", None)
            inputs = {key: value.to(device) for key, value in batch.items()}
            logits = model(**inputs, **kind.call_options).logits
            _check_answers(logits, labels, model, name, description)
            kind.check_labels(labels, tuple(logits.shape))
            scores.append(kind.score(logits, labels).cpu())
            if progress is not None:
                progress(min(first + batch_size, len(rows)), len(rows))
    metrics = kind.summarize(torch.cat(scores).numpy(), description)
    if not metrics[0].defined:
        raise ValueError(f"no answer is due in the {len(rows)} {split} rows of the task {name}.")
    return [
        ratio(
            name,
            metric.name,
            metric.totals.tolist(),
            metric.weights.tolist(),
            higher_is_better=metric.higher_is_better,
            scale=1 / metric.unit,
            of="root" if metric.root else "mean",
        )
        for metric in metrics
    ]


def _in_tokens_of(model: Any, name: str, task: Task, tokenizer: Any) -> Task:
    """Return the task in the model's token ids, or unchanged if the model has no tokenizer.

    Raises:
        ValueError: if there is no tokenizer, and the id of a special token differs.
    """
    from gramian.models.adapters import tokenizer_folder

    own = task.own_tokenizer()
    if own is None:
        return task
    if tokenizer is None:
        folder = tokenizer_folder(Path(str(getattr(model.config, "_name_or_path", "") or ".")))
        if folder != Path() and (folder / "tokenizer_config.json").is_file():
            tokenizer = load_tokenizer(str(folder))
    if tokenizer is not None:
        return task.tokens_of(tokenizer)
    for what in ("eos_token_id", "pad_token_id"):
        has, wanted = getattr(model.config, what, None), getattr(own, what)
        known = isinstance(has, int) and has < model.config.vocab_size
        if known and wanted is not None and has != wanted:
            raise ValueError(
                f"the task {name} has tokens of another kind than the model, whose {what} is {has} "
                f"and not {wanted}; give the model's tokenizer."
            )
    return task


def _check(model: Any, name: str, description: Description) -> None:
    """Check that the model fits the task."""
    from gramian.models import GramianPreTrainedModel

    kind = find_kind(description.kind)
    ours = isinstance(model, GramianPreTrainedModel)
    if not (kind.accepts_model(model) or (kind.accepts_foreign_models and not ours)):
        raise _otherwise(model, name, description)
    config = model.config
    if description.vocab_size is not None and config.vocab_size < description.vocab_size:
        raise ValueError(
            f"the task {name} has {description.vocab_size} tokens and the model only "
            f"{config.vocab_size}."
        )
    if ours and config.input_size != description.input_size:
        raise ValueError(
            f"the task {name} has {_inputs(description.input_size)} and the model takes "
            f"{_inputs(config.input_size)}."
        )


def _check_answers(
    logits: Tensor, labels: Tensor, model: Any, name: str, description: Description
) -> None:
    """Check that the logits and the labels fit together."""
    kind = find_kind(description.kind)
    if not kind.fits(logits, labels):
        raise _otherwise(model, name, description)
    try:
        kind.check_size(logits.shape[-1], description)
    except ValueError as error:
        raise ValueError(f"the task {name} {error}") from error


def _inputs(size: int | None) -> str:
    return "token ids" if size is None else f"inputs of {size} numbers"


def _otherwise(model: Any, name: str, description: Description) -> ValueError:
    wanted = find_kind(description.kind).model_class().__name__
    return ValueError(
        f"the task {name} is of the kind {description.kind!r}, for which a {wanted} is needed; the "
        f"model is a {type(model).__name__}."
    )
