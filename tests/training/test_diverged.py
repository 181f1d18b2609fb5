"""Runs that lose their way: one sentence, a checkpoint from before, nothing that is not finite."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from gramian.cli import main
from gramian.tasks import find_kind
from gramian.training import DivergedError, parse_config, parse_sweep, sweep, train
from gramian.training.recording import read_lines
from gramian.training.trainer import GramianTrainer

Run = Callable[..., dict[str, Any]]
TOO_FAST = {"optimization__learning_rate": 1e30, "optimization__warmup": 0}


def finite(folder: Path, kind: str = "tokens") -> bool:
    weights = find_kind(kind).model_class().from_pretrained(folder).state_dict().values()
    return all(bool(value.isfinite().all()) for value in weights)


def poison(monkeypatch: pytest.MonkeyPatch, step: int, when: str, value: float = math.nan) -> None:
    """From step `step` on the loss, a gradient or a weight is `value`."""
    taken = GramianTrainer.training_step
    passed = GramianTrainer._maybe_log_save_evaluate

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = taken(self, model, inputs, *args, **kwargs)
        if self.state.global_step + 1 == step:
            if when == "loss":
                return loss * value
            if when == "gradient":
                next(iter(model.parameters())).grad.fill_(value)
        return loss

    def maybe(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step and when == "weight":
            with torch.no_grad():
                next(self.model.parameters()).view(-1)[0] = value
        return passed(self, *args, **kwargs)

    monkeypatch.setattr(GramianTrainer, "training_step", training_step)
    monkeypatch.setattr(GramianTrainer, "_maybe_log_save_evaluate", maybe)


@pytest.mark.parametrize(
    ("step", "when", "last"),
    [
        (1, "loss", None),
        (2, "loss", None),  # a step that saves
        (3, "loss", 2),
        (6, "loss", 4),
        (4, "gradient", 2),  # the loss of that step is finite
        (5, "gradient", 4),
        (4, "weight", 2),
        (5, "weight", 4),
        (8, "weight", 6),  # the last
    ],
)
def test_a_run_stops_with_its_last_good_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Run,
    step: int,
    when: str,
    last: int | None,
) -> None:
    poison(monkeypatch, step, when)
    folder = tmp_path / "run"
    values = run(folder, "tokens", optimization__steps=8, evaluation__every=8)
    with pytest.raises(DivergedError) as caught:
        train(parse_config(values))
    sentence = str(caught.value)
    assert "\n" not in sentence and re.search(rf"at step {step}|at step {step + 1}", sentence)
    assert not (folder / "report.json").exists() and not (folder / "last").exists()
    if last is None:
        assert "no checkpoint is before it" in sentence
        assert not list(folder.glob("checkpoints/checkpoint-*"))
    else:
        good = folder / "checkpoints" / f"checkpoint-{last}"
        assert f"the last good checkpoint is {good}." in sentence
        assert finite(good)
    for saved in folder.glob("checkpoints/checkpoint-*"):
        assert finite(saved), saved
    text = (folder / "metrics.jsonl").read_text() if step > 1 else "{}"
    for line in text.splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(word))


OTHERS = ("classification", "pairs", "reconstruction")


@pytest.mark.parametrize(
    "kind", ["tokens", "signal", *(pytest.param(one, marks=pytest.mark.slow) for one in OTHERS)]
)
def test_a_rate_that_is_too_large(tmp_path: Path, run: Run, kind: str) -> None:
    values = run(tmp_path / "run", kind, **TOO_FAST, evaluation__every=1)
    with pytest.raises(DivergedError, match="at step 1"):
        train(parse_config(values))
    assert not (tmp_path / "run" / "best").exists()


def test_best_is_from_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    poison(monkeypatch, 5, "weight")
    folder = tmp_path / "run"
    values = run(folder, "tokens", optimization__steps=8, logging__every=8, checkpoints__every=8)
    with pytest.raises(DivergedError, match="the held-out loss is nan at step 6; no checkpoint"):
        train(parse_config(values))
    assert finite(folder / "best")
    losses = [line["eval_loss"] for line in read_lines(folder / "metrics.jsonl")]
    assert losses[-1] is None and all(math.isfinite(loss) for loss in losses[:-1])


def test_the_same_call_goes_on_from_the_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    whole = train(parse_config(run(tmp_path / "whole", "tokens")))
    config = parse_config(run(tmp_path / "run", "tokens"))
    with monkeypatch.context() as patch:
        poison(patch, 3, "weight")
        with pytest.raises(DivergedError):
            train(config)
    report = train(config)
    assert report.resumed_from == 2 and report.metrics == whole.metrics


def test_the_command_ends_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {
        "output": str(tmp_path / "run"),
        "task": {"name": "mqar", "vocab_size": 32, "length": 16, "pairs": 2, "train_examples": 16},
        "model": {"hidden_size": 8, "num_hidden_layers": 1, "num_heads": 2},
        "optimization": {"steps": 4, "batch_size": 8, "learning_rate": 1e30, "warmup": 0},
        "logging": {"every": 1},
        "hardware": {"device": "cpu"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr("sys.argv", ["gramian", "train", str(tmp_path / "config.yaml"), "--json"])
    with pytest.raises(SystemExit) as exit:
        main()
    out, err = capsys.readouterr()
    assert exit.value.code == 1 and out == ""
    assert err.count("\n") == 1 and re.match(r"gramian: the loss is (nan|inf) at step 2; no ", err)


@pytest.mark.slow
def test_a_sweep_lists_it_as_failed(tmp_path: Path) -> None:
    values = {
        "output": str(tmp_path / "sweep"),
        "task": {"name": "mqar", "vocab_size": 32, "length": 16, "pairs": 2, "train_examples": 16},
        "model": {"hidden_size": 8, "num_hidden_layers": 1, "num_heads": 2},
        "optimization": {"steps": 2, "batch_size": 8, "warmup": 0},
        "logging": {"every": 1},
        "sweep": {"optimization.learning_rate": [1e-3, 1e30]},
    }
    report = sweep(parse_sweep(values))
    (failed,) = report.failed
    assert failed.error is not None and failed.error.startswith("the ")
    assert "is nan at step" in failed.error or "is inf at step" in failed.error
    for name in ("results.json",):
        text = (tmp_path / "sweep" / name).read_text()
        json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert [row.failed for row in report.rows] == [0, 1]
