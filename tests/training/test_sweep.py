"""Sweeps: what a file means, names of folders, tables, failures, resumption after a real kill."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from rich.console import Console

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("yaml")

from gramian.training import (
    ConfigError,
    PointReport,
    Spread,
    SweepReport,
    TrainingReport,
    load_config,
    load_sweep,
    parse_sweep,
    plot_sweep,
    sweep,
)
from gramian.training.recording import read_lines

ROOT = Path(__file__).parents[2]


def grid(folder: Path, axes: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A sweep of runs of a second."""
    values: dict[str, Any] = {
        "output": str(folder),
        "task": {
            "name": "mqar",
            "vocab_size": 32,
            "length": 16,
            "pairs": 2,
            "train_examples": 48,
            "eval_examples": 20,
        },
        "model": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_heads": 2,
            "intermediate_size": 16,
            "mixers": "softmax_attention",
        },
        "optimization": {"steps": 4, "batch_size": 8, "learning_rate": 0.01},
        "checkpoints": {"every": 2},
        "logging": {"every": 1},
        "hardware": {"device": "cpu"},
        "sweep": axes,
    }
    for name, change in changes.items():
        section, _, key = name.partition("__")
        values[section][key] = change
    return values


STEPS = {"optimization__steps": 5}


def test_a_grid_has_every_combination_under_its_own_name(tmp_path: Path) -> None:
    config = parse_sweep(
        grid(
            tmp_path,
            {
                "seed": [0, 1],
                "optimization.learning_rate": ["1e-3", 0.01],
                "layer": {
                    "attention": {"model.mixers": "softmax_attention"},
                    "RTF in Hyena": {
                        "model.mixers": "hyena",
                        "model.filter": {"type": "rtf", "state_size": 4},
                    },
                },
            },
        )
    )
    names = [point.name for point in config.points]
    assert len(set(names)) == 8
    assert names[0] == "seed=0,learning_rate=0.001,layer=attention"
    assert names[1].startswith("seed=0,learning_rate=0.001,layer=RTF-in-Hyena-")
    assert names[-1].startswith("seed=1,learning_rate=0.01,layer=RTF-in-Hyena-")
    for point in config.points:
        one = point.config
        assert one.output == str(tmp_path / point.name)
        assert one.seed == point.values["seed"]
        assert one.optimization.learning_rate == point.values["optimization.learning_rate"]
        if point.values["layer"] == "attention":
            assert one.model["mixers"] == "softmax_attention" and "filter" not in one.model
        else:
            assert one.model["filter"] == {"type": "rtf", "state_size": 4}
        assert one.task["vocab_size"] == 32


