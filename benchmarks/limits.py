"""How far are the hot paths from what they cannot do without?

Each part compares a call of the library with its floor: the part of the same work that cannot be
avoided, done with the same library in the same process. The sides take turns, and their least times
are compared. Times are processor time with one thread (the default), and wall time with several.

convolution  compares the forward and backward pass of `causal_convolution` (4 sequences of 256
             channels) with its transforms alone: 5 for every row and 4 for every kernel, with the
             same length, in the same blocks of rows, and from buffers that are in cache.
             (Wanted: at most 1.5 at 4,096, and 2 at 1,024 and 16,384.)
decoding     compares a compiled step of models of 12 layers and width 512 with the time to read
             each weight and each state once, at the measured rate of reading, and to multiply by
             the weights, at the measured rate of matrix products of these shapes. The larger of
             both times is the floor. The rates are those of one matrix of 512 × 2,048 after another
             from a pool that does not fit into cache. (Wanted: at most 1.3 at batch 1, and 2 for
             MultiHyena at batch 64.)
ess          compares `effective_state_size` of a causal matrix of 1,024 steps at 64 positions with
             the eigenvalues alone of the Gram matrices of its blocks, by LAPACK.
reduction    compares `reduce` on 256 filters of 4,096 taps, to order 16, with the time that it
             spends in transforms, as PyTorch's profiler counts it.

    python benchmarks/limits.py [--parts convolution decoding …] [--quick] [--threads N]
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._report import write
from benchmarks.decoding import gramian_model, now, recurrent_step, take_turns
from gramian import effective_state_size, reduce
from gramian.ops import causal_convolution
from gramian.ops.convolution import _CPU_BLOCK, _CPU_MIN_ROWS
from gramian.ops.lengths import fft_length

RESULTS = Path(__file__).parent / "results"
BATCH, CHANNELS = 4, 256
CASES = (("hyena", 1, 1.3), ("multi_hyena", 1, 1.3), ("multi_hyena", 64, 2.0))
WANTED = {1024: 2.0, 4096: 1.5, 16_384: 2.0}


def convolution(quick: bool) -> dict[str, Any]:
    results = {}
    for length, wanted in WANTED.items():
        u = torch.randn(BATCH, CHANNELS, length, requires_grad=True)
        h = torch.randn(CHANNELS, length, requires_grad=True)
        g = torch.randn(BATCH, CHANNELS, length)

        def step(u: Tensor = u, h: Tensor = h, g: Tensor = g) -> None:
            torch.autograd.grad(causal_convolution(u, h), (u, h), g)

        sides = {"step": step, "transforms": transforms(length)}
        least = take_turns(sides, 3 if quick else 15)
        ratio = least["step"] / least["transforms"]
        results[str(length)] = least | {"ratio": ratio, "wanted": wanted}
        print(f"convolution, {length:,} steps: {ratio:.2f} times its transforms")
    return results


def transforms(length: int) -> Callable[[], None]:
    """Return a function that runs the transforms of a forward and a backward pass."""
    points = fft_length(length, length)
    size = max(_CPU_MIN_ROWS, _CPU_BLOCK // points)
    buffer = torch.randn(size, points)
    spectrum = torch.fft.rfft(buffer)
    # Forward: input, kernel, and back. Backward: gradient, input, kernel, and back twice.
    there, back = 3 * BATCH * CHANNELS + 2 * CHANNELS, 2 * BATCH * CHANNELS + CHANNELS

    def run() -> None:
        for rows in blocks(there, size):
            torch.fft.rfft(buffer[:rows], out=spectrum[:rows])
        for rows in blocks(back, size):
            torch.fft.irfft(spectrum[:rows], n=points, out=buffer[:rows])

    return run


def blocks(count: int, size: int) -> Iterator[int]:
    while count > 0:
        yield min(count, size)
        count -= size


@torch.no_grad()
def decoding(quick: bool) -> dict[str, Any]:
    results = {}
    for mixer, batch, wanted in (
        ("hyena", 1, 1.3),
        ("multi_hyena", 1, 1.3),
        ("multi_hyena", 64, 2),
    ):
        model = gramian_model(mixer)
        model.compile_decoding()
        step, state = recurrent_step(model, batch)
        weights = sum(p.numel() for p in model.parameters())
        rounds = 5 if quick else 40
        seconds = take_turns({"step": step}, rounds)["step"]
        each = rate_of_products(batch, rounds)
        read = (4 * weights + 2 * state) / rate_of_products(1, rounds)["bytes"]
        multiply = 2 * batch * weights / each["operations"]
        floor = max(read, multiply)
        results[f"{mixer}, batch {batch}"] = {
            "step": seconds,
            "floor": floor,
            "reading": read,
            "multiplying": multiply,
            "weights": weights,
            "state_bytes": state,
            "ratio": seconds / floor,
            "wanted": wanted,
        }
        print(f"{mixer}, batch {batch}: {seconds / floor:.2f} times its floor")
    return results


def rate_of_products(batch: int, rounds: int) -> dict[str, float]:
    """Measure bytes of weights read, and operations, a second, in products of matrices."""
    pool = torch.randn(96, 2048, 512)  # 400 MB
    x = torch.randn(batch, 512)

    def products() -> None:
        for weight in pool:
            torch.nn.functional.linear(x, weight)

    seconds = take_turns({"products": products}, max(3, rounds // 4))["products"]
    return {
        "bytes": 4 * pool.numel() / seconds,
        "operations": 2 * batch * pool.numel() / seconds,
    }


@torch.no_grad()
def ess(quick: bool) -> dict[str, Any]:
    length, count = (256, 16) if quick else (1024, 64)
    scores = torch.randn(length, length, dtype=torch.float64)
    matrix = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)
    positions = [(2 * k + 1) * length // (2 * count) for k in range(count)]
    grams = []
    for i in positions:
        block = matrix[i:, :i]
        grams.append(block.mT @ block if i <= length - i else block @ block.mT)
    sides = {
        "call": lambda: effective_state_size(matrix, positions),
        "eigenvalues": lambda: [torch.linalg.eigvalsh(gram) for gram in grams],
    }
    least = take_turns(sides, 2 if quick else 5)
    ratio = least["call"] / least["eigenvalues"]
    print(f"effective_state_size: {ratio:.2f} times the eigenvalues of its blocks")
    return least | {"ratio": ratio, "length": length, "positions": count}


def reduction(quick: bool) -> dict[str, Any]:
    count, taps = (16, 512) if quick else (256, 4096)
    torch.manual_seed(0)
    lag = torch.arange(taps)
    rates = torch.logspace(-3, -1, 24)
    decays = torch.exp(-rates[:, None] * lag) * torch.cos(torch.rand(24, 1) * 3 * lag)
    kernels = torch.randn(count, 24) @ decays
    reduce(kernels[:2], 16)
    started = now()
    reduce(kernels, 16)
    seconds = now() - started
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        reduce(kernels, 16)
    spent = sum(
        event.self_cpu_time_total for event in profile.key_averages() if "_fft_" in event.key
    )
    everything = sum(event.self_cpu_time_total for event in profile.key_averages())
    ratio = everything / spent
    print(f"reduce: {ratio:.2f} times its transforms")
    return {
        "filters": count,
        "taps": taps,
        "seconds": seconds,
        "profiled_transforms": spent / 1e6,
        "profiled": everything / 1e6,
        "ratio": ratio,
    }


PARTS = {
    "convolution": convolution,
    "decoding": decoding,
    "ess": ess,
    "reduction": reduction,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="small sizes; nothing is written")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "limits.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {name: PARTS[name](arguments.quick) for name in arguments.parts}
    if not arguments.quick:
        write(arguments.output, results)


if __name__ == "__main__":
    main()
