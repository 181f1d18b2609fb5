"""Do models trained with the loss on Hankel singular values need smaller recurrences?

A byte-level Hyena is trained on the text behind Python's `help()`, once for each kind of filter and
each weight of `hankel_penalty`, with everything else equal. Its filters are then reduced to several
orders. For each, the loss on held-out bytes and the divergence KL(original ‖ reduced) of the
predictions are measured, since a reduced filter may have the lower loss. The figure shows both
against the order. Some runs have `regularization.truncation` too, which drops weak modes of S4D's
filters in training.

    python benchmarks/hankel_training.py [--runs FOLDER] [--steps N] [--first N] [--output PATH]

Every training is a run of `gramian train` in its own folder, so an interrupted benchmark goes on
where it stopped. With the default arguments, it takes about half an hour on one core.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._report import write
from benchmarks.ess_distillation import divergence
from gramian.demo.measuring import bits_per_byte
from gramian.demo.text import python_documentation
from gramian.distillation import distill
from gramian.memory import hankel_penalty
from gramian.models import GramianForCausalLM, load
from gramian.training import parse_config, train

LENGTH = 256
BLOCKS = 32  # held-out windows on which divergences are measured
ORDERS = (2, 4, 8, 16)
FILTERS: dict[str, dict[str, Any]] = {
    "implicit": {"type": "implicit"},
    "s4d": {"type": "s4d", "state_size": 32},
}
RUNS = (  # filter, weight of the loss, share that truncation may drop
    ("s4d", 0.0, 0.0),
    ("s4d", 1e-2, 0.0),
    ("s4d", 1e-2, 1e-3),
    ("implicit", 0.0, 0.0),
    ("implicit", 1e-1, 0.0),
    ("implicit", 1e-2, 0.0),
    ("s4d", 0.0, 1e-3),
    ("s4d", 1e-1, 0.0),
)


def place(filter: str, weight: float, share: float, steps: int, folder: Path) -> Path:
    """Return the folder of a run."""
    return folder / f"{filter}_{weight:g}_{share:g}_{steps}"


def trained(
    filter: str, weight: float, share: float, steps: int, folder: Path
) -> GramianForCausalLM:
    """Train a model, or load it if its run is finished."""
    output = place(filter, weight, share, steps, folder)
    config = {
        "output": str(output),
        "seed": 0,
        "task": {"name": "python_documentation", "length": LENGTH},
        "model": {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "mixers": "hyena",
            "filter": FILTERS[filter],
            "max_position_embeddings": LENGTH,
        },
        "optimization": {"steps": steps, "batch_size": 8, "learning_rate": 5e-3},
        "regularization": {"hankel": weight, "truncation": share},
        "evaluation": {"every": max(1, steps // 4), "examples": 64, "samples": 0},
        "checkpoints": {"every": 100},
        "logging": {"every": 25},
        "hardware": {"device": "cpu"},
    }
    train(parse_config(config))
    return load(output / "last").eval()


@torch.no_grad()
def penalty(model: GramianForCausalLM) -> float:
    """Return the mean of `Σ σ_i / σ_1` over the filters."""
    systems = [layer.mixer.filter(LENGTH) for layer in model.base_model.layers]
    return float(hankel_penalty(systems, LENGTH))


def curve(model: GramianForCausalLM, windows: Tensor) -> dict[str, Any]:
    """Measure the loss of a model before and after its filters are reduced to each order."""
    model.requires_grad_(False)
    whole = bits_per_byte(model, windows)
    rows = []
    for order in ORDERS:
        small, report = distill(model, order=order)
        loss = bits_per_byte(small, windows)
        errors = torch.tensor([e for layer in report.layers for e in layer.relative_errors])
        rows.append(
            {
                "order": order,
                "bits per byte": loss,
                "increase": loss / whole - 1,
                "divergence": divergence(model, small, windows[:BLOCKS]),
                "mean relative error": float(errors.mean()),
                "state bytes": report.distilled_state_bytes,
            }
        )
    sizes = [size for layer in report.layers for size in layer.effective_state_sizes]
    return {
        "bits per byte": whole,
        "nuclear norm over largest singular value": penalty(model),
        "mean effective state-size": sum(sizes) / len(sizes),
        "state bytes": model.state_bytes(1, LENGTH),
        "orders": rows,
    }


def draw(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(9, 6.5), layout="constrained", sharex=True)
    measures = {"bits per byte": "bits per held-out byte", "divergence": "KL of predictions, bits"}
    for row, (key, label) in zip(panels, measures.items(), strict=True):
        for axes, filter in zip(row, FILTERS, strict=True):
            for run in (run for run in results if run["filter"] == filter):
                name = f"λ = {run['weight']:g}"
                name += f", truncation {run['truncation']:g}" if run["truncation"] else ""
                orders = [one["order"] for one in run["orders"]]
                values = [one[key] for one in run["orders"]]
                axes.plot(orders, values, "o-", ms=3, label=name)
            axes.set(title=filter, ylabel=label, xscale="log")
            if key == "divergence":
                axes.set(yscale="log", xlabel="order of every filter")
            axes.set_xticks(ORDERS, [str(n) for n in ORDERS])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"drew {path}")


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--first", type=int, help="number of runs; by default all")
    parser.add_argument(
        "--runs", type=Path, default=Path(tempfile.gettempdir()) / "gramian_hankel_training"
    )
    parser.add_argument("--output", type=Path, default=here / "results" / "hankel_training.json")
    parser.add_argument(
        "--figure", type=Path, default=here.parent / "docs" / "figures" / "hankel_training.png"
    )
    arguments = parser.parse_args()

    held_out = python_documentation().held_out
    windows = held_out[: len(held_out) // LENGTH * LENGTH].reshape(-1, LENGTH)[: 4 * BLOCKS]
    results: list[dict[str, Any]] = []
    for run in RUNS[: arguments.first]:
        kept = place(*run, arguments.steps, arguments.runs) / "curve.json"
        if not kept.is_file():
            model = trained(*run, arguments.steps, arguments.runs)
            names = dict(zip(("filter", "weight", "truncation"), run, strict=True))
            write(kept, names | curve(model, windows))
        found = json.loads(kept.read_text(encoding="utf-8"))
        results.append(found)
        print(
            f"{run}: {found['bits per byte']:.4f} bits per byte, Σσ/σ₁ "
            f"{found['nuclear norm over largest singular value']:.2f}, state "
            f"{found['state bytes']} bytes; "
            + ", ".join(
                f"order {r['order']}: {r['increase']:+.2%}, KL {r['divergence']:.2e}"
                for r in found["orders"]
            ),
            flush=True,
        )
        write(
            arguments.output,
            {
                "benchmark": "order against loss with and without the loss on Hankel values",
                "steps": arguments.steps,
                "taps": LENGTH,
                "held-out bytes": windows.numel(),
                "runs": results,
            },
        )
        draw(results, arguments.figure)


if __name__ == "__main__":
    main()
