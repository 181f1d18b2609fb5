"""How much faster, and in how much less memory, does a layer of rational filters train?

The benchmark runs forward and backward passes of one convolution layer on the processor in float32,
with inputs (batch, length, channels). It compares `LongConvolution(RTF(…))` with the published
computation (Parnichkun et al. 2024, arXiv 2405.06147), which a few lines of autograd formulate
here. They divide the spectra of the padded coefficients, transform the quotient back, and apply the
kernel by padded FFTs along the length axis. With `--rtf PATH` the published `rtf.py` in that folder
(it needs einops) is measured too. The sides take turns in one process, a few steps in a row. The
fastest step of each side counts, because noise only adds time; the medians are recorded too. Peak
memory is measured in a fresh process for each side. The peak of a process that imports the same
modules and makes the input, but does not run the layer, is subtracted.

    python benchmarks/convolution_layer.py [--rtf PATH] [--output PATH]
"""

import argparse
import importlib.util
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._report import write
from gramian.filters import RTF
from gramian.mixers import LongConvolution

CHANNELS, STATES = 128, 64
SIZES = {1024: 8, 4096: 8, 16384: 2}  # length: batch
STEPS_IN_A_ROW = 3


class PublishedComputation(nn.Module):
    """Rational convolution by whole-tensor FFTs through autograd."""

    def __init__(self, a: Tensor, b: Tensor, d: Tensor, length: int) -> None:
        super().__init__()
        self.a, self.b, self.d = (nn.Parameter(t.detach().clone()) for t in (a, b, d))
        self.length = length

    def forward(self, u: Tensor) -> Tensor:
        batch, length, channels = u.shape
        grid = self.length + self.length % 2
        denominator = nn.functional.pad(self.a, (1, 0), value=1.0)
        numerator = nn.functional.pad(self.b, (1, 0))
        coefficients = torch.cat((denominator, numerator))
        spectra = torch.fft.rfft(
            nn.functional.pad(coefficients, (0, grid - coefficients.shape[-1])), dim=-1
        )
        response = spectra[channels:] / spectra[:channels] + self.d[:, None]
        kernel = torch.fft.irfft(response, n=grid, dim=-1)[:, :length]
        columns = torch.cat((kernel.T, u.permute(1, 0, 2).reshape(length, -1)), dim=1)
        spectra = torch.fft.rfft(columns, n=2 * length, dim=0)
        product = spectra[:, :channels] * spectra[:, channels:].view(-1, batch, channels).movedim(
            1, 0
        )
        return torch.fft.irfft(product, n=2 * length, dim=1)[:, :length]