def test_names_of_values_are_fit_for_folders_and_distinct(tmp_path: Path) -> None:
    values = [
        "hyena",
        ["hyena", "s6"],
        ["hyena", "s 6"],
        "h/y",
        "h y",
        "../x",
        "4",
        4,
        None,
        "null",
    ]
    config = parse_sweep(grid(tmp_path, {"model.mixers": values}))
    names = [point.name for point in config.points]
    assert len(set(names)) == len(values)
    assert names[0] == "mixers=hyena"
    for name in names:
        assert "/" not in name and " " not in name and len(name) < 100
    assert [point.config.model["mixers"] for point in config.points] == values
    # A grid that grows keeps the folders that it had.
    more = parse_sweep(grid(tmp_path, {"model.mixers": [*values, "multi_hyena"]}))
    assert [point.name for point in more.points][: len(names)] == names
    # Keys that end alike are written in full.
    config = parse_sweep(grid(tmp_path, {"task.length": [16], "evaluation.sample_length": [4]}))
    assert config.points[0].name == "length=16,sample_length=4"
    config = parse_sweep(grid(tmp_path, {"checkpoints.every": [2], "logging.every": [1, 2]}))
    assert config.points[1].name == "checkpoints.every=2,logging.every=2"


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        ({}, "lacks a sweep"),
        ([1], "sweep must hold keys and lists"),
        ({"seed": 3}, "the axis seed of the sweep must be a list"),
        ({"seed": []}, "the axis seed of the sweep must be a list"),
        ({"seed": [1, 2, 1]}, "the axis seed of the sweep repeats 1"),
        ({"layer": {"a": 3}}, "a of the axis layer must hold changes"),
        ({"output": ["a", "b"]}, "cannot change output"),
        ({"evaluation.metric": ["loss", "accuracy"]}, r"cannot change evaluation\.metric"),
        ({"evaluation": [{"metric": "accuracy"}]}, r"cannot change evaluation\.metric"),
        ({"seed": [0], "b": {"x": {"seed": 1}}}, "the axes seed and b of the sweep both set seed"),
        (
            {"model.filter": [{"type": "rtf"}], "b": {"x": {"model.filter.type": "s4"}}},
            r"both set model\.filter\.type",
        ),
        ({"optimization.step": [1]}, "step=1: unknown key of optimization 'step'. Did you mean"),
        ({"seed": [0, "x"]}, "seed=x: seed must be an integer"),
    ],
)
def test_mistakes_in_a_sweep_are_told(tmp_path: Path, axes: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_sweep(grid(tmp_path, axes))


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        ({"seed": [0], "model.hiden_size": [8]}, "seed=0,hiden_size=8: unknown key of model"),
        ({"seed": [0], "model.vocab_size": [32, 31]}, "vocab_size=31: model.vocab_size must be"),
        ({"task.pairs": [2, 200]}, "pairs=200: task: "),
        ({"model.mixers": ["hyena", "heyna"]}, "mixers=heyna: model: "),
        ({"optimization.accumulation": [1, 3]}, "accumulation=3: optimization.batch_size must be"),
        ({"task.name": ["mqar", "mqr"]}, "name=mqr: task: unknown task"),
    ],
)
def test_no_run_starts_if_one_could_not(tmp_path: Path, axes: Any, sentence: str) -> None:
    folder = tmp_path / "sweep"
    with pytest.raises(ConfigError, match=sentence):
        sweep(parse_sweep(grid(folder, axes)))
    assert not folder.exists()


