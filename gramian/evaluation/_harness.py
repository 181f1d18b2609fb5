"""Run tasks of EleutherAI's lm-evaluation-harness on a model that is in memory."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gramian._modules import in_mode
from gramian.evaluation._measure import Measure, ratio

__all__ = ["HarnessError", "evaluate_harness"]


class HarnessError(ValueError):
    """An error of the harness. The message is one sentence."""


_TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"
"""The key by which transformers records that a tokenizer has warned of too long a text."""


def evaluate_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> list[Measure]:
    """Score a model on tasks of lm-evaluation-harness.

    Args:
        model: a causal language model of Gramian or of transformers.
        tokenizer: the model's tokenizer.
        tasks: names of tasks that the harness knows or that YAML files under `include_path` define.
        include_path: folder of your own task files; None if there are none.
        limit: largest number of documents of each task; None uses all.
        shots: number of solved examples before each question; None uses each task's own number.
        batch_size: number of requests in a batch.
        seed: seed of all random numbers that the tasks use.

    Returns:
        One measure for every metric of every task and group of tasks. If a metric is a mean over
        documents, or a function of a mean, its measure contains influences, so that the difference
        between two models can be paired. Other measures contain the standard error of the harness,
        if it returns one.

    Raises:
        ImportError: if lm-evaluation-harness is not installed.
        HarnessError: if a task is unknown, or the harness fails.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            'tasks of lm-evaluation-harness need lm-eval: pip install "gramian[evaluate]".',
            name="lm_eval",
        ) from error
    from gramian import tasks as ours

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    where = None if include_path is None else str(include_path)
    manager = None
    if where is not None:  # to index the harness's own thousands of files takes a while
        manager = TaskManager(include_path=where, include_defaults=False)
    if manager is None or any(task not in manager.all_tasks for task in tasks):
        manager = TaskManager(include_path=where)
    for task in tasks:
        if task not in manager.all_tasks:
            known = [*ours.names(), *manager.all_tasks]
            near = difflib.get_close_matches(task, known, n=1, cutoff=0.5)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise HarnessError(
                f"unknown task {task!r}, neither of gramian.tasks nor of lm-evaluation-harness."
                f"{meant}"
            )
    # The harness truncates texts that are too long, so the "indexing errors" of which tokenizers
    # warn cannot occur.
    getattr(tokenizer, "deprecation_warnings", {})[_TOO_LONG] = True
    try:
        with in_mode(model, training=False):
            found = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                num_fewshot=shots,
                log_samples=True,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except Exception as error:  # the harness raises exceptions of many classes
        raise HarnessError(
            f"lm-evaluation-harness failed on {', '.join(tasks)}: {type(error).__name__}: {error}"
        ) from error
    assert found is not None
    measures = []
    every = [sample for samples in found["samples"].values() for sample in samples]
    for task, results in found["results"].items():
        samples = found["samples"].get(task, [])
        lost = any(_is_lost(one.get("resps")) for one in samples or every)
        higher = found.get("higher_is_better", {}).get(task, {})
        for key, value in results.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            name = metric if kind == "none" else f"{metric} ({kind})"
            documents = [one for one in samples if one["filter"] == kind]
            direction = higher.get(metric)
            if lost:
                measures.append(Measure(task, name, math.nan, None, len(documents), direction))
                continue
            spread = results.get(f"{metric}_stderr,{kind}")
            deviation = float(spread) if isinstance(spread, int | float) else None
            values = [one[metric] for one in documents if metric in one]
            measures.append(_measure(task, name, float(value), deviation, direction, values))
    return measures


def _measure(
    task: str,
    metric: str,
    value: float,
    error: float | None,
    higher: bool | None,
    samples: list[Any],
) -> Measure:
    """Make a measure, with influences if the values of the documents give the metric's value."""
    better = bool(higher)
    guesses = []
    if samples and all(isinstance(one, int | float) for one in samples):
        ones = [1.0] * len(samples)
        guesses = [ratio(task, metric, [float(s) for s in samples], ones, higher_is_better=better)]
    elif samples and all(_is_weighted(one) for one in samples):
        logs, weights = ([float(one[i]) for one in samples] for i in (0, 1))
        for scale, power in ((-1.0, True), (-1 / math.log(2), False), (-1.0, False)):
            options: dict[str, Any] = {
                "scale": scale,
                "of": "exponential" if power else "mean",
                "higher_is_better": better,
            }
            guesses.append(ratio(task, metric, logs, weights, **options))
    for guess in guesses:
        if math.isclose(guess.value, value, rel_tol=1e-6, abs_tol=1e-9):
            return guess
    return Measure(task, metric, value, error, len(samples), higher)


def _is_lost(answers: Any) -> bool:
    """Return whether the model's answers contain NaN. Comparisons are then meaningless."""
    if isinstance(answers, list | tuple):
        return any(map(_is_lost, answers))
    return isinstance(answers, float) and math.isnan(answers)


def _is_weighted(sample: Any) -> bool:
    """Return whether a sample is a pair of a log-likelihood and a number of words or bytes."""
    return (
        isinstance(sample, list | tuple)
        and len(sample) == 2
        and all(isinstance(one, int | float) for one in sample)
        and sample[1] > 0
    )
