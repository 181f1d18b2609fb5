"""Does a teacher's effective state-size predict what is lost by distilling it?

Small byte-level Hyena language models are trained on the text behind Python's `help()`. They differ
only in their filters and seeds. Every teacher is distilled to the same orders. Its effective
state-size is the mean over its filters, as `distill` reports it. The benchmark computes the rank
correlation of the effective state-size with three costs: the relative increase of the loss on
held-out bytes, the divergence KL(teacher ‖ student) of the predictions, and the error of the
filters. According to arXiv 2504.19561, a teacher is harder to distil into small states if its ESS
is higher.

    python benchmarks/ess_distillation.py [--steps N] [--seeds N] [--threads N]

With `--teachers JSON`, the measurements are read from earlier results, and only the correlations
and the figure are made.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._report import write
from gramian.demo.measuring import bits_per_byte
from gramian.demo.text import python_documentation
from gramian.demo.training import TrainingSettings, train
from gramian.distillation import distill
from gramian.memory.correlation import rank_correlation
from gramian.models import GramianConfig, GramianForCausalLM

LENGTH, WIDTH, LAYERS = 256, 64, 2
ORDERS = (2, 4, 8, 16)
SHOWN = 4
WINDOWS = 48
FILTERS: dict[str, dict[str, Any]] = {
    "implicit, frequency 1": {"type": "implicit", "frequency": 1.0},
    "implicit, frequency 3": {"type": "implicit", "frequency": 3.0},
    "implicit, frequency 10": {"type": "implicit", "frequency": 10.0},
    "implicit, fast decay": {"type": "implicit", "fast_decay": 0.05, "slow_decay": 0.2},
    "S4D, 8 states": {"type": "s4d", "state_size": 8},
    "S4D, 64 states": {"type": "s4d", "state_size": 64},
    "RTF, 8 states": {"type": "rtf", "state_size": 8},
    "RTF, 64 states": {"type": "rtf", "state_size": 64},
}
COSTS = {
    "increase": "increase of the loss",
    "divergence": "KL(teacher ‖ student)",
    "error": "error of the filters",
}


def teacher(name: str, seed: int, steps: int, data: Tensor) -> GramianForCausalLM:
    torch.manual_seed(seed)
    config = GramianConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        mixers="hyena",
        filter=FILTERS[name],
        max_position_embeddings=LENGTH,
    )
    model = GramianForCausalLM(config)
    settings = TrainingSettings(steps=steps, batch_size=8, length=LENGTH, learning_rate=4e-3)
    train(model, data, settings)
    return model.eval()


@torch.no_grad()
def divergence(model: GramianForCausalLM, student: GramianForCausalLM, windows: Tensor) -> float:
    """Return the mean KL(teacher ‖ student) of the predictions over all bytes, in bits."""
    total = 0.0
    for part in windows.long().split(8):
        p, q = (m(part, use_cache=False).logits.log_softmax(-1) for m in (model, student))
        total += float((p.exp() * (p - q)).sum())
    return total / windows.numel() / torch.log(torch.tensor(2.0)).item()


def measure(name: str, seed: int, steps: int, data: Tensor, windows: Tensor) -> dict[str, Any]:
    start = time.perf_counter()
    model = teacher(name, seed, steps, data)
    row: dict[str, Any] = {"filter": name, "seed": seed, "bits": bits_per_byte(model, windows)}
    row["students"] = {}
    for order in ORDERS:
        student, report = distill(model, order=order)
        errors = [error for layer in report.layers for error in layer.relative_errors]
        row["ess"] = sum(report.effective_state_sizes) / len(errors)
        row["students"][str(order)] = {
            "increase": bits_per_byte(student, windows) / row["bits"] - 1,
            "divergence": divergence(model, student, windows),
            "error": sum(errors) / len(errors),
            "correlation within": report.rank_correlation,
        }
    row["seconds"] = time.perf_counter() - start
    return row


def correlations(rows: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    sizes = [row["ess"] for row in rows]
    return {
        str(order): {
            cost: rank_correlation(sizes, [row["students"][str(order)][cost] for row in rows])
            for cost in COSTS
        }
        for order in ORDERS
    }


def within_kinds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the correlations among the teachers with the same kind of parametrisation."""
    kinds = dict.fromkeys(row["filter"].split(",")[0] for row in rows)
    return {
        kind: correlations([row for row in rows if row["filter"].split(",")[0] == kind])
        for kind in kinds
    }


