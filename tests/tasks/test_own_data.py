"""Data of one's own: arrays of numpy's files and tables, read as they are or refused."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("datasets")

from gramian import tasks
from gramian.tasks import Description

RANDOM = np.random.default_rng(0)
NUMBERS = RANDOM.normal(size=(5, 8))
IDS = RANDOM.integers(6, size=(5, 8))
CLASSES = np.array([0, 2, 1, 0, 2])


def saved(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.parametrize(
    ("inputs", "labels", "settings", "expected"),
    [
        (NUMBERS, CLASSES, {}, Description("classification", 8, input_size=1, num_labels=3)),
        (NUMBERS, CLASSES > 0, {}, Description("classification", 8, input_size=1, num_labels=2)),
        (IDS, CLASSES, {}, Description("classification", 8, vocab_size=6, num_labels=3)),
        (
            NUMBERS,
            CLASSES,
            {"num_labels": 7},
            Description("classification", 8, input_size=1, num_labels=7),
        ),
        (
            NUMBERS.reshape(5, 4, 2),
            NUMBERS[:, 0],
            {},
            Description("regression", 4, input_size=2, num_labels=1),
        ),
        (NUMBERS, NUMBERS[:, :3], {}, Description("regression", 8, input_size=1, num_labels=3)),
        (
            NUMBERS,
            CLASSES,
            {"kind": "regression"},
            Description("regression", 8, input_size=1, num_labels=1),
        ),
        (NUMBERS, NUMBERS, {}, Description("signal", 8, input_size=1, num_labels=1)),
        (
            NUMBERS,
            NUMBERS,
            {"kind": "regression"},
            Description("regression", 8, input_size=1, num_labels=8),
        ),
        (NUMBERS, IDS, {"kind": "signal"}, Description("signal", 8, input_size=1, num_labels=1)),
        (
            NUMBERS,
            np.stack([NUMBERS] * 3, -1),
            {},
            Description("signal", 8, input_size=1, num_labels=3),
        ),
        (IDS, NUMBERS, {}, Description("signal", 8, vocab_size=6, num_labels=1)),
        (IDS, IDS + 3, {}, Description("tokens", 8, vocab_size=9)),
        (IDS, IDS, {"vocab_size": 64}, Description("tokens", 8, vocab_size=64)),
    ],
)
def test_arrays_are_read_as_their_labels_say(
    tmp_path: Path,
    inputs: np.ndarray,
    labels: np.ndarray,
    settings: dict[str, Any],
    expected: Description,
) -> None:
    file = saved(tmp_path / "train.npz", inputs=inputs, labels=labels)
    task = tasks.build("arrays", train=file, **settings)
    assert task.description() == expected
    rows = task.dataset("train")
    assert len(rows) == 5
    name = "input_ids" if expected.input_size is None else "input_values"
    for row, given, due in zip(rows, inputs, labels, strict=True):
        assert np.allclose(np.asarray(row[name]).ravel(), np.asarray(given).ravel())
        assert np.allclose(np.asarray(row["labels"]).ravel(), np.asarray(due).ravel())


def test_several_files_are_one_task(tmp_path: Path) -> None:
    saved(tmp_path / "a.npz", x=IDS, y=CLASSES)
    saved(tmp_path / "b.npz", x=IDS[:2, :5] + 4, y=CLASSES[:2] + 1)
    test = saved(tmp_path / "test.npz", x=IDS[:3], y=CLASSES[:3] * 2)
    names = {"inputs": "x", "labels": "y"}
    task = tasks.build("arrays", train=str(tmp_path / "[ab].npz"), test=test, **names)
    assert task.description() == Description("classification", 8, vocab_size=10, num_labels=5)
    assert [len(row["input_ids"]) for row in task.rows("train", 0)] == [8] * 5 + [5] * 2
    assert [row["labels"] for row in task.rows("test", 0)] == [0, 4, 2]


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "train.npz"
    task = tasks.build("arrays", train=saved(path, inputs=IDS, labels=CLASSES))
    assert task.description().num_labels == 3
    saved(path, inputs=IDS, labels=CLASSES * 2)
    os.utime(path, ns=(1, 1))
    assert task.description().num_labels == 5


WRONG_ARRAYS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"inputs": IDS}, {}, "unknown array 'labels'"),
    ({"inputs": IDS, "label": CLASSES}, {}, "Did you mean 'label'"),
    ({"inputs": IDS, "labels": CLASSES[:4]}, {}, "inputs has 5 rows and labels has 4"),
    (
        {"inputs": IDS, "labels": np.array(list("abcde"))},
        {},
        "labels must hold numbers; it holds <",
    ),
    ({"inputs": IDS[0], "labels": CLASSES}, {}, r"of shape \(rows, length\), .* got \(8,\)"),
    ({"inputs": NUMBERS[0], "labels": CLASSES}, {}, r"or \(rows, length, features\), .*\(8,\)"),
    ({"inputs": NUMBERS[:0], "labels": CLASSES[:0]}, {}, r"with none of 0; got \(0, 8\)"),
    ({"inputs": IDS - 1, "labels": CLASSES}, {}, "token ids of at least 0; got -1"),
    ({"inputs": np.full_like(NUMBERS, np.inf), "labels": CLASSES}, {}, "inputs must be finite"),
    ({"inputs": NUMBERS, "labels": IDS}, {}, "Give kind: token_classification to predict them"),
    ({"inputs": NUMBERS, "labels": IDS[:, :3]}, {}, r"of shape \(5,\) for classification"),
    (
        {"inputs": NUMBERS, "labels": NUMBERS[:, :3]},
        {"kind": "signal"},
        r"shape \(5, 8, 1\) for sig",
    ),
    (
        {"inputs": IDS, "labels": NUMBERS},
        {"kind": "tokens"},
        "must be integers for tokens; it holds",
    ),
    ({"inputs": IDS, "labels": CLASSES}, {"vocab_size": 3}, "vocab_size must be .* at least 6, wh"),
    ({"inputs": IDS, "labels": CLASSES}, {"num_labels": 2}, "num_labels must be .* at least 3, wh"),
    ({"inputs": IDS, "labels": np.float64(3)}, {}, "labels must have rows; it is one number"),
]


@pytest.mark.parametrize(("arrays", "settings", "sentence"), WRONG_ARRAYS)
def test_arrays_that_do_not_fit_are_told(
    tmp_path: Path, arrays: dict[str, Any], settings: dict[str, Any], sentence: str
) -> None:
    task = tasks.build("arrays", train=saved(tmp_path / "a.npz", **arrays), **settings)
    with pytest.raises(ValueError, match=sentence) as caught:
        task.description()
    assert "\n" not in str(caught.value)


def test_files_that_are_no_arrays_are_told(tmp_path: Path) -> None:
    text, single, ragged = (tmp_path / f"{name}.npz" for name in ("text", "single", "ragged"))
    text.write_text("1,2,3")
    np.save(tmp_path / "single.npy", IDS)
    (tmp_path / "single.npy").rename(single)
    for file in (text, single):
        with pytest.raises(
            ValueError, match=r"is no \.npz file of numpy; write one by numpy.savez"
        ):
            tasks.build("arrays", train=str(file)).description()
    rows = np.empty(2, dtype=object)
    rows[:] = [[1, 2], [3]]
    saved(ragged, inputs=rows, labels=CLASSES[:2])
    with pytest.raises(ValueError, match="all rows of one length; it holds objects"):
        tasks.build("arrays", train=str(ragged)).description()
    with pytest.raises(ValueError, match="the task arrays needs files"):
        tasks.build("arrays")
    with pytest.raises(ValueError, match="unknown kind of arrays 'signals'"):
        tasks.build("arrays", train=str(text), kind="signals")


def test_files_that_do_not_go_together_are_told(tmp_path: Path) -> None:
    train = saved(tmp_path / "train.npz", inputs=NUMBERS, labels=CLASSES)
    other = saved(tmp_path / "other.npz", inputs=NUMBERS, labels=NUMBERS)
    with pytest.raises(ValueError, match=r"for signal of 1 numbers, and .* for classification\."):
        tasks.build("arrays", train=train, test=other).description()
    short = saved(tmp_path / "short.npz", inputs=NUMBERS[:, :5], labels=CLASSES)
    with pytest.raises(ValueError, match=r"sequences of length 5, and .* of 8; numbers need one"):
        tasks.build("arrays", train=train, test=short).description()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "promoters.csv"
    path.write_text('name,sequence,label\na,ACGT,yes\nb,"GG\nTT",no\nc,ac,yes\n')
    return path


def test_a_table_has_a_row_for_every_line(table: Path) -> None:
    task = tasks.build("table", train=str(table), length=16, tokenizer="dna")
    assert task.description() == Description(
        "classification", 16, vocab_size=12, num_labels=2, pad_token_id=4
    )
    rows = list(task.rows("train", 0))
    assert [row["input_ids"].tolist() for row in rows] == [[7, 8, 9, 10], [9, 9, 10, 10], [7, 8]]
    assert [row["labels"] for row in rows] == [1, 0, 1]
    assert type(task.own_tokenizer()).__name__ == "DNATokenizer"
    in_bytes = tasks.build("table", train=str(table))
    assert in_bytes.description().vocab_size == 259
    assert next(iter(in_bytes.rows("train", 0)))["input_ids"].tolist() == list(b"ACGT")


def test_tables_may_be_compressed_have_tabs_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "ages.tsv.gz"
    path.write_bytes(gzip.compress(b"text\tage\nabc\t1.5\nde\t-2\n"))
    columns = {"sequence": "text", "label": "age"}
    task = tasks.build("table", train=str(path), kind="regression", length=4, **columns)
    assert (task.description().kind, task.description().num_labels) == ("regression", 1)
    assert [row["labels"].tolist() for row in task.rows("train", 0)] == [[1.5], [-2.0]]
    assert [tuple(row["labels"].shape) for row in task.dataset("train")] == [(1,), (1,)]


def test_classes_are_those_of_all_files_and_integers_in_order(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("sequence,label\na,10\nb,9\n")
    (tmp_path / "test.csv").write_text("sequence,label\nc,2\n")
    task = tasks.build(
        "table", train=str(tmp_path / "train.csv"), test=str(tmp_path / "test.csv"), length=4
    )
    assert task.classes() == ["2", "9", "10"]  # type: ignore[attr-defined]
    assert [row["labels"] for row in task.rows("train", 0)] == [2, 1]


@pytest.mark.parametrize(
    ("text", "settings", "sentence"),
    [
        ("seq,label\na,1\n", {}, "unknown column 'sequence'"),
        ("sequence,label\n,1\n", {}, "line 2: sequence is empty"),
        ("sequence,label\na\n", {}, "line 2: label is empty"),
        (
            "sequence,label\nabcde,1\n",
            {},
            "line 2: sequence has 5 tokens and must have from 1 to 4",
        ),
        ("sequence,label\na,x\n", {"kind": "regression"}, "label must be a finite number; got 'x'"),
        ("sequence,label\na,nan\n", {"kind": "regression"}, "a finite number; got 'nan'"),
        ("", {}, "unknown column 'sequence'. Accepted: none"),
    ],
)
def test_tables_that_do_not_fit_are_told(
    tmp_path: Path, text: str, settings: dict[str, Any], sentence: str
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    task = tasks.build("table", train=str(path), length=4, **settings)
    with pytest.raises(ValueError, match=sentence) as caught:
        list(task.rows("train", 0))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="unknown kind of table 'signal'"):
        tasks.build("table", train=str(path), kind="signal")