def test_changes_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(grid(tmp_path, {"seed": [0, 1]}), sort_keys=False))
    changes = ["optimization.steps=9", "sweep.model.hidden_size=[8,16]", "sweep.seed=[5]"]
    config = load_sweep(file, changes)
    assert config.axes == {"seed": [5], "model.hidden_size": [8, 16]}
    assert {point.config.optimization.steps for point in config.points} == {9}
    with pytest.raises(ConfigError, match=r"seed is swept; change the axis: sweep\.seed="):
        load_sweep(file, ["seed=3"])
    with pytest.raises(ConfigError, match="holds a sweep, which gramian sweep runs"):
        load_config(file)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_sweep_runs_every_point_and_gathers_them(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    shares: list[float] = []
    few = parse_sweep(grid(folder, {"seed": [0, 1], "model.hidden_size": [8]}))
    first = sweep(few, jobs=2, progress=lambda done, total: shares.append(done / total))
    assert shares[0] == 0 and shares[-1] == 1 and max(shares) == 1
    assert not first.failed and len(first.points) == 2
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/report.json")}

    # Finished points are left as they are; a grid that grows runs what is new.
    config = parse_sweep(grid(folder, {"seed": [0, 1], "model.hidden_size": [8, 16]}))
    report = sweep(config, jobs=2)
    after = {path: path.stat().st_mtime_ns for path in folder.glob("*/report.json")}
    assert len(after) == 4 and all(after[path] == time for path, time in before.items())
    assert [point for point in report.points if point.values["model.hidden_size"] == 8] == list(
        first.points
    )
    assert not report.failed and len(report.points) == 4
    assert sorted(path.name for path in folder.iterdir()) == [
        "logs",
        "results.csv",
        "results.json",
        *(f"seed={seed},hidden_size={size}" for seed in (0, 1) for size in (16, 8)),
        "sweep.png",
        "sweep.yaml",
        "table.md",
    ]
    # What the points' own files say, put together by hand.
    own = {
        point.name: json.loads((folder / point.name / "report.json").read_text())
        for point in config.points
    }
    for point in report.points:
        assert point.report is not None and point.report.to_dict() == own[point.name]
    assert own["seed=0,hidden_size=8"]["parameters"] < own["seed=0,hidden_size=16"]["parameters"]
    assert own["seed=0,hidden_size=8"]["metrics"] != own["seed=1,hidden_size=8"]["metrics"]
    assert [row.values for row in report.rows] == [{"model.hidden_size": n} for n in (8, 16)]
    for row in report.rows:
        size = row.values["model.hidden_size"]
        losses = [own[f"seed={seed},hidden_size={size}"]["best"]["loss"] for seed in (0, 1)]
        assert row.best is not None and row.runs == 2 and row.steps == 4
        assert row.best.mean == pytest.approx(statistics.mean(losses))
        assert row.best.deviation == pytest.approx(statistics.stdev(losses))
        cell = f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}"
        assert cell in (folder / "table.md").read_text()
    written = json.loads((folder / "results.json").read_text())
    assert written == json.loads(json.dumps(report.to_dict()))
    lines = list(csv.DictReader((folder / "results.csv").open()))
    assert len(lines) == 4
    for line in lines:
        run = own[f"seed={line['seed']},hidden_size={line['model.hidden_size']}"]
        assert float(line["best_loss"]) == run["best"]["loss"]
        assert float(line["last_accuracy"]) == run["metrics"]["accuracy"]
    assert yaml.safe_load((folder / "sweep.yaml").read_text()) == config.source

    # Other settings in the same folders are refused.
    with pytest.raises(ConfigError, match=r"holds a run with another optimization\.steps"):
        sweep(parse_sweep(grid(folder, {"seed": [0, 1], "model.hidden_size": [8]}, **STEPS)))


OWN_TASK = """
import multiprocessing, os, signal, sys
from dataclasses import dataclass
import yaml
from gramian.tasks import Description, GeneratedTask, register
from gramian.training import parse_sweep, sweep

@register("moody")
@dataclass(frozen=True, kw_only=True)
class Moody(GeneratedTask):
    mood: str = "good"

    def description(self):
        return Description("tokens", 8, vocab_size=9)

    def row(self, random, split):
        if multiprocessing.parent_process() is not None:
            if self.mood == "bad":
                raise RuntimeError("the disk\\nis full")
            if self.mood == "dead":
                os.kill(os.getpid(), signal.SIGKILL)
        tokens = random.integers(1, 9, size=8)
        return {"input_ids": tokens, "labels": tokens}

if __name__ == "__main__":
    sweep(parse_sweep(yaml.safe_load(open(sys.argv[1]))), jobs=2)
"""


