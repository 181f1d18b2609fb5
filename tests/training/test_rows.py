"""Rows read from memory are the rows that `datasets` formats."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

pytest.importorskip("datasets")

import datasets

from gramian.tasks import build
from gramian.training.rows import Rows

TASKS: dict[str, dict[str, Any]] = {
    "delay": {"length": 63, "lag": 20, "lags": 2, "step": 0.001, "frequency": 100.0},
    "mqar": {"length": 32, "pairs": 2, "vocab_size": 64},
    "lra/listops": {"min_length": 4, "max_length": 24},
    "digits": {},
}


def same(rows: Rows, dataset: Any, indices: list[int]) -> None:
    assert len(rows) == len(dataset)
    for index, row in zip(indices, rows.__getitems__(indices), strict=True):
        expected = dataset[index]
        assert row.keys() == expected.keys()
        for name, value in row.items():
            assert value.shape == expected[name].shape, name
            assert torch.equal(value.to(expected[name].dtype), expected[name]), name
        assert all(torch.equal(rows[index][name], value) for name, value in row.items())


@pytest.mark.parametrize("name", TASKS)
def test_all_columns_of_every_kind(name: str) -> None:
    settings = TASKS[name] if name == "digits" else {**TASKS[name], "train_examples": 50}
    dataset = build(name, **settings).dataset("train", 0)
    same(Rows(dataset), dataset, [0, 1, 49, 7, 7])
    part = dataset.select(range(3, 20))
    same(Rows(part), part, [16, 0, 5])
    shuffled = dataset.select([5, 30, 8, 5])
    same(Rows(shuffled), shuffled, [3, 1, 0, 2])
    copied = pickle.loads(pickle.dumps(Rows(dataset)))
    same(copied, dataset, [4, 2])


def test_rows_of_several_chunks(tmp_path: Any) -> None:
    parts = [
        datasets.Dataset.from_dict({"input_ids": [[i] * (i % 4) for i in range(n)]})
        for n in (3, 1, 5)
    ]
    dataset = datasets.concatenate_datasets(parts).with_format("torch")
    assert len(dataset.data.table.column("input_ids").chunks) == 3
    same(Rows(dataset), dataset, list(range(9)))
    dataset.save_to_disk(tmp_path / "kept")  # and from mapped files
    mapped = datasets.load_from_disk(str(tmp_path / "kept"))
    same(Rows(mapped), dataset, [8, 0, 3, 4])
