"""How does the loss fall with the order when a language model needs its filters?

A byte-level Hyena of two layers is trained on the text behind Python's `help()`. Its long filters
are its only memory: the short convolutions have one tap. The taps of a filter start at zero, except
tap 0, have weight decay, and are multiplied by an exponential window, so that the trained filters
hold little noise. First, the filters are cut to their first taps, which shows how far back the
model reads. Then they are reduced to orders 1 … 64 in two ways:

- unweighted: `gramian.distill`, which minimizes the l2 errors of the filters;
- by text: weighted by what the filters receive on training text, as in calibrated_reduction.py.

For each order, the benchmark measures the errors of the filters with their lower bounds, the loss
on held-out bytes, and the divergence KL(original ‖ reduced) of the predictions. All figures are
means over seeds with standard deviations. The figure shows them beside the Hankel spectrum
(Massaroli et al. 2023, arXiv 2310.18780, section 5).

    python benchmarks/trained_filters.py [--runs FOLDER] [--steps N] [--seeds N] [--quick]
        [--page docs/results/distillation.md]

An interrupted benchmark goes on after the last seed that was trained, and after the last order that
was measured.
"""

import argparse
import copy
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gramian
from benchmarks._pages import fill_marks
from benchmarks._report import write
from benchmarks._trained_filters_page import blocks
from benchmarks.calibrated_reduction import by_text, factor, received, weighted
from benchmarks.distillation_order import spectra
from benchmarks.ess_distillation import divergence
from benchmarks.hankel_training import LENGTH
from gramian.demo.measuring import bits_per_byte
from gramian.demo.text import BigramModel, Corpus, python_documentation
from gramian.demo.training import TrainingSettings, train
from gramian.distillation import DistillationReport, distill
from gramian.filters import ExplicitFilter, Filter, ModalFilter, register
from gramian.models import GramianConfig, GramianForCausalLM, load
from gramian.systems import FIR

ORDERS = (1, 2, 4, 8, 16, 32, 64)
TAPS = (1, 2, 4, 8, 16, 32, 64, 128)
WAYS = {"unweighted": ORDERS, "by text": ORDERS[:4]}  # fits with weights take long at high orders
WINDOWS = 16  # windows of the calibration text
BLOCKS = 32  # held-out windows on which divergences are measured
FADED = 0.01  # value of a window at its end
SHORTEST, LONGEST = 8, 2 * LENGTH  # ends of the windows, in taps


@register("windowed")
class WindowedFilter(Filter):
    """Free taps times exponential windows, `h_t = w_t exp(-a t)`, which start from tap 0 alone.

    The rates a of the channels are spread geometrically. The windows fall to 0.01 after 8 to 512
    taps.

    Args:
        channels: The number of filters.
        max_length: The number of taps.
    """

    def __init__(self, channels: int, max_length: int) -> None:
        super().__init__(channels, max_length)
        self.kernel = nn.Parameter(torch.empty(channels, max_length))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw tap 0 from a standard normal distribution, and set the other taps to zero."""
        nn.init.zeros_(self.kernel)
        nn.init.normal_(self.kernel[:, 0])

    def forward(self, length: int | None = None) -> FIR:
        taps = self.max_length if length is None else min(length, self.max_length)
        ends = torch.logspace(math.log10(SHORTEST), math.log10(LONGEST), self.channels)
        time = torch.arange(taps, device=self.kernel.device)
        window = torch.exp(math.log(FADED) / ends.to(time.device).unsqueeze(-1) * time)
        return FIR(self.kernel[:, :taps] * window)

    def optimizer_hints(self) -> dict[str, dict[str, float]]:
        """Return a weight decay of 1 for the taps."""
        return {"kernel": {"weight_decay": 1.0}}


def trained(seed: int, steps: int, width: int, corpus: Corpus, folder: Path) -> GramianForCausalLM:
    """Train a model, or load it if its folder exists."""
    if folder.exists():
        return load(folder).eval()
    torch.manual_seed(seed)
    config = GramianConfig(
        hidden_size=width,
        num_hidden_layers=2,
        mixers="hyena",
        short_kernel=1,
        filter={"type": "windowed"},
        max_position_embeddings=LENGTH,
    )
    model = GramianForCausalLM(config)
    settings = TrainingSettings(steps=steps, batch_size=8, length=LENGTH)
    start = time.process_time()

    def tell(step: int, loss: float) -> None:
        if step % 100 == 0 or step == steps:
            seconds = time.process_time() - start
            print(f"  step {step}: {loss:.3f} bits per byte, {seconds:.0f} s", flush=True)

    train(model, corpus.train, settings, tell)
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    partial.rename(folder)
    return model


def kernels(model: GramianForCausalLM) -> list[Tensor]:
    """Return the taps of every layer's filters, (channels, taps) in float64."""
    layers: Any = model.model.layers
    return [b.mixer.filter(LENGTH).impulse_response(LENGTH).detach().double() for b in layers]