def published_file(folder: Path) -> type[nn.Module]:
    """Load the class RTF of the published rtf.py."""
    spec = importlib.util.spec_from_file_location("published_rtf", folder / "rtf.py")
    if spec is None or spec.loader is None or not (folder / "rtf.py").exists():
        raise SystemExit(f"--rtf: there is no rtf.py in {folder}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    published: type[nn.Module] = module.RTF
    return published


def layers(length: int, rtf: Path | None) -> dict[str, nn.Module]:
    """Make a layer of each side. All layers compute the same system."""
    torch.manual_seed(0)
    filters = RTF(CHANNELS, STATES, length, initialization="montel")
    a, b, d = filters.a, filters.b, filters.d
    sides: dict[str, nn.Module] = {
        "gramian": LongConvolution(filters),
        "published computation": PublishedComputation(a, b, d, length),
    }
    if rtf is not None:
        layer = published_file(rtf)(CHANNELS, STATES, length)
        with torch.no_grad():
            layer.ab.copy_(torch.cat((a, b)))
            layer.h_0.copy_(d)
        sides["published file"] = layer
    return sides


def data(length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (SIZES[length], length, CHANNELS)
    u = torch.randn(shape, generator=generator).requires_grad_()
    return u, torch.randn(shape, generator=generator)


def step(layer: nn.Module, u: Tensor, g: Tensor) -> None:
    """Run a forward and a backward pass, with gradients of the input and the parameters."""
    layer.zero_grad()
    u.grad = None
    layer(u).backward(g)


def disagreement(sides: dict[str, nn.Module], u: Tensor) -> float:
    """Return the largest difference between two sides' outputs, relative to the largest output."""
    with torch.no_grad():
        outputs = [side(u) for side in sides.values()]
    scale = outputs[0].abs().max()
    return max(float((y - outputs[0]).abs().max() / scale) for y in outputs[1:])


def times(sides: dict[str, nn.Module], u: Tensor, g: Tensor, rounds: int) -> dict[str, list[float]]:
    """Return the sorted milliseconds of all steps. In each round, every side runs a few steps."""
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, layer in sides.items():
            step(layer, u, g)  # the previous side has filled the processor's caches
            for _ in range(STEPS_IN_A_ROW):
                start = time.perf_counter()
                step(layer, u, g)
                taken[side].append(1e3 * (time.perf_counter() - start))
    return {side: sorted(milliseconds) for side, milliseconds in taken.items()}


def peak_memory(length: int, side: str, rtf: Path | None) -> float:
    """Return the peak resident MiB of a fresh process with three steps, or no step for "inputs"."""
    command = [sys.executable, __file__, "--peak", side, "--length", str(length)]
    if rtf is not None:
        command += ["--rtf", str(rtf)]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(process.stdout.splitlines()[-1])


def peak_memories(length: int, rtf: Path | None) -> dict[str, float]:
    """Return the peak memory of every side, minus that of a process without steps."""
    baseline = peak_memory(length, "inputs", rtf)
    sides = ["gramian", "published computation", *(["published file"] if rtf else [])]
    return {side: peak_memory(length, side, rtf) - baseline for side in sides}


def print_peak_memory(length: int, side: str, rtf: Path | None) -> None:
    u, g = data(length)
    if side != "inputs":
        layer = layers(length, rtf)[side]
        for _ in range(3):
            step(layer, u, g)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def geometric_mean(ratios: list[float]) -> float:
    return float(torch.tensor(ratios, dtype=torch.float64).log().mean().exp())


def measure(length: int, memory: dict[str, float], arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one line of the table, and print it."""
    u, g = data(length)
    sides = layers(length, arguments.rtf)
    error = disagreement(sides, u)
    taken = times(sides, u, g, arguments.rounds)
    milliseconds = {side: taken[side][0] for side in sides}
    ours, *others = sides
    speed_up = {side: milliseconds[side] / milliseconds[ours] for side in others}
    memory_ratio = {side: memory[ours] / memory[side] for side in others}
    print(f"length {length}, batch {SIZES[length]}, outputs differ by {error:.1e}")
    for side in sides:
        line = f"  {side:22}{milliseconds[side]:9.1f} ms{memory[side]:9.1f} MiB"
        if side != ours:
            line += f"   gramian is {speed_up[side]:.2f}x faster"
            line += f" in {memory_ratio[side]:.2f}x the memory"
        print(line, flush=True)
    return {
        "length": length,
        "batch": SIZES[length],
        "disagreement": error,
        "milliseconds": milliseconds,
        "median milliseconds": {side: taken[side][len(taken[side]) // 2] for side in sides},
        "peak MiB": memory,
        "speed-up": speed_up,
        "memory ratio": memory_ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / "convolution_layer.json"
    parser.add_argument("--rtf", type=Path, help="folder of the published rtf.py")
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print_peak_memory(arguments.length, arguments.peak, arguments.rtf)
        return

    # Memory is measured first, because a child's ru_maxrss starts from its parent's memory at the
    # time when the child is started.
    memory = {length: peak_memories(length, arguments.rtf) for length in SIZES}
    rows = [measure(length, memory[length], arguments) for length in SIZES]
    summary = {
        side: {
            "speed-up, geometric mean": geometric_mean([row["speed-up"][side] for row in rows]),
            "largest memory ratio": max(row["memory ratio"][side] for row in rows),
        }
        for side in rows[0]["speed-up"]
    }
    for side, figures in summary.items():
        print(
            f"against the {side}: {figures['speed-up, geometric mean']:.2f}x faster (geometric "
            f"mean), at most {figures['largest memory ratio']:.2f}x the memory"
        )
    write(
        arguments.output,
        {
            "benchmark": "convolution layer, forward and backward",
            "channels": CHANNELS,
            "states": STATES,
            "dtype": "float32",
            "layout": "batch, length, channels",
            "sizes": rows,
            "summary": summary,
        },
    )


if __name__ == "__main__":
    main()
