"""What else a configuration can ask for: none of it changes what is learned, but for rounding."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("yaml")

from gramian.models import load
from gramian.tasks import build
from gramian.training import ConfigError, parse_config, train
from gramian.training.recording import read_lines

TASK = {"vocab_size": 32, "length": 16, "pairs": 2, "train_examples": 48, "eval_examples": 20}


def run(folder: Path, **sections: Any) -> Any:
    """A run of seconds without dropout, with steps small enough for rounding to stay small."""
    values: dict[str, Any] = {
        "output": str(folder),
        "task": {"name": "mqar", **TASK},
        "model": {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2},
        "optimization": {"steps": 12, "batch_size": 8, "learning_rate": 1e-3},
        "evaluation": {"every": 6},
        "logging": {"every": 2},
        "hardware": {"device": "cpu", "threads": 1},
    }
    for section, changes in sections.items():
        values[section] = {**values[section], **changes}
    return train(parse_config(values))


def losses(folder: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in read_lines(folder / "metrics.jsonl") if key in line]


def test_gradient_checkpointing_gives_the_same_losses(tmp_path: Path) -> None:
    run(tmp_path / "plain")
    run(tmp_path / "less", hardware={"gradient_checkpointing": True})
    for key in ("loss", "eval_loss"):
        assert losses(tmp_path / "less", key) == pytest.approx(losses(tmp_path / "plain", key))


def test_mixed_precision_stays_close_and_keeps_weights_single(tmp_path: Path) -> None:
    run(tmp_path / "single")
    run(tmp_path / "mixed", hardware={"bf16": True})
    single, mixed = losses(tmp_path / "single"), losses(tmp_path / "mixed")
    assert mixed != single  # something was computed in half precision
    assert mixed == pytest.approx(single, rel=1e-2)
    weights = load(tmp_path / "mixed" / "last").state_dict().values()
    assert {weight.dtype for weight in weights} == {torch.float32}


def test_compiling_is_refused_with_an_old_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.8.1+cpu")
    with pytest.raises(ConfigError, match=r"needs PyTorch 2\.9 or newer; this is 2\.8\.1"):
        run(tmp_path / "compiled", hardware={"compile": True})


@pytest.mark.slow
@pytest.mark.skipif(Version(torch.__version__) < Version("2.9"), reason="needs PyTorch 2.9")
def test_compiled_training_gives_the_same_losses(tmp_path: Path) -> None:
    run(tmp_path / "plain")
    run(tmp_path / "compiled", hardware={"compile": True})
    for key in ("loss", "eval_loss"):
        assert losses(tmp_path / "compiled", key) == pytest.approx(
            losses(tmp_path / "plain", key), rel=1e-4
        )
    one, other = (load(tmp_path / name / "last").state_dict() for name in ("plain", "compiled"))
    assert one.keys() == other.keys()


def test_tensorboard_shows_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    before = dict(os.environ)
    run(tmp_path / "run", logging={"report_to": "tensorboard"})
    assert os.environ.get("TENSORBOARD_LOGGING_DIR") == before.get("TENSORBOARD_LOGGING_DIR")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for tag, key in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        lines = read_lines(tmp_path / "run" / "metrics.jsonl")
        logged = [(line["step"], line[key]) for line in lines if key in line]
        assert [step for step, _ in shown] == [step for step, _ in logged]
        assert [value for _, value in shown] == pytest.approx([value for _, value in logged])


def test_after_early_stopping_the_best_model_is_there(tmp_path: Path) -> None:
    """Steps this large soon do harm: the best model is an early one, and not the last."""
    report = run(
        tmp_path / "run",
        optimization={"steps": 60, "learning_rate": 0.3, "schedule": "constant", "warmup": 0},
        evaluation={"every": 2, "patience": 3},
    )
    held_out = losses(tmp_path / "run", "eval_loss")
    assert report.steps < 60
    best = held_out.index(min(held_out))
    assert report.best == {"loss": held_out[best], "step": 2 * (best + 1)}
    assert len(held_out) == best + 1 + 3
    for name, expected in (("best", held_out[best]), ("last", held_out[-1])):
        assert score(tmp_path / "run" / name) == pytest.approx(expected, rel=1e-4)


def score(folder: Path) -> float:
    """Mean -log p of all answers of the validation split, by its definition."""
    model, loss, count = load(folder), 0.0, 0
    for row in build("mqar", **TASK).dataset("validation", 0):
        due = row["labels"]
        with torch.no_grad():
            logits = model(row["input_ids"][None], use_cache=False).logits[0].double()
        for place in torch.nonzero(due >= 0).flatten():
            loss -= float(logits[place].log_softmax(-1)[due[place]])
            count += 1
    return loss / count


def test_processes_that_load_data_change_nothing(tmp_path: Path) -> None:
    run(tmp_path / "none")
    run(tmp_path / "two", hardware={"workers": 2})
    assert losses(tmp_path / "two") == losses(tmp_path / "none")
