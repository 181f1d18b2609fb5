"""What does a language model lose when its filters are reduced to order n?

A byte-level Hyena of about 10 million parameters is trained on the text behind Python's `help()`.
Its filters are then reduced to orders 2 … 64. For each order, the benchmark measures the relative
l2 errors of the filters, their lower bounds, and the loss on held-out bytes, as bits and as
perplexity per byte. The figure shows these beside the Hankel spectrum, which predicts the order at
which the increase of the loss vanishes (Massaroli et al. 2023, arXiv 2310.18780, section 5).

    python benchmarks/distillation_order.py [--steps N] [--model FOLDER] [--output PATH]

Training takes some minutes on two cores. `--model FOLDER` saves the trained model in this folder.
If the folder exists, the model is loaded instead of trained.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._report import write
from gramian.demo.measuring import bits_per_byte, cut_to_tap_zero
from gramian.demo.text import BigramModel, Corpus, python_documentation
from gramian.demo.training import TrainingSettings, train
from gramian.distillation import DistillationReport, distill
from gramian.models import GramianConfig, GramianForCausalLM, load

ORDERS = (2, 4, 8, 16, 32, 64)
LENGTH = 512


def trained(steps: int, corpus: Corpus, folder: Path | None) -> GramianForCausalLM:
    """Train the model, or load it if its folder exists."""
    if folder is not None and folder.exists():
        return load(folder)
    torch.manual_seed(0)
    config = GramianConfig(
        hidden_size=384,
        num_hidden_layers=6,
        mixers="hyena",
        filter={"type": "implicit"},
        max_position_embeddings=LENGTH,
    )
    model = GramianForCausalLM(config)
    settings = TrainingSettings(steps=steps, batch_size=4, length=LENGTH, learning_rate=2e-3)
    start = time.perf_counter()

    def tell(step: int, loss: float) -> None:
        if step % 20 == 0 or step == steps:
            seconds = time.perf_counter() - start
            print(f"  step {step}: {loss:.3f} bits per byte, {seconds:.0f} s", flush=True)

    train(model, corpus.train, settings, tell)
    if folder is not None:
        model.save_pretrained(folder)
    return model


def row(order: int, loss: float, original: float, report: DistillationReport) -> dict[str, Any]:
    errors, bounds = (
        torch.tensor([value for layer in report.layers for value in getattr(layer, name)])
        for name in ("relative_errors", "lower_bounds")
    )
    return {
        "order": order,
        "bits per byte": loss,
        "increase": loss / original - 1,
        "perplexity per byte": 2**loss,
        "relative error": {"mean": float(errors.mean()), "max": float(errors.max())},
        "lower bound": {"mean": float(bounds.mean())},
        "seconds": report.seconds,
        "state bytes": report.distilled_state_bytes,
    }


def spectra(report: DistillationReport) -> dict[str, list[float]]:
    """Return the median of σ_k / σ_1 over the filters of each layer."""
    found = {}
    for layer in report.layers:
        count = min(len(values) for values in layer.hankel_singular_values)
        values = torch.tensor([values[:count] for values in layer.hankel_singular_values])
        found[str(layer.layer)] = (values / values[:, :1]).median(0).values.tolist()
    return found


def draw(rows: list[dict[str, Any]], original: float, lines: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for name, values in lines.items():
        left.semilogy(range(1, len(values) + 1), values, label=f"layer {name}", alpha=0.8)
    left.set(xlabel="index k", title="Hankel spectra, median of each layer")
    left.set_ylabel(r"$\sigma_k / \sigma_1$")
    left.legend(fontsize=7)
    orders = [r["order"] for r in rows]
    middle.loglog(orders, [r["relative error"]["mean"] for r in rows], "o-", label="error, mean")
    middle.loglog(orders, [r["lower bound"]["mean"] for r in rows], "o--", label="bound, mean")
    middle.set(xlabel="order n", title="relative l2 error of the filters")
    middle.legend(fontsize=7)
    right.semilogx(orders, [r["perplexity per byte"] for r in rows], "o-", label="distilled")
    right.axhline(2**original, color="gray", lw=1, label="original")
    right.set(xlabel="order n", title="perplexity per held-out byte")
    right.legend(fontsize=7)
    for axes in (middle, right):
        axes.set_xticks(orders, [str(n) for n in orders])
        axes.minorticks_off()
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"drew {path}")


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--model", type=Path, help="folder of the trained model")
    parser.add_argument("--output", type=Path, default=here / "results" / "distillation_order.json")
    parser.add_argument(
        "--figure", type=Path, default=here.parent / "docs" / "figures" / "distillation_order.png"
    )
    arguments = parser.parse_args()

    corpus = python_documentation()
    model = trained(arguments.steps, corpus, arguments.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    held_out: Tensor = corpus.held_out
    windows = held_out[: len(held_out) // LENGTH * LENGTH].reshape(-1, LENGTH)
    original = bits_per_byte(model, windows)
    bigram = BigramModel(corpus.train).bits_per_byte(windows)
    without = bits_per_byte(cut_to_tap_zero(model), windows)
    print(
        f"{parameters:,} parameters: {original:.4f} bits per held-out byte (bigram {bigram:.4f}, "
        f"long filters cut to tap 0 {without:.4f})"
    )
    rows = []
    for order in ORDERS:
        small, report = distill(model, order=order)
        rows.append(row(order, bits_per_byte(small, windows), original, report))
        r = rows[-1]
        print(
            f"order {order:3}: error {r['relative error']['mean']:.2e} mean, "
            f"{r['relative error']['max']:.2e} max, bound {r['lower bound']['mean']:.2e}; "
            f"{r['bits per byte']:.4f} bits per byte ({r['increase']:+.3%}), perplexity "
            f"{r['perplexity per byte']:.4f}; {len(report.orders)} filters in {r['seconds']:.1f} s",
            flush=True,
        )
    lines = spectra(report)
    write(
        arguments.output,
        {
            "benchmark": "distillation against order",
            "parameters": parameters,
            "filters": len(report.orders),
            "taps": LENGTH,
            "training steps": arguments.steps,
            "held-out bytes": windows.numel(),
            "original bits per byte": original,
            "bigram bits per byte": bigram,
            "long filters cut to tap 0, bits per byte": without,
            "orders": rows,
            "spectra": lines,
        },
    )
    draw(rows, original, lines, arguments.figure)


if __name__ == "__main__":
    main()
