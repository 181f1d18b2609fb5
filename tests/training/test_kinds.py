"""Every kind of task has a model that is trained, scored by its definition and sampled."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("yaml")

from transformers import TrainingArguments

from gramian.evaluation import evaluate_task
from gramian.models import (
    GramianConfig,
    GramianForCausalLM,
    GramianForPairClassification,
    GramianForReconstruction,
    GramianForSequenceClassification,
    GramianForSignalRegression,
    GramianPreTrainedModel,
)
from gramian.tasks import (
    KINDS,
    Column,
    Description,
    GeneratedTask,
    Kind,
    Metric,
    _task,
    build,
    kinds,
    register_kind,
)
from gramian.training import ConfigError, parse_config, train
from gramian.training.collation import Collator
from gramian.training.recording import read_lines
from gramian.training.trainer import GramianTrainer

RTF = {"type": "rtf", "state_size": 16, "stability": "schur", "initialization": "zeros"}
DELAY = {
    "name": "delay",
    "length": 64,
    "lag": 9,
    "lags": 2,
    "step": 0.001,
    "frequency": 200.0,
    "train_examples": 64,
    "eval_examples": 20,
}


def run(folder: Path, task: dict[str, Any], model: dict[str, Any], **sections: Any) -> Any:
    values = {
        "output": str(folder),
        "task": task,
        "model": {"num_hidden_layers": 1, "hidden_size": 8, "mixers": "long_convolution", **model},
        "optimization": {"steps": 60, "batch_size": 16, "learning_rate": 0.01},
        "evaluation": {"every": 30, "batch_size": 8},
        "logging": {"every": 10},
        "hardware": {"device": "cpu", "threads": 1},
    }
    for section, changes in sections.items():
        values[section] = {**values[section], **changes}
    return parse_config(values)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]


def held_out(task: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    settings = {key: value for key, value in task.items() if key != "name"}
    return list(build(task["name"], **settings).dataset("validation", 0))


def test_every_kind_is_a_kind_of_model_and_of_metric() -> None:
    for name, kind in KINDS.items():
        assert kind.name == name and kind.metrics["loss"] is False
        assert issubclass(kind.model_class(), GramianPreTrainedModel)


def test_delay_is_learnt_by_a_linear_model(tmp_path: Path) -> None:
    model = {"filter": RTF, "block": "mixer", "initializer_range": 0.3}
    sections = {"evaluation": {"metric": "relative_error", "every": 30, "sample_length": 5}}
    report = train(run(tmp_path / "run", DELAY, model, **sections))
    logged = losses(tmp_path / "run")
    assert logged[-1] < 0.5 * logged[0]

    saved = GramianForSignalRegression.from_pretrained(tmp_path / "run" / "last")
    assert saved.config.num_labels == 2 and saved.config.input_size == 1
    errors = energy = count = 0.0
    with torch.no_grad():
        for row in held_out(DELAY):
            due = row["labels"].double()
            given = saved(input_values=row["input_values"][None]).logits[0].double()
            errors += float((given - due).square().sum())
            energy += float(due.square().sum())
            count += due.numel()
    assert count == 20 * 64 * 2
    assert report.metrics["loss"] == report.metrics["mse"] == pytest.approx(errors / count)
    assert report.metrics["relative_error"] == pytest.approx((errors / energy) ** 0.5)
    assert set(report.best) == {"relative_error", "step"}
    samples = read_lines(tmp_path / "run" / "samples.jsonl")
    assert [line["step"] for line in samples] == [30, 30, 60, 60]
    last = held_out(DELAY)[0]["labels"][-5:]
    torch.testing.assert_close(torch.tensor(samples[0]["due"]), last)
    assert torch.tensor(samples[0]["predicted"]).shape == (5, 2)
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report.to_dict()


@pytest.fixture
def papers(tmp_path: Path) -> Path:
    """Pairs of texts of different lengths, in the Arena's files; related ones share a letter."""
    folder, random = tmp_path / "papers", np.random.default_rng(0)
    folder.mkdir()
    for name, rows in (("train", 64), ("eval", 20), ("test", 4)):
        lines = []
        for index in range(rows):
            first, second = random.choice(list("abcd"), 2, replace=False)
            texts = (first, first if index % 2 else second)
            written = [letter * int(random.integers(5, 30)) for letter in texts]
            lines.append(f"{index % 2}.0\tone\tother\t{written[0]}\t{written[1]}\n")
        (folder / f"new_aan_pairs.{name}.tsv").write_text("".join(lines))
    return folder


