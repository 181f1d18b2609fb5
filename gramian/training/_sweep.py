"""Run each point of a sweep in a process on this machine, or as a task of a Ray cluster.

sweep.yaml         the configuration
NAME=VALUE,…/      folders of the runs
logs/              output of each run's processes, and tracebacks
results.json       all results; this file and the files below are written at the end
results.csv        one line per run
table.md           means over the seeds
sweep.png          the metric along the first numeric axis

Each run has its own process, so a run that fails or dies does not affect the others. If a sweep was
killed, the same call resumes it and keeps the finished runs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from gramian._checks import check_sizes
from gramian._cluster import Call, Lost, run_calls
from gramian._drawing import save_figure
from gramian._processes import require_one_process
from gramian._staging import staged_file
from gramian.training._run import TrainingReport, check, earlier_report, train
from gramian.training.configuration import ConfigError, TrainingConfig
from gramian.training.plots import plot_sweep
from gramian.training.progress import Lines, Progress
from gramian.training.recording import write_json
from gramian.training.sweep_configuration import SweepConfig, SweepPoint
from gramian.training.sweep_report import PointReport, SweepReport
from gramian.training.trainer import DivergedError

__all__ = ["sweep"]

POLL = 0.5  # seconds between two checks of the runs' progress


def sweep(
    config: SweepConfig,
    *,
    jobs: int = 1,
    address: str | None = None,
    progress: Progress = False,
) -> SweepReport:
    """Run the unfinished points of a sweep, and gather the results.

    Every point is checked before the first one starts. If a run fails, the report lists its error,
    and the other runs continue. The next call tries the failed run again.

    Args:
        config: a configuration from `load_sweep` or `parse_sweep`.
        jobs: number of simultaneous runs on this machine. Each run uses `hardware.threads` cores
            or, by default, an equal share of the cores. Accelerators are assigned in turn, one per
            run.
        address: address of a Ray cluster, or `"auto"` for the cluster of this machine. The machines
            of the cluster run the points, and must share the file system and the working directory.
            `jobs` is then ignored. Each run requests `hardware.threads` cores, and one accelerator
            if the cluster has any.
        progress: whether to print progress on standard error, with one line for every run that ends
            and at least one line every 30 seconds; or a function, which is called as
            `progress(done, total)` with numbers of runs. In `done`, an unfinished run counts as its
            finished fraction.

    Returns:
        The report, which is also saved in the sweep's folder.

    Raises:
        ConfigError: if the task, model and batch size of a point do not fit together, if a folder
            holds another run, or if the sweep is started as one of several processes.
        FileNotFoundError: if a file of a task is missing.
        ImportError: if an address is given and Ray is not installed.
        ValueError: if `jobs` is not an integer of at least 1.
    """
    check_sizes(jobs=jobs)
    try:
        require_one_process("a sweep starts its own processes")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    finished = _check(config)
    folder = Path(config.output)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    _write_source(config)
    waiting = [point for point in config.points if point.name not in finished]
    outcomes: dict[str, TrainingReport | str] = dict(finished)
    count = len(config.points)
    show = progress if callable(progress) else Lines("runs") if progress else _show_nothing
    show(len(outcomes), count)
    if waiting:
        runs = _by_ray(waiting, address) if address is not None else _by_processes(waiting, jobs)
        for outcome in runs:
            if outcome.result is not None:
                outcomes[outcome.point.name] = outcome.result
            show(len(outcomes) + outcome.under_way, count)
    return _gather(config, outcomes)


def _show_nothing(done: float, total: int) -> None:
    """Ignore the progress."""


def _check(config: SweepConfig) -> dict[str, TrainingReport]:
    """Check every point, and return a mapping from the names of finished points to their reports.

    If a point cannot run, its error is raised.
    """
    finished, seen = {}, set()
    for point in config.points:
        try:
            same = repr(dataclasses.replace(point.config, output="", seed=0))
            if same not in seen:
                check(point.config)
            seen.add(same)
            report = earlier_report(Path(point.config.output), point.config)
        except ConfigError as error:
            raise ConfigError(f"{point.name}: {error}") from error
        if report is not None:
            finished[point.name] = report
    return finished


def _write_source(config: SweepConfig) -> None:
    import yaml

    with staged_file(Path(config.output) / "sweep.yaml") as stage:
        stage.write_text(yaml.safe_dump(config.source, sort_keys=False), encoding="utf-8")


def _gather(config: SweepConfig, outcomes: dict[str, TrainingReport | str]) -> SweepReport:
    points = []
    for point in config.points:
        outcome = outcomes[point.name]
        if isinstance(outcome, str):
            points.append(PointReport(point.name, point.values, error=outcome))
        else:
            points.append(PointReport(point.name, point.values, report=outcome))
    report = SweepReport(config.output, config.metric, config.axes, tuple(points))
    folder = Path(config.output)
    write_json(folder / "results.json", report.to_dict())
    for name, text in (("results.csv", report.to_csv()), ("table.md", report.to_markdown())):
        with staged_file(folder / name) as stage:
            stage.write_text(text, encoding="utf-8")
    if any(row.best is not None for row in report.rows):
        save_figure(plot_sweep(report), folder / "sweep.png")
    return report


@dataclass(frozen=True)
class _Outcome:
    """An event of the sweep: a run has ended, or some time has passed.

    Attributes:
        point: the point whose run has ended, or any unfinished point if no run has ended.
        result: the report of the run, or its error as text; None if no run has ended.
        under_way: sum of the finished fractions of the runs that have not ended.
    """

    point: SweepPoint
    result: TrainingReport | str | None
    under_way: float


@dataclass
class _Job:
    """A process that runs a point. Processes that run at the same time differ in `slot`."""

    point: SweepPoint
    process: BaseProcess
    receiver: Any
    slot: int


def _by_processes(waiting: list[SweepPoint], jobs: int) -> Iterator[_Outcome]:
    """Run points in fresh processes, `jobs` at a time."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    devices = _devices()
    context: Any = multiprocessing.get_context("spawn")
    if not devices and "forkserver" in multiprocessing.get_all_start_methods():
        # A fork server imports modules only once. It is not used with accelerators, because a
        # process that has initialized one must not fork.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
    queue, running = list(reversed(waiting)), list[_Job]()
    free = list(range(jobs - 1, -1, -1))
    try:
        while queue or running:
            while queue and free:
                point, slot = queue.pop(), free.pop()
                receiver, sender = context.Pipe(duplex=False)
                device = devices[slot % len(devices)] if devices else None
                log = _log(point)
                process = context.Process(
                    target=_work, args=(sender, point.config, threads, device, log), name=point.name
                )
                process.start()
                sender.close()
                running.append(_Job(point, process, receiver, slot))
            connection.wait([job.process.sentinel for job in running], timeout=POLL)
            ended = [job for job in running if not job.process.is_alive()]
            running = [job for job in running if job not in ended]
            under_way = sum(_share(job.point) for job in running)
            for job in ended:
                free.append(job.slot)
                yield _Outcome(job.point, _result_of(job), under_way)
            if running and not ended:
                yield _Outcome(running[0].point, None, under_way)
    finally:
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.join()