def draw(rows: list[dict[str, Any]], found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for axes, (cost, title) in zip(panels, COSTS.items(), strict=True):
        for name in FILTERS:
            of_kind = [row for row in rows if row["filter"] == name]
            values = [row["students"][str(SHOWN)][cost] for row in of_kind]
            if cost == "increase":
                values = [100 * value for value in values]
            axes.plot([row["ess"] for row in of_kind], values, "o", label=name, alpha=0.8)
        axes.set_xscale("log")
        axes.set_xticks([4, 8, 16, 32, 64], ["4", "8", "16", "32", "64"])
        axes.minorticks_off()
        if cost != "increase":
            axes.set_yscale("log")
        correlation = found[str(SHOWN)][cost]
        axes.set(xlabel="teacher's effective state-size, mean over filters")
        axes.set_title(f"{title}{', %' if cost == 'increase' else ''} (ρ = {correlation:.2f})")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"drew {path}")


def table(rows: list[dict[str, Any]], found: dict[str, Any]) -> str:
    lines = [
        f"| filter | seed | bits per byte | ESS | loss, order {SHOWN} | KL, order {SHOWN} (bits) | "
        f"filter error, order {SHOWN} |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["ess"]):
        student = row["students"][str(SHOWN)]
        lines.append(
            f"| {row['filter']} | {row['seed']} | {row['bits']:.4f} | {row['ess']:.2f} | "
            f"{student['increase']:+.3%} | {student['divergence']:.2e} | {student['error']:.3f} |"
        )
    lines += [
        "",
        f"| order | ρ(ESS, {COSTS['increase']}) | ρ(ESS, {COSTS['divergence']}) | "
        f"ρ(ESS, {COSTS['error']}) | within one teacher, over its filters |",
        "|---|---|---|---|---|",
    ]
    for order in ORDERS:
        inside = [row["students"][str(order)]["correlation within"] for row in rows]
        known = [value for value in inside if value is not None]
        values = [f"{found[str(order)][cost]:.2f}" for cost in COSTS]
        within = f"{min(known):.2f} … {max(known):.2f}, mean {sum(known) / len(known):.2f}"
        lines.append(f"| {order} | {' | '.join(values)} | {within} |")
    lines.append("")
    for kind, of_kind in within_kinds(rows).items():
        told = (
            f"{name} {of_kind[str(SHOWN)][cost] or float('nan'):.2f}"
            for cost, name in COSTS.items()
        )
        lines.append(f"within {kind}, order {SHOWN}: {', '.join(told)}")
    return "\n".join(lines)


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--teachers", type=Path, help="results to take the teachers from")
    parser.add_argument("--output", type=Path, default=here / "results" / "ess_distillation.json")
    parser.add_argument(
        "--figure", type=Path, default=here.parent / "docs" / "figures" / "ess_distillation.png"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.teachers is not None:
        results = json.loads(arguments.teachers.read_text(encoding="utf-8"))
        found = correlations(results["teachers"])
        print(table(results["teachers"], found))
        draw(results["teachers"], found, arguments.figure)
        return
    corpus = python_documentation()
    windows = corpus.held_out[: WINDOWS * LENGTH].reshape(WINDOWS, LENGTH)
    rows = []
    for seed in range(arguments.seeds):
        for name in FILTERS:
            rows.append(measure(name, seed, arguments.steps, corpus.train, windows))
            row = rows[-1]
            student = row["students"][str(SHOWN)]
            print(
                f"{name}, seed {seed}: {row['bits']:.4f} bits per byte, ESS {row['ess']:.2f}; "
                f"order {SHOWN}: loss {student['increase']:+.3%}, KL "
                f"{student['divergence']:.2e} bits, error {student['error']:.3f} "
                f"({row['seconds']:.0f} s)",
                flush=True,
            )
    found = correlations(rows)
    results = {
        "benchmark": "effective state-size against the cost of distillation",
        "steps": arguments.steps,
        "width": WIDTH,
        "layers": LAYERS,
        "length": LENGTH,
        "held-out bytes": windows.numel(),
        "rank correlations": found,
        "within kinds": within_kinds(rows),
        "teachers": rows,
    }
    print(table(rows, found))
    write(arguments.output, results)
    draw(rows, found, arguments.figure)


if __name__ == "__main__":
    main()