@pytest.mark.slow
def test_runs_that_fail_or_die_leave_the_others_alone(tmp_path: Path) -> None:
    """Of a task of the caller's own, which its processes know too."""
    folder, program = tmp_path / "sweep", tmp_path / "own.py"
    values = grid(folder, {"seed": [0, 1], "task.mood": ["bad", "good", "dead"]})
    values["task"] = {"name": "moody", "train_examples": 32, "eval_examples": 8}
    program.write_text(OWN_TASK)
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    child = start(str(program), str(tmp_path / "sweep.yaml"))
    _, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    results = json.loads((folder / "results.json").read_text())
    errors = {point["name"]: point["error"] for point in results["points"]}
    for seed in (0, 1):
        assert errors[f"seed={seed},mood=good"] is None
        assert errors[f"seed={seed},mood=bad"] == "RuntimeError: the disk is full"
        assert errors[f"seed={seed},mood=dead"] == "its process was killed by SIGKILL."
    rows = {row["values"]["task.mood"]: row for row in results["rows"]}
    assert (rows["good"]["runs"], rows["good"]["failed"]) == (2, 0)
    assert (rows["bad"]["runs"], rows["bad"]["failed"], rows["bad"]["best"]) == (0, 2, None)
    assert "Traceback" in (folder / "logs" / "seed=0,mood=bad.log").read_text()
    table = (folder / "table.md").read_text()
    assert "| bad | 0 of 2 | failed |" in table and "6 runs, 4 failed" in table
    assert "- `seed=1,mood=dead`: its process was killed by SIGKILL." in table


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.slow
def test_a_sweep_killed_at_work_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    axes = {"seed": [0, 1], "model.hidden_size": [8, 16]}
    longer = {"optimization__steps": 40}
    sweep(parse_sweep(grid(whole, axes, **longer)), jobs=2)
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(grid(killed, axes, **longer), sort_keys=False))
    command = ("-m", "gramian", "sweep", str(file), "--jobs", "2")
    # Once with the first runs under way, and once when one of the later ones is.
    for name in ("seed=0,hidden_size=8", "seed=1,hidden_size=8"):
        child = start(*command)
        lines = killed / name / "metrics.jsonl"
        while not lines.is_file() or len(read_lines(lines)) < 10:
            assert child.poll() is None, child.communicate()
            time.sleep(0.01)
        below = psutil.Process(child.pid).children(recursive=True)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert below
        _, alive = psutil.wait_procs(below, timeout=60)
        assert not alive
    assert not (killed / "results.json").exists()
    child = start(*command, "--json")
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    report = json.loads(out)
    assert any(point["report"]["resumed_from"] > 0 for point in report["points"])
    for point in report["points"]:
        assert learned(killed / point["name"]) == learned(whole / point["name"])
    assert (killed / "sweep.png").is_file()


def learned(folder: Path) -> list[dict[str, Any]]:
    """What was logged, but for how long things took."""
    return [
        {key: value for key, value in line.items() if "second" not in key and "runtime" not in key}
        for line in read_lines(folder / "metrics.jsonl")
    ]


