"""Do the filters learn Delay, Copying and sequential digits, at equal state, with three seeds?

- Delay is the task `delay` of `gramian.tasks`. The input is white noise of length 1,024, limited to
  a tenth of its band, and the target is the input 256 steps earlier. The model has one long
  convolution between two linear maps (a `GramianForSignalRegression`). The figure is the root mean
  square error on fresh sequences, relative to the root mean square of the target.
- Copying has 8 tokens of an alphabet of 8, then 112 blanks, then 8 marks. The labels of the marks
  are the 8 tokens. The model has two residual blocks. The figure is the share of right tokens on
  fresh sequences (1/8 by chance).
- Digits are scikit-learn's 8 × 8 digits as sequences of 64 grey values, 1,437 for training and 360
  for testing. The model has two residual blocks and mean pooling. The figure is the accuracy on the
  test set.

The layers are RTF with each `stability`, S4D and S4. RTF with `schur` starts either from zeros, as
an FIR filter, or from random reflection coefficients, which give it poles at the start. All have
the same state size, width, steps, batches and learning rates (AdamW with a cosine schedule, and
what the filters request through `parameter_groups`). Each training is short. So the results show
which parametrisations train without tuning, and not the best that each can reach. All results are
written.

    python benchmarks/training.py [--seeds 3] [--output PATH] [--table PATH]
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._report import write
from gramian import parameter_groups, tasks
from gramian.mixers import Block
from gramian.models import GramianConfig, GramianForSignalRegression

STATE = 64
LAYERS = {
    "RTF, none": {"type": "rtf", "stability": "none", "initialization": "zeros"},
    "RTF, montel": {"type": "rtf", "stability": "montel", "initialization": "montel"},
    "RTF, schur": {"type": "rtf", "stability": "schur", "initialization": "zeros"},
    "RTF, schur, drawn": {"type": "rtf", "stability": "schur", "initialization": "schur"},
    "S4D": {"type": "s4d"},
    "S4": {"type": "s4"},
}


def copying_batch(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw token ids (count, 128) and the labels of the last 8 positions (count, 8)."""
    tokens = torch.randint(8, (count, 8), generator=generator)
    blanks = torch.full((count, 112), 8)
    return torch.cat([tokens, blanks, torch.full((count, 8), 9)], dim=1), tokens


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return sequences (n, 64, 1) and labels for training, and the same for testing."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(data.images).float().reshape(-1, 64, 1)[order] / 8 - 1
    y = torch.from_numpy(data.target)[order]
    return x[:1437], y[:1437], x[1437:], y[1437:]


class Pooled(nn.Module):
    """A head that returns the mean over time."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Last(nn.Module):
    """A head that returns the last eight positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -8:]


class Signals(nn.Module):
    """A model of signals that maps a tensor to a tensor."""

    def __init__(self, model: GramianForSignalRegression) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(input_values=x).logits


def blocks(filter: dict[str, Any], width: int, length: int, first: nn.Module, *last: nn.Module):
    """Make two residual blocks with long convolutions."""
    config = {**filter, "state_size": STATE}
    return nn.Sequential(first, *(Block(width, config, length) for _ in range(2)), *last)


