"""How much does online convolution save if the output is needed after every sample?

There are 384 streams of 8,192 samples with filters of the same length, processed one sample at a
time on the CPU. Three methods are compared. One is online convolution. The others compute, for each
sample, a dot product of the filter with the past, or an FFT of the whole past. Online convolution
runs over all samples. The others are timed at samples spread evenly over the run, and their mean
time is multiplied by the number of samples. The sides take turns.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._report import write
from gramian import causal_convolution
from gramian.systems import FIR

RESULTS = Path(__file__).parent / "results"


def now() -> float:
    """Return processor seconds if this process has one thread, otherwise wall-clock seconds.

    Other processes on the machine change the processor time only a little.
    """
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(function) -> float:
    started = now()
    function()
    return now() - started


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=384)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=24, help="positions timed on the slow sides")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "online_convolution.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    streams, length = arguments.streams, arguments.length
    kernel = torch.randn(streams, length) * torch.logspace(0, -3, length)
    signal = torch.randn(streams, length)
    recurrence = FIR(kernel).recurrence()
    backwards = kernel.flip(-1).contiguous()
    inputs = signal.T.contiguous()  # (length, streams); a row has one sample of every stream
    positions = [(2 * i + 1) * length // (2 * arguments.samples) for i in range(arguments.samples)]

    def online() -> torch.Tensor:
        state, outputs = recurrence.initial_state((streams,)), []
        for sample in inputs:
            y, state = recurrence.step(sample, state)
            outputs.append(y)
        return torch.stack(outputs, -1)

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
        },
    )


if __name__ == "__main__":
    main()