def test_retrieval_is_learnt_from_two_documents(tmp_path: Path, papers: Path) -> None:
    task = {"name": "lra/retrieval", "path": str(papers), "length": 32}
    model = {"filter": RTF, "block": "glu", "hidden_size": 16, "initializer_range": 0.2}
    sections = {"optimization": {"steps": 120}, "evaluation": {"metric": "accuracy", "every": 60}}
    report = train(run(tmp_path / "run", task, model, **sections))
    assert report.metrics["accuracy"] > 0.75  # 0.5 by chance
    assert losses(tmp_path / "run")[-1] < 0.4  # 0.69 by chance
    saved = GramianForPairClassification.from_pretrained(tmp_path / "run" / "last")
    rows, right, loss = held_out(task), 0, 0.0
    with torch.no_grad():
        for row in rows:
            pair = {key: row[key][None] for key in ("input_ids", "input_ids_2")}
            logits = saved(**pair).logits[0].double()
            right += int(logits.argmax() == row["labels"])
            loss -= float(logits.log_softmax(-1)[row["labels"]])
    assert report.metrics["accuracy"] == right / len(rows)
    assert report.metrics["loss"] == pytest.approx(loss / len(rows), rel=1e-4)
    samples = read_lines(tmp_path / "run" / "samples.jsonl")
    assert [line["due"] for line in samples[:2]] == [0, 1]


def test_compression_is_learnt_from_the_last_position(tmp_path: Path) -> None:
    task = {
        "name": "mad/compression",
        "length": 4,
        "vocab_size": 6,
        "train_examples": 256,
        "eval_examples": 20,
    }
    model = {"mixers": "multi_hyena", "num_heads": 2, "hidden_size": 32, "initializer_range": 0.1}
    report = train(run(tmp_path / "run", task, model, optimization={"steps": 150}))
    assert report.metrics["accuracy"] > 0.6  # the mark, and one of five tokens by chance: 0.4
    saved = GramianForReconstruction.from_pretrained(tmp_path / "run" / "last")
    assert saved.config.pooling == "last"
    rows, right, loss = held_out(task), 0, 0.0
    with torch.no_grad():
        for row in rows:
            logits = saved(row["input_ids"][None]).logits[0].double()
            right += int((logits.argmax(-1) == row["labels"]).sum())
            loss -= float(logits.log_softmax(-1).gather(-1, row["labels"][:, None]).sum())
    assert report.metrics["accuracy"] == right / (4 * len(rows))
    assert report.metrics["loss"] == pytest.approx(loss / (4 * len(rows)), rel=1e-4)


@pytest.mark.parametrize(
    ("task", "metric", "accepted"),
    [
        (DELAY, "accuracy", "'loss', 'mse', 'relative_error'"),
        ({"name": "mqar"}, "mse", "'loss', 'acc"),
    ],
)
def test_a_metric_must_be_one_of_the_task(
    tmp_path: Path, task: dict[str, Any], metric: str, accepted: str
) -> None:
    with pytest.raises(ConfigError, match=f"{accepted}.*; got '{metric}'"):
        train(run(tmp_path / "run", task, {"filter": RTF}, evaluation={"metric": metric}))


@pytest.mark.parametrize(("pairs", "answered"), [(2, 2), (4, 16)])
def test_logits_are_made_where_answers_are_due(tmp_path: Path, pairs: int, answered: int) -> None:
    """Of few answers those logits alone, of many all; loss and gradients are the same."""
    settings = {"length": 16, "pairs": pairs, "vocab_size": 32, "train_examples": 3}
    task = build("mqar", **settings)
    description = task.description()
    batch = Collator(description)(list(task.dataset("train", 0)))
    if answered == 16:  # as in language modelling
        batch["labels"] = batch["shift_labels"] = batch["input_ids"].clone()
    torch.manual_seed(0)
    model = GramianForCausalLM(
        GramianConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_heads=2)
    )
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = GramianTrainer(description, tmp_path, model=model, args=arguments)
    made = []
    model.lm_head.register_forward_hook(lambda module, inputs, y: made.append(y.shape[:-1].numel()))

    model.train()
    expected = model(**batch).loss
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = trainer.compute_loss(model, batch)
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, list(model.parameters()))
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert made == [3 * 16, 3 * answered]
    assert trainer.compute_loss(model.eval(), batch, return_outputs=True)[1].logits.ndim == 3