def replaced(model: GramianForCausalLM, make: Callable[[int], Filter]) -> GramianForCausalLM:
    """Copy a model with other filters, which `make` returns for the index of every layer."""
    copied = copy.deepcopy(model)
    layers: Any = copied.model.layers
    for index, block in enumerate(layers):
        block.mixer.filter = make(index)
    return copied.eval()


def cut(model: GramianForCausalLM, taps: int) -> GramianForCausalLM:
    """Copy a model, and keep only the first taps of its filters."""
    found = [kernel[:, :taps].float() for kernel in kernels(model)]
    return replaced(model, lambda index: ExplicitFilter.from_kernel(found[index], LENGTH))


def scores(model: GramianForCausalLM, small: GramianForCausalLM, windows: Tensor) -> dict[str, Any]:
    loss = bits_per_byte(small, windows)
    return {
        "bits per byte": loss,
        "perplexity per byte": 2**loss,
        "divergence": divergence(model, small, windows[:BLOCKS]),
    }


@torch.no_grad()
def reductions(
    model: GramianForCausalLM, order: int, factors: list[Tensor], windows: Tensor
) -> tuple[dict[str, Any], DistillationReport]:
    """Measure a model whose filters are reduced to an order in both ways.

    The report is that of the unweighted reduction.
    """
    small, report = distill(model, order=order)
    original = kernels(model)
    bounds = [bound for layer in report.layers for bound in layer.lower_bounds]
    row: dict[str, Any] = {"order": order, "lower bound": statistics.fmean(bounds)}
    row["state bytes"] = report.distilled_state_bytes

    def fitted(index: int) -> ModalFilter:
        layers: Any = small.model.layers
        kernel, start = original[index], layers[index].mixer.filter(LENGTH)
        large = gramian.reduce(kernel, order=order + 8).system
        system = weighted(kernel, order, factors[index], start, large)
        return ModalFilter.from_system(system, max_length=LENGTH)

    reduced = {"unweighted": small}
    if order in WAYS["by text"]:
        reduced["by text"] = replaced(model, fitted)
    for way, other in reduced.items():
        plain, on_text = [], []
        for old, new, W in zip(original, kernels(other), factors, strict=True):
            miss = old - new
            plain.append(miss.norm(dim=-1) / old.norm(dim=-1))
            on_text.append((W @ miss.unsqueeze(-1)).norm(dim=(-2, -1)))
            on_text[-1] /= (W @ old.unsqueeze(-1)).norm(dim=(-2, -1))
        row[way] = scores(model, other, windows) | {
            "relative error": float(torch.cat(plain).mean()),
            "relative error on the calibration text": float(torch.cat(on_text).mean()),
        }
    return row, report


