"""Classes at every position: tables and arrays of them, training, evaluation and distilling."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from gramian import tasks
from gramian.checkpoints import DNATokenizer
from gramian.evaluation import evaluate_task
from gramian.models import (
    GramianConfig,
    GramianForSequenceClassification,
    GramianForTokenClassification,
    load_any,
)
from gramian.tasks import Description
from gramian.training import parse_config, train
from gramian.training.configuration import ConfigError

Call = Callable[..., tuple[int, str, str]]
LONGEST = 24


def write(folder: Path, name: str, rows: int, seed: int) -> str:
    """DNA in lines of several lengths, where a base after a G is of the class y."""
    random = np.random.default_rng(seed)
    lines = ["sequence,label"]
    for _ in range(rows):
        bases = "".join(random.choice(list("ACGT"), size=random.integers(8, LONGEST + 1)))
        classes = "".join("y" if before == "G" else "n" for before in " " + bases[:-1])
        lines.append(f"{bases},{classes}")
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


@pytest.fixture
def table(tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "table",
        "kind": "token_classification",
        "tokenizer": "dna",
        "length": LONGEST + 1,
        "train": write(tmp_path, "train.csv", 128, 0),
        "validation": write(tmp_path, "validation.csv", 32, 1),
    }


def configuration(output: Path, task: dict[str, Any], **sections: Any) -> Any:
    values: dict[str, Any] = {
        "output": str(output),
        "task": task,
        "model": {"mixers": "hyena", "hidden_size": 16, "num_hidden_layers": 1},
        "optimization": {"steps": 60, "batch_size": 16, "learning_rate": 2e-2},
        "evaluation": {"every": 30, "metric": "accuracy"},
        "hardware": {"device": "cpu"},
    }
    return parse_config(values | sections)


def test_a_table_gives_a_class_to_every_token(table: dict[str, Any]) -> None:
    settings = {key: value for key, value in table.items() if key != "name"}
    task = tasks.build("table", **settings)
    assert task.description() == Description(
        "token_classification", LONGEST + 1, vocab_size=12, num_labels=2, pad_token_id=4
    )
    row = next(iter(task.rows("train", 0)))
    after_g = [0, *(int(token == 9) for token in row["input_ids"][:-1])]
    assert row["labels"].tolist() == after_g  # in alphabetic order, y is 1


@pytest.mark.parametrize(
    ("label", "labels"),
    [("abba", [0, 1, 1, 0]), ("a b -100 c1", [0, 1, -100, 2]), ("7 10 7 -100", [0, 1, 0, -100])],
)
def test_labels_are_words_or_characters(tmp_path: Path, label: str, labels: list[int]) -> None:
    file = tmp_path / "train.csv"
    file.write_text(f"sequence,label\nACGT,{label}\n", encoding="utf-8")
    options: dict[str, Any] = {"train": str(file), "kind": "token_classification"}
    task = tasks.build("table", tokenizer="dna", **options)
    assert next(iter(task.rows("train", 0)))["labels"].tolist() == labels
    # special tokens, here one on either side, have no class
    tokenizer = DNATokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    row = next(iter(task.tokens_of(tokenizer).rows("train", 0)))
    assert row["input_ids"].tolist() == [0, 7, 8, 9, 10, 1]
    assert row["labels"].tolist() == [-100, *labels, -100]
    plain = tasks.build("table", tokenizer=tokenizer, special_tokens=False, **options)
    assert next(iter(plain.rows("train", 0)))["labels"].tolist() == labels


def test_a_class_too_few_is_named(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    file.write_text("sequence,label\nACGT,abc\n", encoding="utf-8")
    task = tasks.build("table", train=str(file), kind="token_classification", tokenizer="dna")
    with pytest.raises(
        ValueError, match=r"line 2: label must have a class for each of the 4 tok.*3"
    ):
        list(task.rows("train", 0))


@pytest.mark.parametrize("inputs", ["tokens", "numbers"])
def test_arrays_of_classes(tmp_path: Path, inputs: str) -> None:
    ids = np.random.default_rng(0).integers(6, size=(5, 8))
    labels = (ids % 3).copy()
    labels[0, 0] = -100
    given = ids if inputs == "tokens" else ids + 0.5
    np.savez(tmp_path / "train.npz", inputs=given, labels=labels)
    task = tasks.build("arrays", train=str(tmp_path / "train.npz"), kind="token_classification")
    sizes = {"vocab_size": 6} if inputs == "tokens" else {"input_size": 1}
    assert task.description() == Description("token_classification", 8, num_labels=3, **sizes)
    assert np.array_equal(np.stack([row["labels"] for row in task.rows("train", 0)]), labels)
    wider = tasks.build(
        "arrays", train=str(tmp_path / "train.npz"), kind="token_classification", num_labels=7
    )
    assert wider.description().num_labels == 7


@pytest.mark.parametrize("packing", [False, True])
def test_training_learns_and_scores_every_token(
    tmp_path: Path, table: dict[str, Any], packing: bool
) -> None:
    optimization = {"steps": 60, "batch_size": 16, "learning_rate": 2e-2, "packing": packing}
    report = train(configuration(tmp_path / "run", table, optimization=optimization))
    assert report.metrics["accuracy"] > 0.95
    model = load_any(tmp_path / "run" / "last")
    assert type(model) is GramianForTokenClassification and model.config.num_labels == 2
    task = tasks.build(table["name"], **{k: v for k, v in table.items() if k != "name"})
    right = due = whole = 0
    loss = 0.0
    rows = list(task.rows("validation", 0))
    for row in rows:
        with torch.no_grad():
            logits = model(torch.as_tensor(row["input_ids"])[None]).logits[0].double()
        labels = torch.as_tensor(row["labels"])
        hits = int((logits.argmax(-1) == labels).sum())
        right, due, whole = right + hits, due + len(labels), whole + (hits == len(labels))
        loss -= float(logits.log_softmax(-1).gather(-1, labels[:, None]).sum())
    expected = {"accuracy": right / due, "sequence_accuracy": whole / len(rows), "loss": loss / due}
    measured = {m.metric: m.value for m in evaluate_task(model, task, split="validation")}
    assert measured == pytest.approx(expected, rel=1e-4)
    for name, value in expected.items():
        assert report.metrics[name] == pytest.approx(value, rel=1e-4)
    samples = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert json.loads(samples[0])["due"] == rows[0]["labels"].tolist()


@pytest.mark.parametrize("kind", ["classification", "token_classification"])
def test_classes_are_numbered_as_the_model_numbers_them(tmp_path: Path, kind: str) -> None:
    """Whatever their order in the alphabet, and also where a file lacks one of them."""
    made = {"classification": GramianForSequenceClassification}
    made["token_classification"] = GramianForTokenClassification
    names = ["z", "x", "y"]
    torch.manual_seed(0)
    model = made[kind](
        GramianConfig(
            vocab_size=12,
            hidden_size=8,
            num_hidden_layers=1,
            num_heads=2,
            mixers="hyena",
            id2label=dict(enumerate(names)),
        )
    ).eval()
    model.save_pretrained(tmp_path / "model")
    lines = [("ACGT", "x"), ("GGTA", "y"), ("TTTA", "x")]
    if kind == "token_classification":
        lines = [("ACGT", "xxyx"), ("GGTA", "yyxx"), ("TTTA", "xyxy")]
    text = "sequence,label\n" + "".join(f"{one},{label}\n" for one, label in lines)
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text(text, encoding="utf-8")
    options = {one: str(tmp_path / f"{one}.csv") for one in ("train", "validation")}
    options |= {"tokenizer": "dna", "kind": kind}
    task = tasks.build("table", **options)
    assert task.classes() == ["x", "y"]
    losses = []
    for sequence, label in lines:
        ids = torch.tensor([["ACGTN".index(base) + 7 for base in sequence]])
        with torch.no_grad():
            logs = model(ids).logits[0].double().log_softmax(-1)
        numbers = [names.index(one) for one in label]
        rows = logs if kind == "token_classification" else logs[None]
        losses += [-float(row[number]) for row, number in zip(rows, numbers, strict=True)]
    measured = {m.metric: m.value for m in evaluate_task(model, task, split="validation")}
    assert measured["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    config = configuration(
        tmp_path / "run",
        {"name": "table", **options},
        model={"path": str(tmp_path / "model")},
        optimization={"steps": 1, "batch_size": 3, "learning_rate": 0.0},
        evaluation={},
    )
    assert train(config).metrics["loss"] == pytest.approx(measured["loss"], rel=1e-5)
    assert load_any(tmp_path / "run" / "last").config.id2label == dict(enumerate(names))
    wrong = "w" * len(lines[0][1])
    text = f"sequence,label\nACGT,{wrong}\n"
    (tmp_path / "validation.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"must be among the model's, z, x, y; got w\."):
        evaluate_task(model, tasks.build("table", **options), split="validation")
    named = tasks.build("table", names=["x", "y"], **options)
    with pytest.raises(ValueError, match="line 2: label must be among the names, x, y; got w"):
        list(named.rows("validation", 0))


def test_one_class_is_no_task(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", inputs=np.ones((4, 8), int), labels=np.zeros((4, 8), int))
    task = {"name": "arrays", "kind": "token_classification"}
    task |= dict.fromkeys(("train", "validation"), str(tmp_path / "train.npz"))
    with (
        pytest.warns(UserWarning, match="training files too"),
        pytest.raises(ConfigError, match="the task arrays has one class, so there is nothing"),
    ):
        train(configuration(tmp_path / "run", task))


def test_a_model_of_other_classes_is_refused(table: dict[str, Any]) -> None:
    task = tasks.build(table["name"], **{k: v for k, v in table.items() if k != "name"})
    options: dict[str, Any] = {"vocab_size": 12, "hidden_size": 8, "num_heads": 2}
    model = GramianForTokenClassification(GramianConfig(num_labels=1, **options))
    with pytest.raises(ValueError, match="the task table has 2 classes and the model has 1"):
        evaluate_task(model, task, name="table", split="validation")
