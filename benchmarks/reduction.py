"""How fast and close is `gramian.reduce`, beside pyMOR's ERA and the published gradient method?

There are five parts, which `--part` selects:

`era` compares the closed form (`Balanced(refine=False)`) with pyMOR. Speed is measured on 1,024
implicit filters in the published configuration (33 features of time, three hidden layers of 64
sines at frequency 10, exponential windows), with 2,048 taps, order 16 and otherwise default
arguments. pyMOR's `ERAReductor`, which factors the dense Hankel matrices one after another, runs on
a few of these filters. Accuracy is measured on 32 seeded filters at order 16: sixteen as
initialised, and sixteen from a small Hyena language model that this script trains for a minute on
the text behind Python's `help()`. pyMOR's `force_stability=True` extends the taps by zeros, as
`tail="zero"` does. `force_stability=False` uses the taps alone and keeps unstable poles, as
`tail="free", stable=False` does. Errors are ‖h - ĥ‖₂ over the taps after the direct term, which
both sides represent exactly.

`gradient` reduces the same filters, half of them trained, with the default method and with
`method=Gradient(…)` at 20,000 steps, each in one run of all filters. It counts the filters for
which the error of the default method is smaller, and computes the ratio of the times. These times
are not extrapolated. With `--quick` there are fewer steps, and the output says so. Gramian's
gradient method computes gradients in closed form from √L × √L blocks. It is also compared with the
published formulation, which materialises the modal form and differentiates through it
automatically. The time of the published formulation for all steps is extrapolated from the fastest
of a few steps, and the output says so.

`large` measures the time and the peak resident memory of refining 49,152 filters of 2,048 taps at
order 16, and the time for 192 filters, with the errors of the closed form for comparison. Memory is
measured from the start of the process, so run this part alone for that figure.

`optimum` asks how much better any refinement could be. On sixteen filters as initialised, it runs
chains of random moves, with full refinement after each move. These chains take much longer than the
default method. Their errors and the lower bound are divided by the closed form's mean error.

`smooth` compares errors on filters of 5 features of time at frequency 1. It compares the default
method with the closed form for a tail of zeros, which pyMOR computes. It also compares the default
method with the better of both closed forms. This choice matters most for these filters.

    python benchmarks/reduction.py [--part era gradient large optimum smooth] [--quick]
                                   [--output FOLDER]
"""

import argparse
import math
import resource
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
from gramian.reduction import Balanced, Gradient
from gramian.reduction.basis import Modes
from gramian.reduction.refinement import greedy_modes, insert_mode, refined, remainder

LENGTH, ORDER = 2048, 16
TREATMENTS = {"zero": {"tail": "zero"}, "free": {"tail": "free", "stable": False}}


@torch.no_grad()
def untrained(count: int, seed: int) -> Tensor:
    """Return kernels (count, LENGTH) of an implicit filter as initialised, in float32."""
    torch.manual_seed(seed)
    return ImplicitFilter(count, LENGTH)().kernel


def trained(count: int, seconds: float) -> tuple[Tensor, dict[str, float]]:
    """Return kernels (count, LENGTH) of a one-layer Hyena after training, and its loss in bits."""
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
    """Return ‖h - ĥ‖₂ of pyMOR's reduction over h_1 … h_{L-1}, and the seconds that it took."""
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
    """Reduce `count` filters several times, and return the times and the filters per second.

    The fastest run counts, because noise only adds time.
    """
    kernel = untrained(count, seed=0)
    reduce(kernel[:64], ORDER, method=Balanced(refine=False))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        reduction = reduce(kernel, ORDER, method=Balanced(refine=False))
        seconds.append(time.perf_counter() - start)
        print(f"  {count} filters in {seconds[-1]:.2f} s: {count / seconds[-1]:.0f} a second")
    return {
        "filters": count,
        "seconds": seconds,
        "filters_per_second": count / min(seconds),
        "mean_relative_error": reduction.relative_error.mean().item(),
    }