class Tags(Kind):
    """A kind from outside of the library: several tags for a sequence, each there or not."""

    metrics: ClassVar[Mapping[str, bool]] = {"loss": False, "tags_right": True}

    def model_class(self) -> type[Any]:
        return GramianForSequenceClassification

    def model_options(self) -> dict[str, Any]:
        return {"problem_type": "multi_label_classification"}

    def label_column(self, description: Description) -> Column:
        return Column(False, (description.num_labels,))

    def label_tensor(self, labels: Any) -> Tensor:
        return torch.as_tensor(labels).float()

    def logits_shape(self, batch: int, length: int, config: Any) -> tuple[int, ...]:
        return (batch, config.num_labels)

    def check_labels(self, labels: Tensor, logits_shape: tuple[int, ...]) -> None:
        assert labels.shape == logits_shape

    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        return logits.shape == labels.shape

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = nn.functional.binary_cross_entropy_with_logits(
            logits.double(), labels.double(), reduction="none"
        )
        right = ((logits > 0) == (labels > 0.5)).double()
        columns = (losses, right, torch.ones_like(right))
        return torch.stack([column.sum(1) for column in columns], dim=-1)

    def summarize(self, scores: np.ndarray, description: Description) -> list[Metric]:
        losses, right, count = scores.T
        return [Metric("loss", losses, count, False), Metric("tags_right", right, count, True)]

    def show(self, logits: Tensor, labels: Tensor, length: int) -> dict[str, Any]:
        return {"due": labels.tolist(), "predicted": (logits > 0).long().tolist()}


@dataclass(frozen=True, kw_only=True)
class WhichTokens(GeneratedTask):
    """Which of the tokens 0 and 1 a sequence of eight ids holds."""

    train_examples: int = 64
    eval_examples: int = 20

    def description(self) -> Description:
        return Description("tags", 8, vocab_size=6, num_labels=2)

    def row(self, random: np.random.Generator, split: str) -> dict[str, Any]:
        ids = random.integers(6, size=8)
        return {"input_ids": ids, "labels": np.array([0.0 + (one in ids) for one in (0, 1)])}


@pytest.fixture
def tags(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kind "tags" and a task of it, known here and nowhere else."""
    monkeypatch.setitem(_task._REGISTRY, "test/tags", WhichTokens)
    register_kind("tags")(Tags)
    yield
    del kinds._REGISTRY["tags"]


def test_a_kind_from_outside_is_trained_and_evaluated(tmp_path: Path, tags: None) -> None:
    task = {"name": "test/tags"}
    model = {"mixers": "multi_hyena", "num_heads": 2, "hidden_size": 16}
    sections = {
        "optimization": {"steps": 80},
        "evaluation": {"every": 40, "metric": "tags_right"},
    }
    report = train(run(tmp_path / "run", task, model, **sections))
    assert report.metrics["tags_right"] > 0.8  # 0.64 by chance
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    found = [line["eval_tags_right"] for line in lines if "eval_tags_right" in line]
    assert len(found) == 2 and report.best["tags_right"] == max(found)
    saved = GramianForSequenceClassification.from_pretrained(tmp_path / "run" / "last")
    measured = evaluate_task(saved, build("test/tags"), split="validation")
    assert [one.metric for one in measured] == ["loss", "tags_right"]
    assert [one.higher_is_better for one in measured] == [False, True]
    for one in measured:
        assert one.value == pytest.approx(report.metrics[one.metric], rel=1e-5)
    rows, right = held_out(task), 0
    with torch.no_grad():
        for row in rows:
            right += int(((saved(row["input_ids"][None]).logits[0] > 0) == row["labels"]).sum())
    assert report.metrics["tags_right"] == right / (2 * len(rows))
    samples = read_lines(tmp_path / "run" / "samples.jsonl")
    assert samples[0]["due"] == rows[0]["labels"].tolist()
    with pytest.raises(ConfigError, match="must be one of 'loss', 'tags_right' for the task"):
        train(run(tmp_path / "other", task, model, evaluation={"metric": "accuracy"}))


def test_a_kind_has_a_name_of_its_own_and_no_metric_turned_round(tags: None) -> None:
    with pytest.raises(ValueError, match="there is a kind 'tags' already: Tags"):
        register_kind("tags")(Tags)

    class Turned(Tags):
        metrics: ClassVar[Mapping[str, bool]] = {"loss": False, "accuracy": False}

    with pytest.raises(ValueError, match="'turned' calls lower values of accuracy better, and the"):
        register_kind("turned")(Turned)
    assert "turned" not in KINDS


def test_an_unknown_kind_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = {"name": "test/tags"}
    monkeypatch.setitem(_task._REGISTRY, "test/tags", WhichTokens)
    with pytest.raises(ConfigError, match=r"task test/tags: unknown kind of task 'tags'\..*signal"):
        train(run(tmp_path / "run", task, {}))
