"""How many filters a second does `gramian.reduce` reduce, and how close is it to pyMOR's ERA?

Speed: 1,024 implicit filters in the published configuration (33 features of time, three hidden
layers of 64 sines at frequency 10, exponential windows), 2,048 taps, order 16, default arguments;
pyMOR's `ERAReductor`, which factors one dense Hankel matrix after the other, on a few of them.

Accuracy: 32 seeded filters at order 16, sixteen as initialised and sixteen from a small Hyena
language model that this script trains for a minute on the text behind Python's `help()`. pyMOR's
`force_stability=True` extends the taps by zeros as `tail="zero"` does; `force_stability=False` uses
taps alone and leaves unstable poles as they come, as `tail="free", stable=False` does. Errors are
‖h - ĥ‖₂ over the taps behind the direct term, which both sides hold exactly.

    python benchmarks/reduction.py [--filters N] [--train-seconds S] [--output PATH]
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._report import write
from gramian import reduce
from gramian.demo.text import python_documentation
from gramian.filters import ImplicitFilter
from gramian.mixers import Hyena

LENGTH, ORDER = 2048, 16
TREATMENTS = {"zero": {"tail": "zero"}, "free": {"tail": "free", "stable": False}}


@torch.no_grad()
def untrained(count: int, seed: int) -> Tensor:
    """Kernels (count, LENGTH) of an implicit filter as initialised, float32."""
    torch.manual_seed(seed)
    return ImplicitFilter(count, LENGTH)().kernel


def trained(count: int, seconds: float) -> tuple[Tensor, dict[str, float]]:
    """Kernels (count, LENGTH) of a one-layer Hyena after some training, and its loss in bits."""
    torch.manual_seed(1)
    corpus = python_documentation()
    embedding = nn.Embedding(256, count)
    mixer = Hyena(count, filter={"type": "implicit"}, max_length=LENGTH)
    head = nn.Sequential(nn.LayerNorm(count), nn.Linear(count, 256))
    model = nn.ModuleList([embedding, mixer, head])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before, losses = mixer.filter().kernel.detach().clone(), []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(losses) < 2:
        begin = torch.randint(len(corpus.train) - LENGTH, (4,)).tolist()
        tokens = torch.stack([corpus.train[i : i + LENGTH + 1] for i in begin]).long()
        hidden = embedding(tokens[:, :-1])
        logits = head(hidden + mixer(hidden))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / math.log(2))
    kernel = mixer.filter().kernel.detach()
    return kernel, {
        "steps": len(losses),
        "first_bits_per_byte": losses[0],
        "last_bits_per_byte": statistics.fmean(losses[-10:]),
        "change_of_kernels": ((kernel - before).norm() / before.norm()).item(),
    }


def pymor_error(taps: np.ndarray, force_stability: bool) -> tuple[float, float]:
    """‖h - ĥ‖₂ of pyMOR's reduction over h_1 … h_{L-1}, and the seconds that it took."""
    from pymor.core.logger import set_log_levels
    from pymor.reductors.era import ERAReductor

    set_log_levels({"pymor": "ERROR"})
    start = time.perf_counter()
    reductor = ERAReductor(taps, sampling_time=1.0, force_stability=force_stability)
    model = reductor.reduce(r=ORDER)
    seconds = time.perf_counter() - start
    A, B, C = model.A.matrix, model.B.matrix, model.C.matrix
    state, outputs = B[:, 0], []
    for _ in taps:
        outputs.append(C[0] @ state)
        state = A @ state
    return float(np.linalg.norm(taps - np.array(outputs))), seconds


def throughput(count: int, repeats: int) -> dict[str, Any]:
    """The fastest of some runs over `count` filters: noise only ever adds time."""
    kernel = untrained(count, seed=0)
    reduce(kernel[:64], ORDER)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        reduction = reduce(kernel, ORDER)
        seconds.append(time.perf_counter() - start)
        print(f"  {count} filters in {seconds[-1]:.2f} s: {count / seconds[-1]:.0f} a second")
    return {
        "filters": count,
        "seconds": seconds,
        "filters_per_second": count / min(seconds),
        "mean_relative_error": reduction.relative_error.mean().item(),
    }


def accuracy(kernels: dict[str, Tensor]) -> dict[str, Any]:
    """Errors of both sides for every filter and both treatments of the tail."""
    results: dict[str, Any] = {}
    pymor_seconds = []
    for treatment, arguments in TREATMENTS.items():
        for origin, kernel in kernels.items():
            double = kernel.double()
            reduction = reduce(double, ORDER, **arguments)
            ours = (reduction.system.impulse_response(LENGTH) - double)[:, 1:].norm(dim=-1)
            theirs = []
            for channel in double:
                error, seconds = pymor_error(channel[1:].numpy(), treatment == "zero")
                theirs.append(error)
                pymor_seconds.append(seconds)
            ratio = ours / torch.tensor(theirs, dtype=torch.float64)
            norm = double[:, 1:].norm(dim=-1)
            results[f"{treatment}, {origin}"] = {
                "relative_errors": (ours / norm).tolist(),
                "pymor_relative_errors": (torch.tensor(theirs) / norm).tolist(),
                "largest_ratio": ratio.max().item(),
                "mean_ratio": ratio.log().mean().exp().item(),
            }
            print(
                f"  tail {treatment}, {origin}: error {(ours / norm).mean():.4f}, at most "
                f"{ratio.max():.4f} of pyMOR's, {ratio.log().mean().exp():.4f} on average"
            )
    results["pymor_seconds_a_filter"] = statistics.median(pymor_seconds)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--filters", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--train-seconds", type=float, default=60.0)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "reduction.json"
    )
    options = parser.parse_args()

    print(f"Speed: {LENGTH} taps, order {ORDER}, {torch.get_num_threads()} threads")
    speed = throughput(options.filters, options.repeats)
    print(f"Training a Hyena for {options.train_seconds:.0f} s")
    learnt, training = trained(16, options.train_seconds)
    print(
        f"  {training['steps']} steps, {training['first_bits_per_byte']:.2f} to "
        f"{training['last_bits_per_byte']:.2f} bits a byte"
    )
    print("Accuracy: 32 filters")
    errors = accuracy({"untrained": untrained(16, seed=2), "trained": learnt})
    once = 1 / errors["pymor_seconds_a_filter"]
    rate = speed["filters_per_second"]
    print(f"Both: {rate:.0f} filters a second, pyMOR {once:.2f}: {rate / once:.0f} times faster")
    write(
        options.output,
        {
            "length": LENGTH,
            "order": ORDER,
            "speed": {**speed, "pymor_filters_per_second": once, "ratio": rate / once},
            "training": training,
            "accuracy": errors,
        },
    )


if __name__ == "__main__":
    main()