def accuracy(kernels: dict[str, Tensor]) -> dict[str, Any]:
    """Return the errors of both sides, for every filter and both treatments of the tail."""
    results: dict[str, Any] = {}
    pymor_seconds = []
    for treatment, arguments in TREATMENTS.items():
        for origin, kernel in kernels.items():
            double = kernel.double()
            reduction = reduce(double, ORDER, method=Balanced(refine=False), **arguments)
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


def against_pymor(options: argparse.Namespace) -> dict[str, Any]:
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
    return {
        "speed": {**speed, "pymor_filters_per_second": once, "ratio": rate / once},
        "training": training,
        "accuracy": errors,
    }


def progress(name: str) -> Any:
    """Return a function that prints the progress, or None if the output is no terminal."""

    def tell(done: int, total: int) -> None:
        print(f"\r  {name}: {done} of {total}", end="\n" if done == total else "", flush=True)

    return tell if sys.stdout.isatty() else None


def timed(name: str, kernel: Tensor, **arguments: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    reduction = reduce(kernel, ORDER, progress=progress(name), **arguments)
    return reduction, time.perf_counter() - start


def published_step(kernel: Tensor, steps: int) -> float:
    """Return the seconds of the fastest step of the published formulation.

    A step processes all filters at once, in float32: poles, their powers over all taps, the impulse
    response, autograd and Adam (arXiv 2310.18780, section 3.2).
    """
    torch.manual_seed(0)
    taps = kernel[:, 1:].float()
    taps = taps / taps.norm(dim=-1, keepdim=True)
    place = torch.arange(taps.shape[-1], dtype=torch.float32)
    shape = (len(taps), ORDER // 2)
    radius = torch.full(shape, math.exp(-3 / LENGTH)).requires_grad_()
    angle = (math.pi * torch.rand(shape)).requires_grad_()
    residues = (torch.randn(*shape, 2) / math.sqrt(LENGTH * ORDER)).requires_grad_()
    optimizer = torch.optim.Adam([radius, angle, residues], lr=3e-3)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        rate = torch.complex(radius.log(), angle).unsqueeze(-1)
        powers = torch.exp(rate * place)  # (filters, modes, taps)
        found = (torch.view_as_complex(residues).unsqueeze(-1) * powers).real.sum(1)
        loss = (taps - found).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            radius.clamp_(max=1 - 1e-6)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def against_gradient(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the default and the gradient method on the same filters, half of them trained."""
    half, steps = options.gradient_filters // 2, options.steps
    print(f"Gradient method: {2 * half} filters of {LENGTH} taps, order {ORDER}, {steps:,} steps")
    if steps < 20_000:
        print("  fewer steps than the 20,000 published: these figures are of a quick run")
    learnt, training = trained(half, options.train_seconds)
    kernel = torch.cat([untrained(half, seed=2), learnt]).double()
    reduce(kernel[:8], ORDER)
    runs = [timed("default", kernel) for _ in range(options.repeats)]
    ours, our_seconds = min(runs, key=lambda run: run[1])
    step = published_step(kernel, options.published_steps)
    theirs, their_seconds = timed("gradient", kernel, method=Gradient(steps=steps))
    smaller = ours.relative_error < theirs.relative_error
    norm = kernel[:, 1:].norm(dim=-1) / kernel.norm(dim=-1)
    for origin, rows in (("untrained", slice(half)), ("trained", slice(half, None))):
        print(
            f"  {origin}: error behind the direct term "
            f"{(ours.relative_error / norm)[rows].mean():.4f}, gradient "
            f"{(theirs.relative_error / norm)[rows].mean():.4f}"
        )
    print(
        f"  smaller for {int(smaller.sum())} of {2 * half}; {our_seconds:.2f} s and "
        f"{their_seconds:.1f} s: {their_seconds / our_seconds:.0f} times faster"
    )
    published = step * steps
    print(
        f"  the published formulation takes {1e3 * step:.1f} ms a step ({options.published_steps} "
        f"steps), {published:.0f} s for {steps:,}, extrapolated: {published / our_seconds:.0f} "
        "times as long"
    )
    return {
        "filters": 2 * half,
        "steps": steps,
        "extrapolated": False,
        "training": training,
        "share_with_smaller_error": smaller.double().mean().item(),
        "seconds": our_seconds,
        "gradient_seconds": their_seconds,
        "ratio_of_times": their_seconds / our_seconds,
        "published_formulation": {
            "seconds_a_step": step,
            "measured_steps": options.published_steps,
            "extrapolated_seconds": published,
            "extrapolated_ratio_of_times": published / our_seconds,
        },
        "relative_errors": ours.relative_error.tolist(),
        "gradient_relative_errors": theirs.relative_error.tolist(),
    }


def large(options: argparse.Namespace) -> dict[str, Any]:
    """Reduce many filters at once, and measure the time, the memory and the gain by refinement."""
    results: dict[str, Any] = {}
    reduce(untrained(64, seed=0), ORDER)
    for count in (192, options.large_filters):
        kernel = untrained(count, seed=4)
        before = time.process_time()
        reduction, seconds = timed(f"{count} filters", kernel)
        used = time.process_time() - before
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
        some = slice(0, None, max(1, count // 192))
        plain = reduce(kernel[some], ORDER, method=Balanced(refine=False)).relative_error
        better = reduction.relative_error[some]
        print(
            f"  {count} filters in {seconds:.1f} s, {count / seconds:.0f} a second, {used:.1f} s "
            f"of processor time, peak memory "
            f"{peak:.2f} GiB; error {better.mean() / plain.mean():.4f} of the closed form's, at "
            f"most {(better / plain).max():.4f} (on {len(plain)} filters)"
        )
        results[str(count)] = {
            "seconds": seconds,
            "processor_seconds": used,
            "filters_per_second": count / seconds,
            "peak_resident_gib": peak,
            "mean_relative_error": reduction.relative_error.mean().item(),
            "compared_filters": len(plain),
            "ratio_of_mean_errors": (better.mean() / plain.mean()).item(),
            "largest_ratio": (better / plain).max().item(),
        }
    return results


def optimum(options: argparse.Namespace) -> dict[str, Any]:
    """Measure how much a long random search lowers the errors of the default method."""
    results: dict[str, Any] = {}
    for length in options.search_lengths:
        torch.manual_seed(3)
        kernel = ImplicitFilter(options.search_filters, length)().kernel.detach().double()
        plain = reduce(kernel, ORDER, method=Balanced(refine=False))
        refined_ = reduce(kernel, ORDER)
        searched = searched_error(kernel, options.chains, options.hops)
        found = torch.minimum(searched, refined_.relative_error)
        whole = plain.relative_error.mean()
        ratios = {
            "refined": (refined_.relative_error.mean() / whole).item(),
            "searched": (found.mean() / whole).item(),
            "lower_bound": (refined_.lower_bound.mean() / whole).item(),
        }
        print(
            f"  {length} taps, {len(kernel)} filters: closed form 1, default "
            f"{ratios['refined']:.4f}, {options.chains} chains of {options.hops} random moves "
            f"{ratios['searched']:.4f}, lower bound {ratios['lower_bound']:.4f}"
        )
        results[str(length)] = {
            **ratios,
            "filters": len(kernel),
            "chains": options.chains,
            "moves": options.hops,
            "plain_mean_relative_error": whole.item(),
        }
    return results


def searched_error(kernel: Tensor, chains: int, moves: int) -> Tensor:
    """Return the least relative errors that chains of random moves find.

    The chains start from greedy and from random poles. A move removes one or two modes at random,
    adds others where the residual, under a random modulation, has a peak, and refines all modes. It
    is kept if the error falls.
    """
    taps, pairs = kernel[:, 1:], ORDER // 2
    many = taps.repeat_interleave(chains, 0)
    rows = torch.arange(len(many))
    length = taps.shape[-1]
    decay = torch.empty(len(many), pairs, dtype=torch.float64).uniform_(math.log(0.5), math.log(30))
    angle = math.pi * torch.rand_like(decay)
    absent = torch.zeros_like(decay, dtype=torch.bool)
    modes = Modes(decay.exp() / length, angle, absent, ~absent)
    first = rows % chains == 0
    modes.put(first, greedy_modes(taps, torch.full((len(taps),), ORDER)))
    arguments: dict[str, Any] = {"ridge": 0.0, "limit": 1e-9, "infinite": False}
    modes, error = refined(many, modes, steps=60, **arguments)
    for move in range(moves):
        trial = modes.clone()
        dropped = torch.rand_like(decay).topk(1 + move % 2, dim=-1).indices
        for slot in dropped.unbind(-1):
            trial.present[rows, slot] = False
        for slot in dropped.unbind(-1):
            wave = torch.rand(len(many), 1) * 4 * math.pi * torch.arange(length) / length
            residual = remainder(many, trial) * (1 + 0.5 * torch.randn(len(many), 1) * wave.cos())
            insert_mode(trial, rows, slot, residual, single=False)
        trial, after = refined(many, trial, steps=12, **arguments)
        better = after < error
        modes.put(better, trial[better])
        error = torch.where(better, after, error)
    return error.unflatten(0, (-1, chains)).amin(-1).sqrt() / kernel.norm(dim=-1)


def smooth(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the default method with both closed forms on smooth filters, with taps in float64."""
    results: dict[str, Any] = {}
    torch.manual_seed(5)
    filters = ImplicitFilter(options.smooth_filters, LENGTH, embedding_features=5, frequency=1.0)
    kernel = filters.double()().kernel.detach()
    for order in (4, 8, ORDER):
        refined_ = reduce(kernel, order).relative_error
        result: dict[str, Any] = {"relative_error": refined_.mean().item()}
        for name, treatment in (("zero", {"tail": "zero"}), ("auto", {})):
            plain = reduce(kernel, order, method=Balanced(refine=False), **treatment).relative_error
            result[name] = {
                "relative_error": plain.mean().item(),
                "ratio_of_mean_errors": (refined_.mean() / plain.mean()).item(),
                "largest_ratio": (refined_ / plain).max().item(),
            }
        print(
            f"  smooth, order {order}: {result['relative_error']:.1e}; closed form, zero tail, "
            f"{result['zero']['relative_error']:.1e} (ratio "
            f"{result['zero']['ratio_of_mean_errors']:.2g}), the better of both tails "
            f"{result['auto']['relative_error']:.1e} (ratio "
            f"{result['auto']['ratio_of_mean_errors']:.2g}, largest "
            f"{result['auto']['largest_ratio']:.3f})"
        )
        results[str(order)] = result
    return results


PARTS = {
    "large": large,
    "era": against_pymor,
    "gradient": against_gradient,
    "optimum": optimum,
    "smooth": smooth,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="small sizes, to see the output")
    parser.add_argument("--filters", type=int, default=1024, help="filters of the part era")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gradient-filters", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20_000, help="steps of the gradient method")
    parser.add_argument(
        "--published-steps",
        type=int,
        default=300,
        help="measured steps of the published formulation",
    )
    parser.add_argument("--search-lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument(
        "--search-filters", type=int, default=16, help="filters of the part optimum"
    )
    parser.add_argument("--smooth-filters", type=int, default=64, help="filters of the part smooth")
    parser.add_argument("--chains", type=int, default=12)
    parser.add_argument("--hops", type=int, default=60)
    parser.add_argument("--large-filters", type=int, default=49_152)
    parser.add_argument("--train-seconds", type=float, default=60.0)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder of the JSON files; a quick run writes none",
    )
    options = parser.parse_args()
    if options.quick:
        options.filters, options.repeats, options.train_seconds = 64, 1, 2.0
        options.gradient_filters, options.steps, options.large_filters = 8, 500, 384
        options.published_steps, options.search_lengths = 20, [512]
        options.search_filters, options.chains, options.hops = 4, 4, 5
    for part in PARTS:
        if part in options.part:
            name = "reduction" if part == "era" else f"reduction_{part}"
            measured = PARTS[part](options)
            if not options.quick:
                write(
                    options.output / f"{name}.json",
                    {"length": LENGTH, "order": ORDER, **measured},
                )


if __name__ == "__main__":
    main()
