"""What do other processes on the same processors cost?

Every operation that several threads share waits for the last of them, which may have lost its
processor to another process. Each case is measured

quiet        while nothing else runs,
busy         while one other process computes for every two processors,
twice        with twice as many threads as processors.

A case is a training step of a convolution layer (128 channels, at 1,024 and 4,096 inputs, batch 8),
a training step of the model of `gramian demo`, the decoding of 20 tokens, the reduction of 256
filters, or the measurement of an attention layer (9 heads, 512 tokens). The sides are

adaptive         in `gramian.ops.adaptive_threads`, with at most a thread for every processor,
default          with a thread for every processor,
one thread       with one thread,
published        the published computation of the convolution layer (layers only), with a thread for
                 every processor.

Each measurement is made in a process of its own: a second to warm up, and 20 steps that count, or
at least 5 in 8 seconds. The medians and the slowest are recorded. Required of "adaptive": beside a
busy process at most 1.5 times the median of one quiet thread, never behind the published
computation, and the slowest at most 3 times the median; quiet not slower than "default".

    python benchmarks/contention.py [--cases NAME …] [--conditions NAME …] [--output PATH]

Cases and conditions that are not named keep their results from an earlier run.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CASES = ("layer 1024", "layer 4096", "demo step", "decode", "reduce", "analyze")
CONDITIONS = ("quiet", "busy", "twice")
SIDES = ("adaptive", "default", "one thread", "published")
STEPS = 20
LIMIT = 8.0
WARM_UP = 1.0

Step = Callable[[], Any]


def layer(length: int, side: str) -> Step:
    from benchmarks.convolution_layer import data, layers, step

    name = "published computation" if side == "published" else "gramian"
    module = layers(length, None)[name]
    u, g = data(length)
    return lambda: step(module, u, g)


def demo_step() -> Step:
    import torch

    from gramian.demo.training import TrainingSettings, train
    from gramian.models import GramianConfig, GramianForCausalLM

    torch.manual_seed(0)
    settings = TrainingSettings(steps=1)
    model = GramianForCausalLM(GramianConfig(max_position_embeddings=settings.length))
    text = torch.randint(256, (100_000,), dtype=torch.uint8)
    return lambda: train(model, text, settings)


def decode() -> Step:
    import torch

    from gramian.models import GramianConfig, GramianForCausalLM

    torch.manual_seed(0)
    model = GramianForCausalLM(GramianConfig(hidden_size=256, num_hidden_layers=6)).eval()
    prompt = torch.randint(256, (1, 32))
    return lambda: model.generate(prompt, min_new_tokens=20, max_new_tokens=20, do_sample=False)


def reduction() -> Step:
    import torch

    import gramian

    torch.manual_seed(0)
    decay = torch.exp(-torch.arange(512) / torch.linspace(20, 200, 256).unsqueeze(-1))
    kernels = torch.randn(256, 512) * decay
    return lambda: gramian.reduce(kernels, order=16)


def analysis() -> Step:
    import torch

    import gramian

    torch.manual_seed(0)
    scores = torch.randn(9, 512, 512)
    mask = torch.ones(512, 512, dtype=torch.bool).triu(1)
    maps = scores.masked_fill(mask, -torch.inf).softmax(-1)
    return lambda: gramian.effective_state_size(maps, range(16, 512, 16))


def prepare(case: str, side: str) -> Step:
    if case.startswith("layer"):
        return layer(int(case.split()[1]), side)
    return {"demo step": demo_step, "decode": decode, "reduce": reduction, "analyze": analysis}[
        case
    ]()


def measure(case: str, side: str, threads: int) -> dict[str, Any]:
    """Measure in this process: milliseconds of the median and of the slowest step."""
    import torch

    from gramian.ops import adaptive_threads

    torch.set_num_threads(threads)
    step = prepare(case, side)
    taken: list[float] = []
    with adaptive_threads() if side == "adaptive" else nullcontext():
        begin = time.perf_counter()
        while time.perf_counter() - begin < WARM_UP:
            step()
        begin = time.perf_counter()
        while len(taken) < STEPS and (len(taken) < 5 or time.perf_counter() - begin < LIMIT):
            start = time.perf_counter()
            step()
            taken.append(1e3 * (time.perf_counter() - start))
    return {"median": statistics.median(taken), "slowest": max(taken), "steps": len(taken)}


def _compute() -> None:
    total = 0
    while True:
        total = (total * 31 + 1) % 1_000_003


@contextmanager
def others(count: int) -> Iterator[None]:
    """Run other processes that compute."""
    running = [multiprocessing.Process(target=_compute, daemon=True) for _ in range(count)]
    for process in running:
        process.start()
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.join()


def in_child(case: str, side: str, condition: str) -> dict[str, Any]:
    processors = os.cpu_count() or 1
    threads = 1 if side == "one thread" else processors * (2 if condition == "twice" else 1)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, __file__, "--child", case, side, str(threads)]
    with others(max(1, processors // 2) if condition == "busy" else 0):
        process = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        )
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return found


def summarize(found: dict[str, Any]) -> dict[str, Any]:
    """Compare the sides as the requirement says."""
    summary: dict[str, Any] = {}
    for case, conditions in found.items():
        if not {"quiet", "busy"} <= conditions.keys():
            continue
        quiet, busy = conditions["quiet"], conditions["busy"]
        own = busy["adaptive"]
        ratios = {
            "busy over one quiet thread": own["median"] / quiet["one thread"]["median"],
            "slowest over median": own["slowest"] / own["median"],
            "default over adaptive, busy": busy["default"]["median"] / own["median"],
            "adaptive over default, quiet": quiet["adaptive"]["median"]
            / quiet["default"]["median"],
        }
        if "published" in busy:
            ratios["published over adaptive, busy"] = busy["published"]["median"] / own["median"]
        summary[case] = ratios | {
            "passed": ratios["busy over one quiet thread"] <= 1.5
            and ratios["slowest over median"] <= 3
            and ratios.get("published over adaptive, busy", 1.0) >= 1
        }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/contention.json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        case, side, threads = arguments.child
        print(json.dumps(measure(case, side, int(threads))))
        return
    load_before = os.getloadavg()[0]
    found: dict[str, Any] = {}
    if arguments.output.exists():
        found = json.loads(arguments.output.read_text(encoding="utf-8"))["cases"]
    for case in arguments.cases:
        sides = SIDES if case.startswith("layer") else SIDES[:-1]
        for condition in arguments.conditions:
            for side in sides:
                result = in_child(case, side, condition)
                found.setdefault(case, {}).setdefault(condition, {})[side] = result
                shown = f"median {result['median']:8.1f} ms, slowest {result['slowest']:8.1f} ms"
                print(f"{case:12} {condition:6} {side:12} {shown}", flush=True)
    results = {
        "load_before": load_before,
        "cases": found,
        "summary": summarize(found),
    }
    print(json.dumps(results["summary"], indent=2))
    from benchmarks._report import write

    write(arguments.output, results)


if __name__ == "__main__":
    main()
