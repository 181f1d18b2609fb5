"""Loss and accuracy of a model on a split of a task of `gramian.tasks`."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from gramian._nearest import unknown
from gramian.evaluation._measure import Measure, ratio

if TYPE_CHECKING:
    from gramian.tasks import Task

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
    progress: Callable[[int, int], None] | None = None,
) -> list[Measure]:
    """Loss and accuracy over all answers that are due, as `gramian train` scores them.

    Args:
        model: of ours or of transformers: for tasks of the kind `"tokens"` it gives logits at every
            position, for `"classification"` of a whole sequence.
        task: from `gramian.tasks.build`.
        name: for the measures.
        split: of the task; by default the test split, or the validation split where there is none.
        seed: of what is generated; training with the same seed saw the same training split.
        examples: rows at most; None takes all.
        batch_size: rows at once.
        progress: called as `progress(rows done, rows)`.

    Returns:
        `loss` and `accuracy`; of `"tokens"` also `sequence_accuracy`, rows without a mistake; of
        text also `bits_per_byte`. Standard errors are over rows.

    Raises:
        ValueError: for a task of another kind, one that the model is too small for, an unknown
            split, or no rows.
        ImportError: without what `gramian.training` needs.
    """
    from gramian.training.collation import Collator
    from gramian.training.trainer import score

    description = task.description()
    if description.kind not in ("tokens", "classification"):
        raise ValueError(
            f"tasks of the kind 'tokens' and 'classification' can be scored; {name} is of the kind "
            f"{description.kind!r}."
        )
    if description.vocab_size is not None and model.config.vocab_size < description.vocab_size:
        raise ValueError(
            f"the task {name} has {description.vocab_size} tokens and the model only "
            f"{model.config.vocab_size}."
        )
    split = split or ("test" if "test" in task.splits else "validation")
    if split not in task.splits:
        raise ValueError(unknown(f"split of {name}", split, task.splits))
    rows = list(islice(task.rows(split, seed), examples))
    if not rows:
        raise ValueError(f"the task {name} has no {split} rows with these settings.")
    collate = Collator(description)
    device = next(model.parameters()).device
    scores = []
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for first in range(0, len(rows), batch_size):
                batch = collate(rows[first : first + batch_size])
                labels = batch.pop("labels").to(device)
                batch.pop("shift_labels", None)
                inputs = {key: value.to(device) for key, value in batch.items()}
                if description.kind == "tokens":
                    inputs["use_cache"] = False  # type: ignore[assignment]
                logits = model(**inputs).logits
                if logits.ndim != labels.ndim + 1:
                    raise ValueError(
                        f"the task {name} asks for {description.kind}; the model, a "
                        f"{type(model).__name__}, answers otherwise."
                    )
                scores.append(score(logits, labels).cpu())
                if progress is not None:
                    progress(min(first + batch_size, len(rows)), len(rows))
    finally:
        model.train(training)
    right, due, losses = torch.cat(scores).T.tolist()
    measures = [
        ratio(name, "loss", losses, due, higher_is_better=False),
        ratio(name, "accuracy", right, due, higher_is_better=True),
    ]
    if description.kind == "tokens":
        whole = [float(one == all_) for one, all_ in zip(right, due, strict=True)]
        measures.append(
            ratio(name, "sequence_accuracy", whole, [1.0] * len(whole), higher_is_better=True)
        )
    if description.text:
        measures.append(
            ratio(name, "bits_per_byte", losses, due, higher_is_better=False, scale=1 / math.log(2))
        )
    return measures
