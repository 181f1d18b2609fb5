"""How much does online convolution save if the output is needed after every sample?

There are 384 streams of 8,192 samples with filters of the same length, processed one sample at a
time on the CPU. Three methods are compared. One is online convolution. The others compute, for each
sample, a dot product of the filter with the past, or an FFT of the whole past. Online convolution
runs over all samples. The others are timed at samples spread evenly over the run, and their mean
time is multiplied by the number of samples. The sides take turns.

`--future-fill FILE` also runs the published `EpochedFutureFill` of SpectraLDS (the file
`flash_stu/utils/future_fill.py` of github.com/dshah02/SpectraLDS), an implementation of FutureFill
(Agarwal et al. 2024, arXiv 2410.03766) that takes O(√(L log L)) operations a sample. Both sides run
over all samples, at several lengths, in turn, without FlashFFTConv, which needs a GPU. Dot products
with the whole past are timed beside them, as above. The bytes are those of taps, transforms and
states. For the shortest signals, both sides also read the first half at once.

    python benchmarks/online_convolution.py [--future-fill FILE]
"""

import argparse
import contextlib
import functools
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._published import module_from
from benchmarks._report import write
from gramian import causal_convolution
from gramian.systems import FIR

RESULTS = Path(__file__).parent / "results"
FUTURE_FILL_SIZES = (  # batch, channels, samples
    (1, 16, 1024),
    (1, 384, 1024),
    (8, 384, 1024),
    (1, 384, 8192),
    (1, 16, 16384),
)
_LONGEST_READ = 1024  # FutureFill reads a chunk in O(L²) operations


def now() -> float:
    """Return processor seconds if this process has one thread, otherwise wall-clock seconds.

    Other processes on the machine change the processor time only a little.
    """
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(function) -> float:
    started = now()
    function()
    return now() - started


def stepped(kernel: Tensor, inputs: Tensor) -> tuple[Tensor, int]:
    """Convolve inputs (length, *streams) sample by sample: (*streams, length).

    The second result is the number of bytes of taps, transforms and state.
    """
    recurrence = FIR(kernel).recurrence("online")
    state, outputs = recurrence.initial_state(inputs.shape[1:]), []
    for sample in inputs:
        y, state = recurrence.step(sample, state)
        outputs.append(y)
    online = recurrence._online
    held = [online.kernel, online._reversed, *online._spectra.values()]
    return torch.stack(outputs, -1), sum(tensor.nbytes for tensor in held) + state.nbytes


def dot_product(past: Tensor, backwards: Tensor) -> Tensor:
    """Return the last output of the past (…, t) and of reversed taps (…, L)."""
    return torch.linalg.vecdot(past, backwards[..., backwards.shape[-1] - past.shape[-1] :])


def in_turns(timers: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every side in every round. In a round, all sides take their turn."""
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name].append(timer())
    return seconds


def spread(count: int, length: int) -> list[int]:
    """Return `count` positions, spread evenly over `length` samples."""
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]


def against_future_fill(file: Path, rounds: int, positions: int) -> dict[str, Any]:
    """Time our online convolution and the published FutureFill over whole signals, in turn."""
    sys.modules.setdefault("flashfftconv", types.SimpleNamespace(FlashFFTConv=None))
    layer = module_from(file.parent, file.stem).EpochedFutureFill
    results: dict[str, Any] = {}
    for size in FUTURE_FILL_SIZES:
        case = "{} x {} streams of {}".format(*size)
        results[case] = found = compared(layer, *size, rounds, positions)
        ratios = f"{found['ratio']:.1f}, dot product {found['ratio_of_dot_product']:.1f} x online"
        print(f"{case}: FutureFill {ratios}; errors {found['relative_errors']}", flush=True)
    return results


def compared(
    future_fill: Any, batch: int, channels: int, length: int, rounds: int, positions: int
) -> dict[str, Any]:
    """Compare the sides on signals of one size: errors, seconds and bytes."""
    kernel = torch.randn(channels, length) * torch.logspace(0, -3, length)
    signal = torch.randn(batch, channels, length)
    inputs = signal.movedim(-1, 0).contiguous()  # (length, batch, channels)
    rows = kernel.repeat(batch, 1)  # FutureFill has a filter for every row
    backwards = kernel.flip(-1).contiguous()
    exact = causal_convolution(signal.double(), kernel.double())
    first = signal[..., : length // 2]

    def make_theirs() -> Any:
        return future_fill(rows, len(rows), device=torch.device("cpu"))

    def theirs() -> tuple[Tensor, int]:
        layer = make_theirs()
        outputs = [layer.process(sample, rows) for sample in inputs.flatten(1)]
        held = (layer.filter, layer.cache, layer.buffer)
        whole = torch.stack(outputs, -1).reshape(signal.shape)
        return whole, sum(tensor.nbytes for tensor in held)

    def read_theirs() -> Tensor:
        with contextlib.redirect_stdout(None):  # it prints a warning
            return make_theirs().prefill(first.flatten(0, 1), first.shape[-1]).reshape(first.shape)

    def read_ours() -> Tensor:
        recurrence = FIR(kernel).recurrence("online")
        return recurrence.prefill(first, recurrence.initial_state(first.shape[:-1]))[0]

    def dot(t: int) -> Tensor:
        return dot_product(signal[..., : t + 1], backwards)

    def error(found: Tensor) -> float:
        expected = exact[..., : found.shape[-1]]
        return float((found.double() - expected).norm() / expected.norm())

    sides = {"online": lambda: stepped(kernel, inputs), "FutureFill": theirs}
    readers = {"online": read_ours, "FutureFill": read_theirs}
    if length > _LONGEST_READ or len(rows) > length:  # it keeps as many rows as there are samples
        readers = {}
    errors, held = {}, {"dot product": kernel.nbytes + signal.nbytes}
    for name, side in sides.items():
        outputs, held[name] = side()
        errors[name] = error(outputs)
    errors |= {f"{name}, first half": error(read()) for name, read in readers.items()}
    if max(errors.values()) > 1e-5:
        raise SystemExit(f"the outputs differ from the convolution by {errors}.")
    at = spread(positions, length)
    for t in at:
        torch.testing.assert_close(dot(t), exact[..., t].float(), rtol=1e-3, atol=1e-3)

    def extrapolated() -> float:
        return statistics.mean(timed(functools.partial(dot, t)) for t in at) * length

    timers = {name: functools.partial(timed, side) for name, side in sides.items()}
    seconds = in_turns(timers | {"dot product": extrapolated}, rounds)
    reading = in_turns({name: functools.partial(timed, r) for name, r in readers.items()}, rounds)
    best = {name: min(values) for name, values in seconds.items()}
    return {
        "relative_errors": errors,
        "rounds": seconds,
        "microseconds_per_sample": {name: 1e6 * t / length for name, t in best.items()},
        "ratio": best["FutureFill"] / best["online"],
        "ratio_of_dot_product": best["dot product"] / best["online"],
        "bytes": held,
        "seconds_of_first_half": {name: min(values) for name, values in reading.items()},
    }


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
    positions = spread(arguments.samples, length)

    def online() -> Tensor:
        return stepped(kernel, inputs)[0]

    def dot(t: int) -> Tensor:
        return dot_product(signal[:, : t + 1], backwards)

    def dot_by_einsum(t: int) -> Tensor:
        return torch.einsum("ct,ct->c", signal[:, : t + 1], backwards[:, length - t - 1 :])

    def fft(t: int) -> Tensor:
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
    file = arguments.future_fill
    future_fill = against_future_fill(file, arguments.rounds, arguments.samples) if file else {}
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