def measured(seed: int, arguments: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    """Train the model of a seed and measure it, or continue where a run stopped."""
    windows, training = (
        text[: len(text) // LENGTH * LENGTH].reshape(-1, LENGTH)
        for text in (corpus.held_out, corpus.train)
    )
    if arguments.quick:
        windows = windows[:4]
    folder = arguments.runs / f"seed_{seed}_width_{arguments.width}_steps_{arguments.steps}"
    kept = folder.with_suffix(".json")
    model = trained(seed, arguments.steps, arguments.width, corpus, folder)
    model.requires_grad_(False)
    run: dict[str, Any]
    if kept.is_file():
        run = json.loads(kept.read_text(encoding="utf-8"))
    else:
        run = {
            "seed": seed,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "held-out bytes": windows.numel(),
            "bits per byte": bits_per_byte(model, windows),
            "bigram bits per byte": BigramModel(corpus.train).bits_per_byte(windows),
            "taps": [
                {"taps": n, "bits per byte": bits_per_byte(cut(model, n), windows)} for n in TAPS
            ],
            "orders": [],
        }
        write(kept, run)
    print(f"seed {seed}: {run['bits per byte']:.4f} bits per byte", flush=True)
    todo = [n for n in arguments.orders if n not in [row["order"] for row in run["orders"]]]
    if todo:
        calibration = training[:: max(1, len(training) // WINDOWS)][:WINDOWS]
        factors = [factor(by_text(*pair)) for pair in received(model, calibration)]
    for order in todo:
        start = time.process_time()
        row, report = reductions(model, order, factors, windows)
        run["orders"].append(row)
        run["spectra"] = spectra(report)
        write(kept, run)
        losses = ", ".join(
            f"{row[way]['bits per byte'] / run['bits per byte'] - 1:+.3%} {way}"
            for way in WAYS
            if way in row
        )
        print(f"  order {order}: {losses}; {time.process_time() - start:.0f} s", flush=True)
    return run


def spread(values: list[float]) -> dict[str, float]:
    """Return the mean and the standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "deviation": deviation}


def summarized(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means and standard deviations over seeds.

    A fall is by how much the increase of the loss is smaller at the next order. It is a difference
    within one seed, so that the seeds' own losses cancel.
    """

    def rows(key: str, size: int) -> list[dict[str, Any]]:
        name = {"orders": "order", "taps": "taps"}[key]
        return [row for run in runs for row in run[key] if row[name] == size]

    def increases(found: list[dict[str, Any]]) -> list[float]:
        return [
            row["bits per byte"] / run["bits per byte"] - 1
            for row, run in zip(found, runs, strict=True)
        ]

    orders = [row["order"] for row in runs[0]["orders"]]
    lines = []
    falls: dict[str, Any] = {}
    for order in orders:
        found = rows("orders", order)
        line: dict[str, Any] = {"order": order}
        line["lower bound"] = spread([row["lower bound"] for row in found])
        for way in WAYS:
            if order in WAYS[way]:
                each = [row[way] for row in found]
                line[way] = {name: spread([one[name] for one in each]) for name in each[0]}
                line[way]["increase"] = spread(increases(each))
        lines.append(line)
    for way in WAYS:
        curves = {
            order: increases([row[way] for row in rows("orders", order)])
            for order in orders
            if order in WAYS[way]
        }
        falls[way] = [
            {
                "from": low,
                "to": high,
                "fall": spread([a - b for a, b in zip(curves[low], curves[high], strict=True)]),
            }
            for low, high in itertools.pairwise(curves)
        ]
    taps = [row["taps"] for row in runs[0]["taps"]]
    return {
        "bits per byte": spread([run["bits per byte"] for run in runs]),
        "taps": [{"taps": n, "increase": spread(increases(rows("taps", n)))} for n in taps],
        "orders": lines,
        "falls": falls,
    }


def draw(runs: list[dict[str, Any]], summary: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for index, run in enumerate(runs):
        for name, values in run["spectra"].items():
            label = f"layer {name}" if index == 0 else None
            places = range(1, len(values) + 1)
            left.semilogy(places, values, color=f"C{name}", label=label, alpha=0.6)
    left.set(xlabel="index k", title="Hankel spectra, median, each seed")
    left.set_ylabel(r"$\sigma_k / \sigma_1$")
    rows = summary["orders"]
    orders = [row["order"] for row in rows]
    for way in WAYS:
        found = [(row["order"], row[way]) for row in rows if way in row]
        errors = [scores["relative error"]["mean"] for _, scores in found]
        middle.loglog([order for order, _ in found], errors, "o-", label=way)
    middle.loglog(orders, [row["lower bound"]["mean"] for row in rows], "k--", label="bound")
    middle.set(xlabel="order n", title="relative l2 error of the filters")
    for way in WAYS:
        found = [(row["order"], row[way]["perplexity per byte"]) for row in rows if way in row]
        means, bars = ([value[name] for _, value in found] for name in ("mean", "deviation"))
        right.errorbar([order for order, _ in found], means, bars, fmt="o-", capsize=3, label=way)
    original = statistics.fmean(2 ** run["bits per byte"] for run in runs)
    right.axhline(original, color="gray", lw=1, label="original")
    right.set(xlabel="order n", title="perplexity per held-out byte", xscale="log")
    for axes in (middle, right):
        axes.set_xticks(orders, [str(n) for n in orders])
        axes.minorticks_off()
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"drew {path}")


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--orders", type=int, nargs="+", default=list(ORDERS))
    parser.add_argument("--quick", action="store_true", help="a few steps, in seconds")
    parser.add_argument(
        "--runs", type=Path, default=Path(tempfile.gettempdir()) / "gramian_trained_filters"
    )
    parser.add_argument("--output", type=Path, default=here / "results" / "trained_filters.json")
    parser.add_argument(
        "--figure", type=Path, default=here.parent / "docs" / "figures" / "trained_filters.png"
    )
    parser.add_argument("--page", type=Path, help="page whose tables are written")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.width, arguments.seeds, arguments.orders = 4, 4, 2, [1, 2, 4]
        arguments.runs /= "quick"

    corpus = python_documentation()
    runs: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        runs.append(measured(seed, arguments, corpus))
        results = {
            "benchmark": "order against loss for a model that needs its filters",
            "steps": arguments.steps,
            "width": arguments.width,
            "taps of the filters": LENGTH,
            "calibration bytes": WINDOWS * LENGTH,
            "summary": summarized(runs),
            "runs": runs,
        }
        write(arguments.output, results)
        draw(runs, results["summary"], arguments.figure)
    if arguments.page is not None:
        page = arguments.page.read_text(encoding="utf-8")
        arguments.page.write_text(fill_marks(page, blocks(results)), encoding="utf-8")
        print(f"wrote {arguments.page}")


if __name__ == "__main__":
    main()
