"""A task of every kind whose labels a test chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gramian._drawing import save_figure
from gramian.tasks import Description, GeneratedTask, _task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES = 4


@dataclass(frozen=True, kw_only=True)
class Labelled(GeneratedTask):
    """Rows of noise.

    Args:
        kind: of the task.
        put: stands in the labels of some rows in place of what would be there, or None.
        labels: what else is wrong with a row where `put` would stand.
        share: of the labels that are -100.
        split: where `put` stands.
        integers: whether labels are written as integers.
        num_labels: classes, or numbers at a position.
        ragged: whether sequences differ in length, from 1 to `length`; of tokens and classes.
    """

    kind: str = "tokens"
    put: float | None = None
    labels: str = ""
    share: float = 0.0
    split: str = "train"
    integers: bool = True
    num_labels: int = CLASSES
    ragged: bool = False
    length: int = 10
    train_examples: int = 24
    eval_examples: int = 9

    def description(self) -> Description:
        numbers = self.kind in ("signal", "regression")
        return Description(
            self.kind,
            self.length,
            vocab_size=None if numbers else CLASSES,
            num_labels=self.num_labels,
            input_size=1 if numbers else None,
        )

    def row(self, random: np.random.Generator, split: str) -> dict[str, Any]:
        length = int(random.integers(1, self.length + 1)) if self.ragged else self.length
        shape: tuple[int, ...] = (length,)
        row: dict[str, Any] = {}
        if self.kind in ("signal", "regression"):
            row["input_values"] = random.normal(size=(self.length, 1)).astype(np.float32)
            size = (self.length, self.num_labels) if self.kind == "signal" else self.num_labels
            labels = random.normal(size=size).astype(np.float32)
        else:
            row["input_ids"] = random.integers(CLASSES, size=length)
            if self.kind == "pairs":
                row["input_ids_2"] = random.integers(CLASSES, size=self.length)
            single = self.kind in ("classification", "pairs")
            labels = random.integers(self.num_labels, size=() if single else shape)
            labels = np.asarray(labels, dtype=np.int64 if self.integers else np.float64)
        labels = np.where(random.random(labels.shape) < self.share, -100, labels)
        if self.put is not None and split == self.split:
            labels = labels.astype(np.result_type(labels.dtype, type(self.put)))
            labels.flat[0] = self.put
        row["labels"] = labels if labels.ndim else labels[()]
        return self.spoilt(row) if self.labels and split == self.split else row

    def spoilt(self, row: dict[str, Any]) -> dict[str, Any]:
        labels = np.asarray(row.pop("labels"))
        if self.labels == "missing":
            return row
        if self.labels == "other tokens":
            return {"input_ids": row["input_ids"] * 0 + 10, "labels": labels}
        some = np.atleast_1d(labels)
        wrong = {"longer": np.concatenate([some, some[:1]]), "nested": labels[None]}
        return row | {"labels": wrong.get(self.labels, labels.astype(str))}


_DRAWN: dict[tuple[str, ...], bytes] = {}


@pytest.fixture(autouse=True)
def figures_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the first figure with each set of panels and curves, and write its bytes for the others.

    Drawing is a third of a short run. Every run still makes its figure.
    """

    def save(figure: Figure, path: str | Path) -> Path:
        parts = tuple(
            text
            for axes in figure.axes
            for text in (axes.get_title("left"), *(str(line.get_label()) for line in axes.lines))
        )
        if parts not in _DRAWN:
            _DRAWN[parts] = save_figure(figure, path).read_bytes()
        Path(path).write_bytes(_DRAWN[parts])
        return Path(path)

    monkeypatch.setattr("gramian.training._run.save_figure", save)


@pytest.fixture(autouse=True)
def labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known here as "test/labelled", and nowhere else."""
    monkeypatch.setitem(_task._REGISTRY, "test/labelled", Labelled)


@pytest.fixture
def run() -> Callable[..., dict[str, Any]]:
    return configuration


def configuration(folder: Path, kind: str, **changes: Any) -> dict[str, Any]:
    """A configuration of a run of seconds; changes with `__` between section and key."""
    values: dict[str, Any] = {
        "output": str(folder),
        "task": {"name": "test/labelled", "kind": kind},
        "model": {"hidden_size": 8, "num_hidden_layers": 1, "num_heads": 2, "intermediate_size": 8},
        "optimization": {"steps": 4, "batch_size": 8, "learning_rate": 1e-3},
        "evaluation": {"every": 2, "samples": 1},
        "checkpoints": {"every": 2},
        "logging": {"every": 1},
        "hardware": {"device": "cpu", "threads": 1},
    }
    if kind == "signal":
        del values["model"]["intermediate_size"]
        values["model"] |= {"mixers": "long_convolution", "block": "mixer"}
        values["model"]["filter"] = {"type": "rtf", "state_size": 4}
    for name, change in changes.items():
        section, _, key = name.partition("__")
        values.setdefault(section, {})[key] = change
    return values
