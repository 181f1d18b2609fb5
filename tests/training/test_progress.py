"""`train` and `sweep` tell how far they are in one way, and a sweep is never silent for long."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from gramian.training import SweepPoint, _sweep, parse_config, parse_sweep, progress, sweep, train

Run = Callable[..., dict[str, Any]]


def test_a_run_tells_its_steps(tmp_path: Path, run: Run) -> None:
    told: list[tuple[float, int]] = []
    values = run(tmp_path / "run", "tokens")
    train(parse_config(values), progress=lambda done, total: told.append((done, total)))
    assert told == [(step, 4) for step in range(5)]


def test_a_sweep_prints_a_line_a_run(
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(_sweep, "_by_processes", lambda waiting, jobs: map(failed, waiting))
    config = parse_sweep(run(tmp_path / "sweep", "tokens") | {"sweep": {"seed": [0, 1]}})
    assert len(sweep(config, progress=True).failed) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"gramian: {done} of 2 runs done" for done in (0, 1, 2)
    ]
    sweep(config)
    assert not capsys.readouterr().err


def failed(point: SweepPoint) -> _sweep._Outcome:
    return _sweep._Outcome(point, "it failed.", 0.0)


def test_a_line_is_due_after_half_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    lines = progress.Lines("runs")
    for now in range(100):
        lines(now / 200, 3)
    lines(1.0, 3)
    assert capsys.readouterr().err.splitlines() == [
        "gramian: 0 of 3 runs done",
        "gramian: 0 of 3 runs done, 15% of the work of one more",
        "gramian: 0 of 3 runs done, 30% of the work of one more",
        "gramian: 0 of 3 runs done, 45% of the work of one more",
        "gramian: 1 of 3 runs done",
    ]


@pytest.mark.parametrize("length", [{"steps": 8, "epochs": None}, {"steps": None, "epochs": 2.0}])
def test_the_share_of_a_run_is_read_from_its_folder(
    tmp_path: Path, run: Run, length: dict[str, Any]
) -> None:
    values = run(tmp_path / "sweep", "tokens") | {"sweep": {"seed": [0]}}
    values["optimization"] |= length
    (point,) = parse_sweep(values).points
    folder = Path(point.config.output)
    assert _sweep._share(point) == 0.0
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 6, "epoch": 1.5}\n{"step": 7, "ep')
    assert _sweep._share(point) == 0.75
