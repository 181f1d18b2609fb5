"""Several processes: one model over gloo where there is no accelerator, or one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from gramian.cli import main
from gramian.training import ConfigError, parse_config, parse_sweep, sweep, train
from gramian.training.recording import read_lines

ROOT = Path(__file__).parents[2]


def mqar(folder: Path, **optimization: Any) -> dict[str, Any]:
    """A run of seconds on whatever device there is; rows that two processes cannot share evenly."""
    return {
        "output": str(folder),
        "seed": 3,
        "task": {
            "name": "mqar",
            "vocab_size": 32,
            "length": 16,
            "pairs": 2,
            "train_examples": 48,
            "eval_examples": 21,
        },
        "model": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_heads": 2,
            "intermediate_size": 16,
        },
        "optimization": {"steps": 12, "batch_size": 8, "learning_rate": 1e-3, **optimization},
        "evaluation": {"every": 6},
        "checkpoints": {"every": 4},
        "logging": {"every": 2},
        "hardware": {"threads": 1},
    }


def start(config: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """`gramian train` by two processes, or another command that takes its arguments."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return subprocess.run(
        [sys.executable, *launcher, *(command or ("-m", "gramian")), "train", str(config)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=300,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="processors are not meant here")
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_train_one_model_and_survive_a_kill(tmp_path: Path, rank: int) -> None:
    """The default device, without an accelerator: the figures of one process, and one folder."""
    sections: dict[str, Any] = {}
    if rank:  # one of the two runs has a teacher
        train(parse_config(mqar(tmp_path / "teacher", steps=1) | {"seed": 7}))
        sections["teacher"] = {"path": str(tmp_path / "teacher" / "last"), "weight": 0.5}
    train(parse_config(mqar(tmp_path / "one") | sections))
    folder, config = tmp_path / "two", tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump(mqar(folder) | sections))
    program = tmp_path / "killing.py"
    program.write_text(
        "import os, signal\n"
        "from gramian.training import trainer\n"
        "class Killed(trainer.GramianTrainer):\n"
        "    def training_step(self, *args, **kwargs):\n"
        f"        if self.state.global_step == 7 and os.environ['RANK'] == '{rank}':\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().training_step(*args, **kwargs)\n"
        "import gramian.training._run as run\n"
        "run.GramianTrainer = Killed\n"
        "from gramian.cli import main\n"
        "main()\n"
    )
    killed = start(config, str(program))
    assert killed.returncode != 0 and not (folder / "report.json").exists()
    whole = start(config)
    assert whole.returncode == 0, whole.stderr
    assert "missing keys" not in whole.stderr  # of tied weights, which files have once
    assert whole.stdout.count("parameters, 12 steps") == 1
    one, two = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for first, second in zip(one, two, strict=True):
        for key in first.keys() & {"loss", "eval_loss", "eval_accuracy", "grad_norm"}:
            assert second[key] == pytest.approx(first[key], rel=1e-4), key
    reports = [json.loads((tmp_path / n / "report.json").read_text()) for n in ("one", "two")]
    assert [report["resumed_from"] for report in reports] == [0, 4]
    assert reports[1]["metrics"]["loss"] == pytest.approx(reports[0]["metrics"]["loss"], rel=1e-5)
    starts = json.loads((folder / "environment.json").read_text())
    assert [one["processes"] for one in starts] == [2, 2]


@pytest.mark.slow
def test_two_processes_that_lose_their_way_end_with_a_status(tmp_path: Path) -> None:
    config = tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump(mqar(tmp_path / "two", learning_rate=1e30, warmup=0)))
    child = start(config)
    assert child.returncode != 0
    assert "gramian: the loss is " in child.stderr
    assert "no checkpoint is before it" in child.stderr


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 in the environment but RANK is not set"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE in the environment must be at least 1; got '0'"),
        ({"WORLD_SIZE": "-2"}, "must be at least 1; got '-2'"),
        ({"WORLD_SIZE": "two"}, "must be at least 1; got 'two'"),
        ({"WORLD_SIZE": ""}, "must be at least 1; got ''"),
        ({"WORLD_SIZE": "3", "RANK": "0"}, "divisible by processes × accumulation, here 3 × 1"),
    ],
)
def test_an_environment_of_other_processes_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], sentence: str
) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=sentence) as caught:
        train(parse_config(mqar(tmp_path / "run")))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_size_that_training_does_not_have_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a launcher's variables are left over, or accelerate sees another number."""
    monkeypatch.setattr("gramian.training.arguments.world_size", lambda: 2)
    with pytest.raises(ConfigError, match="says WORLD_SIZE=2, but 1 take part in this run"):
        train(parse_config(mqar(tmp_path / "run")))


def test_more_processes_than_accelerators_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="2 processes of this machine need an accelerator each"):
        train(parse_config(mqar(tmp_path / "run")))


def test_a_sweep_is_no_part_of_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    values = mqar(tmp_path / "sweep") | {"sweep": {"seed": [0, 1]}}
    with pytest.raises(ConfigError, match="cannot be one of 2: start it without torchrun"):
        sweep(parse_sweep(values))
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("arguments", ["evaluate x --text y", "evaluate x --task mqar"])
def test_an_evaluation_is_no_part_of_several_processes(
    arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("sys.argv", ["gramian", *arguments.split()])
    with pytest.raises(SystemExit) as exit:
        main()
    out, err = capsys.readouterr()
    assert (exit.value.code, out, err.count("\n")) == (1, "", 1)
    assert "evaluate runs in one process" in err
