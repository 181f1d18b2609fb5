"""How many tokens per second does `gramian train` process, compared with a bare PyTorch loop?

Each case is a recipe. `gramian.training.train` runs it, and so does a loop that is written by hand.
The loop has the same model, weights, rows, batch size, parameter groups of AdamW, clipping and
schedule. It computes logits at the same labelled positions, and keeps all rows in memory as one
tensor. The two sides take turns, several times. In a turn, the steps after a warm-up are timed,
without evaluation. Wall time is the usual measure. The processor time of this process is reliable
even if other processes share the machine. Ratios are computed within each turn, and their median
over the turns is reported.

    python benchmarks/trainer_throughput.py [--repeats 5] [--steps 60] [--output PATH]
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._report import write
from gramian import parameter_groups
from gramian.tasks import IGNORED
from gramian.training import TrainingConfig, _run, load_config
from gramian.training.collation import Collator

ROOT = Path(__file__).resolve().parent.parent
WARMUP = 10
CASES: dict[str, list[str]] = {
    "mqar_multi_hyena": ["task.train_examples=4096"],
    "digits_rtf": [],
    "delay_rtf": ["task.train_examples=1024"],
    "bytes_multi_hyena": [],
}
Clocks = tuple[float, float]  # wall time and processor time


def clocks() -> Clocks:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def elapsed(began: Clocks) -> Clocks:
    wall, processor = clocks()
    return wall - began[0], processor - began[1]


class Stopwatch(_run.Recorder):
    """A recorder of a run that also reads the clocks, after the warm-up and at the end."""

    began: Clocks
    measured: Clocks

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARMUP:
            Stopwatch.began = clocks()
        elif state.global_step == state.max_steps:
            Stopwatch.measured = elapsed(Stopwatch.began)


def trained(config: TrainingConfig) -> Clocks:
    """Measure the time of the steps after the warm-up in `gramian.training.train`."""
    _run.train(config)
    return Stopwatch.measured


def by_hand(config: TrainingConfig, batches: Callable[[], dict[str, Tensor]]) -> Clocks:
    """Measure the time of the steps after the warm-up in a loop that is written by hand."""
    optimization, description = config.optimization, _run._task(config).description()
    torch.manual_seed(config.seed)
    model = _run._model(config, description).train()
    device = next(iter(batches().values())).device
    model.to(device)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, optimization.learning_rate, optimization.weight_decay),
        betas=(optimization.betas[0], optimization.betas[1]),
        eps=optimization.epsilon,
    )
    steps = optimization.steps
    assert steps is not None
    warm = max(1, round(optimization.warmup * steps))

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))
        return min((step + 1) / warm, cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    logged = torch.zeros((), device=device)
    began = clocks()
    for step in range(1, steps + 1):
        loss = model(**due(batches())).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optimization.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        logged += loss.detach()
        if step % config.logging.every == 0:
            logged.item()
            logged.zero_()
        if step == WARMUP:
            began = clocks()
    return elapsed(began)


def due(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Restrict a batch to the positions with a label, as `gramian train` does."""
    labels = batch.get("shift_labels")
    if labels is None:
        return batch
    wanted = labels != IGNORED
    if 2 * int(wanted.sum()) >= wanted.numel():
        return batch
    return {**batch, "logits_to_keep": wanted, "shift_labels": labels[wanted]}


def sampler(config: TrainingConfig) -> tuple[Callable[[], dict[str, Tensor]], int]:
    """Return a function that draws batches of rows in memory, and a batch's number of tokens."""
    task = _run._task(config)
    rows = task.dataset("train", config.seed)
    whole = Collator(task.description())([rows[index] for index in range(len(rows))])
    device = "cuda" if torch.cuda.is_available() and config.hardware.device != "cpu" else "cpu"
    whole = {name: tensor.to(device) for name, tensor in whole.items()}
    size = config.optimization.batch_size
    order = iter(())

    def batch() -> dict[str, Tensor]:
        nonlocal order
        some = next(order, None)
        if some is None or len(some) < size:
            order = iter(torch.randperm(len(rows), device=device).split(size))
            some = next(order)
        return {name: tensor[some] for name, tensor in whole.items()}

    inputs = whole.get("input_ids", whole.get("input_values"))
    assert inputs is not None
    return batch, size * inputs.shape[1]


def measure(name: str, changes: list[str], steps: int, repeats: int) -> dict[str, Any]:
    common = [f"optimization.steps={WARMUP + steps}", "optimization.epochs=null"]
    common += ["evaluation.every=null", "evaluation.examples=8", "evaluation.samples=0"]
    common += ["checkpoints.every=null", *changes]
    path = ROOT / "recipes" / f"{name}.yaml"
    turns: dict[str, list[Clocks]] = {"gramian train": [], "bare loop": []}
    batches, tokens = sampler(load_config(path, common))
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            config = load_config(path, [*common, f"output={folder}/run"])
            turns["gramian train"].append(trained(config))
        turns["bare loop"].append(by_hand(config, batches))
    result: dict[str, Any] = {"tokens a step": tokens}
    for side, times in turns.items():
        result[side] = {
            "tokens a second": tokens * steps / min(wall for wall, _ in times),
            "wall ms a step": [1000 * wall / steps for wall, _ in times],
            "processor ms a step": [1000 * processor / steps for _, processor in times],
        }
    pairs = list(zip(turns["bare loop"], turns["gramian train"], strict=True))
    for index, clock in enumerate(("wall", "processor")):
        ratios = [bare[index] / ours[index] for bare, ours in pairs]
        result[f"ratio by {clock} time"] = statistics.median(ratios)
    return result


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, default=here / "results" / "trainer_throughput.json")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    _run.Recorder = Stopwatch  # type: ignore[misc]
    results = {}
    for name in arguments.cases:
        result = measure(name, CASES[name], arguments.steps, arguments.repeats)
        results[name] = result
        rates = [result[side]["tokens a second"] for side in ("gramian train", "bare loop")]
        ratios = [result[f"ratio by {clock} time"] for clock in ("wall", "processor")]
        print(
            f"{name}: gramian train {rates[0]:,.0f} tokens/s, bare loop {rates[1]:,.0f} tokens/s; "
            f"ratio {ratios[0]:.3f} (wall), {ratios[1]:.3f} (processor)",
            flush=True,
        )
    write(
        arguments.output,
        {
            "benchmark": "throughput of gramian train against a bare loop",
            "steps": arguments.steps,
            "warm-up steps": WARMUP,
            "repeats": arguments.repeats,
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
