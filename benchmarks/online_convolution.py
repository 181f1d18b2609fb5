"""How much does online convolution save if the output is needed after every sample?

There are 384 streams of 8,192 samples with filters of the same length, processed one sample at a
time on the CPU. Three methods are compared. One is online convolution. The others compute, for each
sample, a dot product of the filter with the past, or an FFT of the whole past. Online convolution
runs over all samples. The others are timed at samples spread evenly over the run, and their mean
time is multiplied by the number of samples. The sides take turns.

`--future-fill FILE` also runs the published `EpochedFutureFill` of SpectraLDS (the file
`flash_stu/utils/future_fill.py` of github.com/dshah02/SpectraLDS), an implementation of FutureFill
(Agarwal et al. 2024, arXiv 2410.03766) that takes O(√(L log L)) operations a sample. Both sides run
over all samples, at several lengths, in turn, without FlashFFTConv, which needs a GPU.

    python benchmarks/online_convolution.py [--future-fill FILE]
"""

import argparse
import statistics
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._published import module_from
from benchmarks._report import write
from gramian import causal_convolution
from gramian.systems import FIR

RESULTS = Path(__file__).parent / "results"
FUTURE_FILL_SIZES = ((16, 1024), (384, 1024), (384, 8192), (16, 65536))  # streams, samples


def now() -> float:
    """Return processor seconds if this process has one thread, otherwise wall-clock seconds.

    Other processes on the machine change the processor time only a little.
    """
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(function) -> float:
    started = now()
    function()
    return now() - started


def stepped(kernel: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Convolve inputs (length, streams) sample by sample: (streams, length)."""
    recurrence = FIR(kernel).recurrence("online")
    state, outputs = recurrence.initial_state((len(kernel),)), []
    for sample in inputs:
        y, state = recurrence.step(sample, state)
        outputs.append(y)
    return torch.stack(outputs, -1)


def against_future_fill(file: Path, rounds: int) -> dict[str, Any]:
    """Time our online convolution and the published FutureFill over whole signals, in turn."""
    sys.modules.setdefault("flashfftconv", types.SimpleNamespace(FlashFFTConv=None))
    published = module_from(file.parent, file.stem)
    results: dict[str, Any] = {}
    for streams, length in FUTURE_FILL_SIZES:
        kernel = torch.randn(streams, length) * torch.logspace(0, -3, length)
        signal = torch.randn(streams, length)
        inputs = signal.T.contiguous()
        exact = causal_convolution(signal.double(), kernel.double())

        def theirs(kernel=kernel, inputs=inputs, streams=streams) -> torch.Tensor:
            layer = published.EpochedFutureFill(kernel, streams, device=torch.device("cpu"))
            return torch.stack([layer.process(sample, kernel) for sample in inputs], -1)

        def ours(kernel=kernel, inputs=inputs) -> torch.Tensor:
            return stepped(kernel, inputs)

        sides = {"online": ours, "FutureFill": theirs}
        errors = {
            name: float((side().double() - exact).norm() / exact.norm())
            for name, side in sides.items()
        }
        if max(errors.values()) > 1e-5:
            raise SystemExit(f"the outputs differ from the convolution by {errors}.")
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                seconds[name].append(timed(side))
        best = {name: min(values) for name, values in seconds.items()}
        ratio = best["FutureFill"] / best["online"]
        print(f"{streams} streams of {length}: FutureFill {ratio:.1f} x online; errors {errors}")
        results[f"{streams} streams of {length}"] = {
            "relative_errors": errors,
            "rounds": seconds,
            "microseconds_per_sample": {name: 1e6 * t / length for name, t in best.items()},
            "ratio": ratio,
        }
    return results


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=384)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=24, help="positions timed on the slow sides")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--future-fill", type=Path, help="the published future_fill.py")
    parser.add_argument("--output", type=Path, default=RESULTS / "online_convolution.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    streams, length = arguments.streams, arguments.length
    kernel = torch.randn(streams, length) * torch.logspace(0, -3, length)
    signal = torch.randn(streams, length)
    backwards = kernel.flip(-1).contiguous()
    inputs = signal.T.contiguous()  # (length, streams); a row has one sample of every stream
    positions = [(2 * i + 1) * length // (2 * arguments.samples) for i in range(arguments.samples)]

    def online() -> torch.Tensor:
        return stepped(kernel, inputs)

    def dot(t: int) -> torch.Tensor:
        return torch.linalg.vecdot(signal[:, : t + 1], backwards[:, length - t - 1 :])

    def dot_by_einsum(t: int) -> torch.Tensor:
        return torch.einsum("ct,ct->c", signal[:, : t + 1], backwards[:, length - t - 1 :])

    def fft(t: int) -> torch.Tensor:
        return causal_convolution(signal[:, : t + 1], kernel[:, : t + 1])[:, -1]

    exact = online()
    whole = causal_convolution(signal, kernel)
    error = float((exact - whole).norm() / whole.norm())
    for t in positions:  # all three sides compute the same output
        torch.testing.assert_close(dot(t), exact[:, t], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(fft(t), exact[:, t], rtol=1e-3, atol=1e-3)
    seconds: dict[str, list[float]] = {"online": [], "dot product": [], "FFT recomputation": []}
    for _ in range(arguments.rounds):
        seconds["online"].append(timed(online))
        sides = (
            ("dot product", (dot, dot_by_einsum)),  # the faster of the two is reported
            ("FFT recomputation", (fft,)),
        )
        for name, ways in sides:
            each = [min(timed(lambda t=t, way=way: way(t)) for way in ways) for t in positions]
            seconds[name].append(statistics.mean(each) * length)
    best = {name: min(values) for name, values in seconds.items()}
    print(f"{streams} streams, {length} samples, {arguments.threads} threads; error {error:.1e}")
    for name, value in best.items():
        ratio = value / best["online"]
        print(f"{name:>18}: {value:9.2f} s{'' if name == 'online' else f'  {ratio:6.1f} x online'}")
    compared = arguments.future_fill
    future_fill = against_future_fill(compared, arguments.rounds) if compared else {}
    write(
        arguments.output,
        {
            "benchmark": "online convolution",
            "streams": streams,
            "length": length,
            "relative_error": error,
            "extrapolated_from_positions": positions,
            "rounds": seconds,
            "seconds": best,
            "ratio_to_online": {name: value / best["online"] for name, value in best.items()},
            "future_fill": future_fill,
        },
    )


if __name__ == "__main__":
    main()