def train(
    model: nn.Module,
    batches: Callable[[int], tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    lr: float,
) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=lr, weight_decay=0.01))
    warm = max(1, steps // 20)

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))
        return min((step + 1) / warm, cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(steps):
        x, y = batches(step)
        loss = loss_of(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def delay(filter: dict[str, Any], seed: int, steps: int) -> float:
    task = tasks.build("delay", train_examples=16 * steps, length=1024, lag=256, frequency=200.0)
    rows = {split: task.rows(split, seed) for split in ("train", "validation")}
    model = GramianForSignalRegression(
        GramianConfig(
            input_size=1,
            num_labels=1,
            hidden_size=8,
            num_hidden_layers=1,
            mixers="long_convolution",
            filter={**filter, "state_size": STATE},
            max_position_embeddings=1024,
            block="mixer",
            initializer_range=0.3,
        )
    )

    def batch(split: str, count: int) -> tuple[Tensor, Tensor]:
        """Draw inputs and targets, both (count, 1024, 1)."""
        some = list(islice(rows[split], count))
        x, y = (np.stack([row[name] for row in some]) for name in ("input_values", "labels"))
        return torch.from_numpy(x), torch.from_numpy(y)

    signals = Signals(model)
    train(signals, lambda _: batch("train", 16), nn.functional.mse_loss, steps, 5e-3)
    with torch.no_grad():
        x, y = batch("validation", 64)
        error = signals(x) - y
        return float((error.square().mean() / y.square().mean()).sqrt())


def copying(filter: dict[str, Any], seed: int, steps: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    model = blocks(filter, 64, 128, nn.Embedding(10, 64), Last(), nn.Linear(64, 8))

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    train(model, lambda _: copying_batch(64, generator), loss, steps, 3e-3)
    model.eval()
    with torch.no_grad():
        x, y = copying_batch(512, generator)
        return float((model(x).argmax(-1) == y).double().mean())


def sequential_digits(filter: dict[str, Any], seed: int, steps: int) -> float:
    x, y, test_x, test_y = digits()
    generator = torch.Generator().manual_seed(seed)
    # A filter of 64 states needs more than 64 taps; sequences are the 64 grey values.
    model = blocks(filter, 64, 128, nn.Linear(1, 64), Pooled(), nn.Linear(64, 10))

    def batch(_: int) -> tuple[Tensor, Tensor]:
        some = torch.randint(len(x), (64,), generator=generator)
        return x[some], y[some]

    train(model, batch, nn.functional.cross_entropy, steps, 3e-3)
    model.eval()
    with torch.no_grad():
        return float((model(test_x).argmax(-1) == test_y).double().mean())


TASKS: dict[str, tuple[Callable[[dict[str, Any], int, int], float], int, str]] = {
    "Delay": (delay, 1200, "relative RMS error, lower is better"),
    "Copying": (copying, 300, "right tokens, higher is better"),
    "Digits": (sequential_digits, 400, "test accuracy, higher is better"),
}


def table(results: dict[str, dict[str, list[float]]], seeds: int, minutes: float) -> str:
    lines = [
        "# Training at equal state",
        "",
        f"This table was made by `python benchmarks/training.py` in {minutes:.0f} minutes on a "
        f"processor ({torch.get_num_threads()} thread). Every layer has state {STATE} and {seeds} "
        "seeds. Values are means over the seeds, with the smallest and the largest value in "
        "brackets. The docstring of the script describes the tasks, and says what these short "
        "runs do not show.",
        "",
        "| layer | " + " | ".join(f"{task} ({TASKS[task][2]})" for task in results) + " |",
        "|---" * (len(results) + 1) + "|",
    ]
    for layer in LAYERS:
        cells = []
        for values in (results[task][layer] for task in results):
            mean = sum(values) / len(values)
            cells.append(f"{mean:.3f} ({min(values):.3f} … {max(values):.3f})")
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the number of steps")
    parser.add_argument("--output", type=Path, default=here / "results" / "training.json")
    parser.add_argument(
        "--table", type=Path, default=here.parent / "docs" / "results" / "training.md"
    )
    arguments = parser.parse_args()
    began = time.perf_counter()
    results: dict[str, dict[str, list[float]]] = {}
    seconds: dict[str, dict[str, float]] = {}
    for task, (run, steps, meaning) in TASKS.items():
        results[task], seconds[task] = {}, {}
        print(f"{task}: {meaning}")
        for layer, config in LAYERS.items():
            start = time.perf_counter()
            values = []
            for seed in range(arguments.seeds):
                torch.manual_seed(seed)
                values.append(run(config, seed, max(1, round(steps * arguments.scale))))
            results[task][layer] = values
            seconds[task][layer] = (time.perf_counter() - start) / arguments.seeds
            listed = ", ".join(f"{value:.3f}" for value in values)
            print(f"  {layer:12} {listed}   {seconds[task][layer]:.0f} s a run", flush=True)
    minutes = (time.perf_counter() - began) / 60
    print(f"{minutes:.1f} minutes")
    arguments.table.parent.mkdir(parents=True, exist_ok=True)
    arguments.table.write_text(table(results, arguments.seeds, minutes), encoding="utf-8")
    print(f"wrote {arguments.table}")
    write(
        arguments.output,
        {
            "benchmark": "training at equal state",
            "state": STATE,
            "seeds": arguments.seeds,
            "steps": {task: round(TASKS[task][1] * arguments.scale) for task in results},
            "results": results,
            "seconds a run": seconds,
            "minutes": minutes,
        },
    )


if __name__ == "__main__":
    main()