def start(*arguments: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def run(loss: float, accuracy: float, steps: int = 10, **sizes: float) -> TrainingReport:
    metrics = {"loss": loss + 1, "accuracy": accuracy - 0.25}
    best = {"accuracy": accuracy, "step": 5}
    return TrainingReport("x", steps, 7, metrics | sizes, best, 2.0, 0)


def test_the_values_of_a_table() -> None:
    axes = {"task.length": [16, 128], "seed": [0, 1, 2], "layer": ["a", "b|c"]}
    points = tuple(
        PointReport(
            f"{length}{seed}{layer}",
            {"task.length": length, "seed": seed, "layer": layer},
            *(
                (None, "lost.")
                if (length, layer) == (128, "a") and seed
                else (run(0.5, 0.5 + seed / 8),)
            ),
        )
        for length in axes["task.length"]
        for seed in axes["seed"]
        for layer in axes["layer"]
    )
    report = SweepReport("out", "accuracy", axes, points)
    rows = report.rows
    assert [tuple(row.values.values()) for row in rows] == [
        (16, "a"),
        (16, "b|c"),
        (128, "a"),
        (128, "b|c"),
    ]
    assert rows[0].best == Spread(0.625, 0.125) and rows[0].last == Spread(0.375, 0.125)
    assert rows[2].best == Spread(0.5, None) and (rows[2].runs, rows[2].failed) == (1, 2)
    lines = report.to_markdown().splitlines()
    assert lines[0] == "| length | layer | runs | best accuracy | last accuracy | steps | seconds |"
    assert lines[2] == "| 16 | a | 3 | 0.6250 ± 0.1250 | 0.3750 ± 0.1250 | 10 | 2 |"
    assert lines[4] == "| 128 | a | 1 of 3 | 0.5000 | 0.2500 | 10 | 2 |"
    assert lines[5].startswith("| 128 | b\\|c | 3 |")
    (axes_,) = plot_sweep(report).axes
    curves = {line.get_label(): line for line in axes_.containers}
    assert list(curves) == ["layer a", "layer b|c"]
    x, y = curves["layer a"].lines[0].get_data()
    assert list(x) == [16, 128] and list(y) == [0.625, 0.5]
    assert axes_.get_xscale() == "log" and axes_.get_ylabel() == "best accuracy"


def test_state_sizes_join_the_table_where_they_were_measured() -> None:
    points = tuple(
        PointReport(f"{name}{seed}", {"layer": name, "seed": seed}, run(1.0, 0.5, **sizes))
        for name, sizes in (("a", {"ess": 3.0, "ess_utilization": 0.5}), ("b", {}))
        for seed in (0, 1)
    )
    report = SweepReport("out", "accuracy", {"layer": ["a", "b"], "seed": [0, 1]}, points)
    assert report.rows[0].ess == Spread(3.0, 0.0) and report.rows[1].ess is None
    header, _, first, second, *_ = report.to_markdown().splitlines()
    assert header.endswith("| last accuracy | ESS | in use | steps | seconds |")
    assert "| 3.0000 ± 0.0000 | 0.5000 ± 0.0000 | 10 |" in first and "|  |  | 10 |" in second
    assert report.to_dict()["rows"][0]["ess_utilization"]["mean"] == 0.5
    console = Console(width=80, file=io.StringIO())  # too narrow for all: nothing disappears
    console.print(report)
    text = console.file.getvalue()
    assert all(name in text for name in ("layer", "runs", "steps", " a │", " b │"))


def test_bars_where_no_axis_has_numbers() -> None:
    names = ["a", "b"]
    points = tuple(
        PointReport(name, {"layer": name}, run(1.0, score))
        for name, score in zip(names, (0.25, 0.75), strict=True)
    )
    report = SweepReport("out", "accuracy", {"layer": names}, points)
    assert plot_sweep(report).get_suptitle() == "out"
    (axes,) = plot_sweep(report).axes
    assert [bar.get_width() for bar in axes.patches] == [0.25, 0.75]
    failed = SweepReport("out", "accuracy", {"layer": ["a"]}, (PointReport("a", {}, error="x"),))
    with pytest.raises(ValueError, match="no run that finished"):
        plot_sweep(failed)


def test_jobs_and_addresses(tmp_path: Path) -> None:
    config = parse_sweep(grid(tmp_path / "sweep", {"seed": [0]}))
    with pytest.raises(ValueError, match="jobs must be an integer of at least 1; got 0"):
        sweep(config, jobs=0)
    if not importlib.util.find_spec("ray"):
        with pytest.raises(ImportError, match=r"gramian\[ray\]"):
            sweep(config, address="auto")


@pytest.mark.slow
def test_a_ray_cluster_gives_what_processes_give(tmp_path: Path) -> None:
    """On a cluster of this machine, that the command connects to; two runs fail."""
    ray = pytest.importorskip("ray")
    axes = {"model.hidden_size": [8, 16], "logging.report_to": [[], ["no_such_reporter"]]}
    here = sweep(parse_sweep(grid(tmp_path / "here", axes)), jobs=2)
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(grid(tmp_path / "there", axes), sort_keys=False))
    cluster = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        address = cluster.address_info["gcs_address"]
        child = start("-m", "gramian", "sweep", str(file), "--address", address, "--json")
        out, err = child.communicate(timeout=300)
    finally:
        ray.shutdown()
    assert child.returncode == 1, err
    there = json.loads(out)
    for one, other in zip(here.points, there["points"], strict=True):
        assert one.error == other["error"]
        if one.report is not None:
            assert other["report"]["metrics"] == one.report.metrics
            assert learned(tmp_path / "there" / one.name) == learned(tmp_path / "here" / one.name)
    assert len(here.failed) == 2