def _result_of(job: _Job) -> TrainingReport | str:
    """Return the report or error that an ended process sent, or one line that says how it ended."""
    job.process.join()
    try:
        if job.receiver.poll():
            result: TrainingReport | str = job.receiver.recv()
            return result
    except EOFError:
        pass
    finally:
        job.receiver.close()
    code = job.process.exitcode or 0
    if code < 0:
        name = signal.Signals(-code).name if -code in list(signal.Signals) else str(-code)
        return f"its process was killed by {name}."
    return f"its process ended with status {code}; {_log(job.point)} may say why."


def _work(sender: Any, config: TrainingConfig, threads: int, device: str | None, log: str) -> None:
    """Run a point in its own process, and send its report, or one line that says why it failed."""
    _end_with_parent()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(threads)
    try:
        sender.send(train(config))
    except Exception as error:
        traceback.print_exc()
        sender.send(_one_line(error))
    finally:
        sender.close()
        sys.stdout.flush()


def _end_with_parent() -> None:
    """End this process when its parent ends.

    Otherwise the runs of a killed sweep would go on and conflict with those of the next sweep.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _by_ray(waiting: list[SweepPoint], address: str | None) -> Iterator[_Outcome]:
    """Run points as tasks of a Ray cluster."""
    calls = [
        Call(
            point.name,
            _work_remotely,
            (point.config, _log(point)),
            threads=point.config.hardware.threads or 1,
            accelerator=point.config.hardware.device == "auto",
        )
        for point in waiting
    ]
    running = {point.name: point for point in waiting}
    for ended in run_calls(calls, address):
        point = next(iter(running.values())) if ended is None else running.pop(ended[0].name)
        share = sum(_share(one) for one in running.values())
        result = None if ended is None else ended[1]
        yield _Outcome(point, result.reason if isinstance(result, Lost) else result, share)


def _work_remotely(config: TrainingConfig, log: str) -> TrainingReport | str:
    """Run a point in a Ray worker."""
    try:
        return train(config)
    except Exception as error:
        with open(log, "a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        return _one_line(error)


def _share(point: SweepPoint) -> float:
    """Return the fraction of its steps that a run has completed, according to its folder."""
    optimization = point.config.optimization
    lines = Path(point.config.output) / "metrics.jsonl"
    if not lines.is_file():
        return 0.0
    key, total = "step", optimization.steps or math.inf
    if optimization.epochs is not None:
        key, total = "epoch", optimization.epochs
    with lines.open("rb") as file:
        file.seek(max(0, lines.stat().st_size - 4096))
        for line in reversed(file.read().splitlines()):
            try:
                return min(1.0, float(json.loads(line)[key]) / total)
            except (ValueError, KeyError, TypeError):  # a line of which a part is missing
                continue
    return 0.0


def _devices() -> list[str]:
    """Return the accelerators that this process may use, by their names in CUDA_VISIBLE_DEVICES."""
    count = torch.cuda.device_count()
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = allowed.split(",") if allowed else [str(index) for index in range(count)]
    return names[:count]


def _log(point: SweepPoint) -> str:
    folder = Path(point.config.output)
    return str(folder.parent / "logs" / f"{folder.name}.log")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    explained = isinstance(error, ConfigError | DivergedError)
    return text if explained else f"{type(error).__name__}: {text}"
