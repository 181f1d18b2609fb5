"""What holds for every task: names, settings, splits, seeds, shapes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("datasets")

from gramian import tasks
from gramian.tasks import IGNORED, KINDS, SPLITS
from gramian.testing import check_task

SMALL: dict[str, dict[str, Any]] = {
    "associative_recall": {},
    "copying": {"noise": 5, "memorize": 7, "vocab_size": 9},
    "delay": {"length": 63, "lag": 20, "lags": 2, "step": 0.001, "frequency": 100.0},
    "induction_heads": {"triggers": 3, "answer_length": 2},
    "lra/listops": {"min_length": 5, "max_length": 40},
    "lra/pathfinder": {"path_length": 3, "distractors": 2},
    "mad/compression": {},
    "mad/fuzzy-in-context-recall": {},
    "mad/in-context-recall": {},
    "mad/memorization": {},
    "mad/noisy-in-context-recall": {},
    "mad/selective-copying": {},
    "mqar": {},
}
READ_FROM_FILES = {
    "arrays",
    "digits",
    "fasta",
    "lra/image",
    "lra/retrieval",
    "lra/text",
    "python_documentation",
    "speech_commands",
    "table",
    "text",
}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def test_every_task_is_tested() -> None:
    assert set(tasks.names()) == SMALL.keys() | READ_FROM_FILES


@pytest.mark.parametrize("name", SMALL)
def test_every_generated_task_conforms(name: str) -> None:
    check_task(tasks.build(name, train_examples=6, eval_examples=5, **SMALL[name]))


@pytest.mark.parametrize("name", SMALL)
def test_rows_are_what_the_description_says(name: str) -> None:
    task = tasks.build(name, train_examples=6, eval_examples=4, **SMALL[name])
    description = task.description()
    assert description.kind in KINDS
    for split, count in zip(SPLITS, (6, 4, 4), strict=True):
        data = task.dataset(split, seed=1)
        assert len(data) == count
        for row in data:
            if description.input_size is None:
                length = len(row["input_ids"])
                assert row["input_ids"].min() >= 0
                assert row["input_ids"].max() < description.vocab_size
            else:
                length = row["input_values"].shape[0]
                assert row["input_values"].shape == (length, description.input_size)
                assert row["input_values"].dtype == torch.float32
            assert 0 < length <= description.length
            if description.kind == "tokens":
                due = row["labels"][row["labels"] != IGNORED]
                assert row["labels"].shape == row["input_ids"].shape
                assert len(due) > 0 and due.min() >= 0 and due.max() < description.vocab_size
            elif description.kind == "classification":
                assert 0 <= row["labels"] < description.num_labels
            elif description.kind == "signal":
                assert row["labels"].shape == (length, description.num_labels)


@pytest.mark.parametrize("name", SMALL)
def test_seeds_reproduce_and_splits_share_nothing(name: str) -> None:
    def rows(split: str, seed: int) -> list[dict[str, Any]]:
        task = tasks.build(name, train_examples=5, eval_examples=5, **SMALL[name])
        return list(task.rows(split, seed))

    first = rows("train", 7)
    assert all(map(same, first, rows("train", 7)))
    others = [rows("train", 8), rows("validation", 7), rows("test", 7)]
    for other in others:
        assert not any(same(row, one) for row in first for one in other)
    assert not all(map(same, others[1], others[2]))


@pytest.mark.parametrize("name", ["mqar", "delay", "lra/listops"])
def test_streams_give_the_same_rows(name: str) -> None:
    arguments = {"train_examples": 5, **SMALL[name]}
    data = tasks.load(name, seed=2, **arguments)
    stream = tasks.load(name, seed=2, streaming=True, **arguments)
    streamed = list(stream)
    assert len(streamed) == 5
    for one, other in zip(data, streamed, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], torch.as_tensor(other[key])) for key in one)


@pytest.mark.parametrize("name", SMALL)
def test_published_settings_can_be_built(name: str) -> None:
    published = tasks.settings(name)
    assert "default" in published
    for setting in published:
        assert tasks.build(name, setting).description().length > 0
    default = tasks.build(name)
    assert all(getattr(default, key) == value for key, value in published["default"].items())


def test_settings_win_over_published_ones() -> None:
    task = tasks.build("mqar", "512x64", pairs=3)
    assert (task.length, task.pairs) == (512, 3)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "mqa"}, "unknown task 'mqa'. Did you mean 'mqar'?"),
        ({"name": "mqar", "setting": "64x5"}, "unknown setting of mqar '64x5'"),
        ({"name": "mqar", "lenght": 5}, "Did you mean 'length'?"),
        ({"name": "mqar", "split": "dev"}, "unknown split 'dev'"),
        ({"name": "mqar", "seed": -1}, "seed must be an integer of at least 0; got -1"),
        ({"name": "mqar", "train_examples": 0}, "train_examples must be an integer of at least 1"),
        ({"name": "mqar", "length": 63}, "length must be even; got 63"),
        ({"name": "mqar", "vocab_size": 64}, "vocab_size must be above length"),
        ({"name": "mqar", "pairs": 17}, "need a length of at least 68; got 64"),
        ({"name": "lra/text"}, "the task lra/text needs path"),
        ({"name": "mad/selective-copying", "tokens": 128}, "length must be above 2 × tokens"),
        ({"name": "delay", "lags": 4}, "lag × lags must be below length"),
        ({"name": "mad/compression", "noise": 1.0}, "noise must be a probability, at least 0"),
        (
            {"name": "python_documentation", "packing": "rows"},
            "packing must be one of 'document', 'concatenate'; got 'rows'.",
        ),
        ({"name": "lra/listops", "min_length": 50, "max_depth": 2}, "no list of 10 digits"),
        ({"name": "text"}, "give files (train, validation, test) or a corpus"),
    ],
)
def test_mistakes_are_one_sentence(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        tasks.load(**arguments)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="there is a task 'mqar' already"):
        tasks.register("mqar")(type(tasks.build("mqar")))
