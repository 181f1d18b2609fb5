"""Does the state in use explain accuracy on three tasks, and better than the available state?

Parnichkun et al. 2025 (arXiv 2504.19561) compare, on multi-query associative recall, selective
copying and compression, the correlations of accuracy with the effective state-size (entropy-ESS)
and with the theoretical state-size (TSS), each divided by the number kv of key-value pairs. Here kv
is the number of items that the state must hold when the first answer is due: the pairs of recall,
the tokens to copy of selective copying, and the tokens to decode of compression.

The models are those of `ess_effects.py`, with gated, weighted and plain linear attention (GLA, WLA,
LA) and softmax attention (SA). They vary in the mixer, the state-size and kv. This benchmark trains
them on selective copying and compression. The trainings on recall are those of `ess_effects.py`.

    python benchmarks/ess_tasks.py [--seeds N] [--runs FOLDER]

The result of every training is stored in the folder `--runs`. If the benchmark is interrupted, the
same command continues it. `--document` writes the tables, and `--figures` writes the figure.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._ess_trainings import (
    COLOURS,
    MIXERS,
    SIZES,
    Run,
    Setting,
    averages,
    benchmark,
    correlations,
    finish,
)
from benchmarks._pages import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {"recall": "recall", "copying": "selective copying", "compression": "compression"}
TRAINED = ("copying", "compression")
COMPARED = ("GLA", "WLA", "LA", "SA")
RECALL = Path(__file__).parent / "results/ess_effects_recall.json"
STATES = (4, 16)
WIDTHS = (16, 64)  # of the keys of softmax attention
ITEMS = {"copying": (4, 8), "compression": (3, 4)}
STEPS = {"copying": 250, "compression": 400}
RATES = {"compression": 4e-3}  # learning rates that differ from those of recall
LENGTH = 24  # of selective copying


def settings(seeds: int, quick: bool) -> list[Setting]:
    """List all trainings, seed by seed."""
    return [
        Setting(
            task=task,
            mixer=mixer,
            state=n,
            pairs=items,
            length=items + 1 if task == "compression" else LENGTH,
            steps=2 if quick else STEPS[task],
            seed=seed,
            rate=RATES.get(task),
        )
        for seed in range(seeds)
        for task in TRAINED
        for items in ITEMS[task]
        for mixer in COMPARED
        for n in (WIDTHS if mixer == "SA" else STATES)
    ]


def of_task(runs: Sequence[Run], task: str) -> list[Run]:
    """Return the trainings on a task; those on recall are read from its results."""
    if task == "recall":
        found: list[Run] = json.loads(RECALL.read_text(encoding="utf-8"))["runs"]
        return found
    return [run for run in runs if run["task"] == task]


def blocks(runs: Sequence[Run]) -> Mapping[str, str]:
    """Make the table of correlations, over all trainings on a task and for each kv, and accuracies.

    All mixers share a row of correlations, because each has few trainings.
    """
    rows = []
    for task, name in NAMES.items():
        found = correlations(of_task(runs, task))
        for group, row in found.items():
            if group in MIXERS:
                continue  # too few trainings
            values = (
                f"{row[f'{kind}_{size}']:.2f}" for kind in ("spearman", "pearson") for size in SIZES
            )
            items = group.removeprefix("all, ").removesuffix(" pairs")
            rows.append([name if group == "all" else "", items, str(row["runs"]), *values])
    header = ["task", "kv", "trainings"]
    header += ["Spearman, ESS/kv", "TSS/kv", "Pearson, ESS/kv", "TSS/kv"]
    means = averages(runs, "label", "state", "task", "pairs")
    cells = {(r["label"], r["state"], r["task"], r["pairs"]): r for r in means}
    columns = [(task, items) for task in TRAINED for items in ITEMS[task]]
    accuracies = []
    for label, n in dict.fromkeys((row["label"], row["state"]) for row in means):
        chosen = [cells[(label, n, *column)] for column in columns]
        accuracies.append(
            [label, str(n), *(f"{c['accuracy']:.2f} ({c['ess']:.1f})" for c in chosen)]
        )
    accuracies.sort(key=lambda row: (COMPARED.index(row[0]), int(row[1])))
    head = ["mixer", "n", *(f"{NAMES[task]}, {items}" for task, items in columns)]
    return {"tasks": table(header, rows), "tasks accuracies": table(head, accuracies)}


def figures(runs: Sequence[Run]) -> Mapping[str, "Figure"]:
    """Draw accuracy against ESS and TSS per item, one column for each task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    grid: Any = figure.subplots(2, 3, sharey=True)
    for column, (task, name) in enumerate(NAMES.items()):
        some = of_task(runs, task)
        row = correlations(some)["all"]
        for axes, size in zip(grid[:, column], SIZES, strict=True):
            for label in COMPARED:
                found = [run for run in some if run["label"] == label]
                x = [run[size] / run["pairs"] for run in found]
                y = [run["accuracy"] for run in found]
                axes.scatter(x, y, s=14, color=COLOURS[label], label=label, alpha=0.8)
            axes.set_xscale("log", base=2)
            title = f"{name}: rank correlation {row[f'spearman_{size}']:.2f}"
            finish(axes, title, f"{size.upper()} / kv", "accuracy" if column == 0 else "")
    grid[0, 0].legend(fontsize=8, frameon=False)
    return {"ess_tasks": figure}


if __name__ == "__main__":
    benchmark("ess_tasks", __doc__, settings, blocks, figures)
