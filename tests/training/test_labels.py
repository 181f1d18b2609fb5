"""Labels in whole runs: what is -100 counts nowhere, what does not fit is told in one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from gramian import tasks
from gramian.evaluation import evaluate_task
from gramian.tasks import find_kind
from gramian.training import ConfigError, parse_config, train
from gramian.training.collation import Collator
from gramian.training.recording import read_lines

Run = Callable[..., dict[str, Any]]
KINDS = ("tokens", "classification", "pairs", "signal", "reconstruction", "regression")


def slow(kind: str) -> Any:
    return pytest.param(kind, marks=pytest.mark.slow)


def build(kind: str, **settings: Any) -> tasks.Task:
    return tasks.build("test/labelled", kind=kind, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_ignored_counts_nowhere(tmp_path: Path, kind: str, run: Run) -> None:
    """The last evaluation beside one label after another, and beside `evaluate_task`."""
    report = train(parse_config(run(tmp_path / "run", kind, task__share=0.4)))
    model = find_kind(kind).model_class().from_pretrained(tmp_path / "run" / "last").double().eval()
    task = build(kind, share=0.4)
    losses, right = [], []
    for row in task.rows("validation", 0):
        batch = Collator(task.description())([row])
        labels = batch.pop("labels")[0]
        batch.pop("shift_labels", None)
        with torch.no_grad():
            logits = model(**batch).logits[0]
        if kind in ("signal", "regression"):
            pairs = zip(logits.flatten().tolist(), labels.flatten().tolist(), strict=True)
            losses += [(value - label) ** 2 for value, label in pairs if label != -100]
            continue
        for values, label in zip(
            logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).tolist(), strict=True
        ):
            if label != -100:
                losses.append(-values.log_softmax(-1)[label].item())
                right.append(values.argmax().item() == label)
    assert report.metrics["loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-5)
    if right:
        assert report.metrics["accuracy"] == pytest.approx(sum(right) / len(right))
    measured = evaluate_task(model.float(), task, split="validation")
    for one in measured:
        name = "loss" if one.metric == "mse" else one.metric
        assert one.value == pytest.approx(report.metrics[name], rel=1e-5), one.metric


@pytest.mark.parametrize("kind", ["signal", *(slow(kind) for kind in KINDS if kind != "signal")])
def test_parts_of_a_batch_give_the_losses_of_one(tmp_path: Path, kind: str, run: Run) -> None:
    """Parts in which more and less is due, some of them nothing."""
    losses = []
    for parts in (1, 8):
        changes = {"task__share": 0.6, "optimization__accumulation": parts}
        train(parse_config(run(tmp_path / str(parts), kind, **changes)))
        lines = read_lines(tmp_path / str(parts) / "metrics.jsonl")
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


WRONG = [
    ("tokens", {"put": 4}, "labels must lie from 0 to 3, or be -100 .* got 4 at"),
    ("tokens", {"put": -1}, "labels must lie from 0 to 3, .* got -1 at"),
    ("tokens", {"integers": False}, "labels must be integers; .* has float64"),
    ("tokens", {"labels": "longer"}, r"labels must be of shape \(10,\); .* has \(11,\)"),
    ("classification", {"labels": "longer"}, r"labels must be of shape \(\); .* has \(2,\)"),
    ("signal", {"labels": "longer"}, r"labels must be of shape \(10, 4\); .* has \(11, 4\)"),
    ("signal", {"labels": "nested"}, r"of shape \(10, 4\); .* has \(1, 10, 4\)"),
    ("pairs", {"labels": "missing"}, "a row of the .* split has no labels"),
    ("reconstruction", {"labels": "words"}, "labels must be integers; .* has <U"),
    ("tokens", {"labels": "other tokens"}, "input_ids must lie from 0 to 3; .* has 10"),
    ("tokens", {"put": 0.5}, "labels must be integers; .* has float64"),
    ("reconstruction", {"put": 7}, "labels must lie from 0 to 3, .* got 7 at"),
    ("reconstruction", {"put": math.nan}, "labels must be integers; .* has float64"),
    ("classification", {"put": 4}, "labels must lie from 0 to 3, .* got 4 at"),
    ("classification", {"put": -99}, "labels must lie from 0 to 3, .* got -99 at"),
    ("classification", {"put": math.nan}, "labels must be integers; .* has float64"),
    ("classification", {"integers": False}, "labels must be integers; .* has float64"),
    ("classification", {"num_labels": 1}, "has one class, so there is nothing to tell apart"),
    ("pairs", {"put": 400}, "labels must lie from 0 to 3, .* got 400 at"),
    ("pairs", {"put": 0.5}, "labels must be integers; .* has float64"),
    ("pairs", {"num_labels": 1}, "has one class, so there is nothing to tell apart"),
    ("signal", {"put": math.nan}, "labels must be finite numbers, or be -100 .* got nan at"),
    ("signal", {"put": math.inf}, "labels must be finite numbers, .* got inf at"),
    ("signal", {"put": -math.inf}, "labels must be finite numbers, .* got -inf at"),
    ("regression", {"put": math.nan}, "labels must be finite numbers, or be -100 .* got nan at"),
    ("regression", {"labels": "longer"}, r"labels must be of shape \(4,\); .* has \(5,\)"),
    ("regression", {"labels": "nested"}, r"of shape \(4,\); .* has \(1, 4\)"),
]


@pytest.mark.parametrize("split", ["train", pytest.param("validation", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "settings", "sentence"), WRONG)
def test_labels_that_do_not_fit_are_told(
    tmp_path: Path, run: Run, kind: str, settings: dict[str, Any], sentence: str, split: str
) -> None:
    values = run(tmp_path / "run", kind)
    values["task"] |= settings | {"split": split}
    with pytest.raises(ConfigError, match=sentence) as caught:
        train(parse_config(values))
    assert "\n" not in str(caught.value) and "test/labelled" in str(caught.value)


@pytest.mark.parametrize(("kind", "settings", "sentence"), WRONG)
def test_evaluation_tells_the_same(kind: str, settings: dict[str, Any], sentence: str) -> None:
    from gramian.models import GramianConfig

    if settings.get("num_labels") == 1:
        pytest.skip("one class may be measured: there is no mistake")
    description = build(kind).description()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_heads": 2}
    taken = {
        "vocab_size": description.vocab_size or 4,
        "input_size": description.input_size,
        "num_labels": description.num_labels,
    } | find_kind(kind).model_options()
    model = find_kind(kind).model_class()(GramianConfig(**sizes, **taken))
    task = build(kind, **settings, split="test")
    with pytest.raises(ValueError, match=sentence) as caught:
        evaluate_task(model, task)
    assert "\n" not in str(caught.value)


def test_a_run_without_a_label_is_told(tmp_path: Path, run: Run) -> None:
    for kind in ("tokens", "signal"):
        values = run(tmp_path / kind, kind, task__share=1.0)
        with pytest.raises(ConfigError, match="no answer is due in the rows"):
            train(parse_config(values))


def test_targets_of_zero_have_no_relative_error(tmp_path: Path, run: Run) -> None:
    values = run(tmp_path / "run", "signal", task__share=1.0)
    values["task"] |= {"put": 0.0, "split": "validation"}
    report = train(parse_config(values))
    assert "relative_error" not in report.metrics and report.metrics["mse"] >= 0
    values = run(tmp_path / "other", "signal", task__share=1.0, evaluation__metric="relative_error")
    values["task"] |= {"put": 0.0, "split": "validation"}
    with pytest.raises(ConfigError, match="which has no value where every target is 0"):
        train(parse_config(values))
