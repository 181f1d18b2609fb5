"""Every kind of task has a model that is trained, scored by its definition and sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("yaml")

from gramian.models import GramianForSignalRegression
from gramian.tasks import KINDS, build
from gramian.training import ConfigError, parse_config, train
from gramian.training._run import MODELS
from gramian.training.configuration import METRICS
from gramian.training.recording import read_lines

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


def test_no_kind_is_left_out() -> None:
    assert set(MODELS) < set(METRICS) == set(KINDS)


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


@pytest.mark.parametrize(
    ("task", "metric", "accepted"),
    [
        (DELAY, "accuracy", "loss or mse or relative_error"),
        ({"name": "mqar"}, "mse", "loss or acc"),
    ],
)
def test_a_metric_must_be_one_of_the_task(
    tmp_path: Path, task: dict[str, Any], metric: str, accepted: str
) -> None:
    with pytest.raises(ConfigError, match=f"{accepted}.*; got {metric}"):
        train(run(tmp_path / "run", task, {"filter": RTF}, evaluation={"metric": metric}))
