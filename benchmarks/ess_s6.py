"""Does S6 fail at recall that GLA and GLA-S6 learn, even if it is trained longer?

Parnichkun et al. 2025 (arXiv 2504.19561, section 5.1) find that S6 fails at multi-query associative
recall, where gated linear attention (GLA) and GLA-S6 learn it, and explain this by the effective
state-size before training, which hardly grows with the state of S6.

The models are those of `ess_effects.py`. S6 is trained three times as long as GLA and GLA-S6, at
two learning rates.

    python benchmarks/ess_s6.py [--seeds N] [--runs FOLDER]

The result of every training is stored in the folder `--runs`. If the benchmark is interrupted, the
same command continues it. `--document` writes the table, and `--figures` writes the figure.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._ess_trainings import (
    COLOURS,
    RATE,
    Run,
    Setting,
    averages,
    benchmark,
    finish,
    spread,
)
from benchmarks._pages import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATE = 16
PAIRS = 4
LENGTH = 32
STEPS = 400
LONGER = 3  # factor of the steps of S6
CASES = (  # mixer, layers, learning rate
    ("S6", 1, 3e-3),
    ("S6", 1, 1e-2),
    ("GLA", 1, RATE),
    ("GLA-S6", 1, RATE),
)


def settings(seeds: int, quick: bool) -> list[Setting]:
    """List all trainings, seed by seed."""
    return [
        Setting(
            mixer=mixer,
            state=STATE,
            pairs=PAIRS,
            length=LENGTH,
            steps=2 if quick else STEPS * (LONGER if mixer == "S6" else 1),
            seed=seed,
            layers=layers,
            rate=rate,
        )
        for seed in range(seeds)
        for mixer, layers, rate in CASES
    ]


def blocks(runs: Sequence[Run]) -> Mapping[str, str]:
    """Make the table of ESS and accuracy for each mixer, number of layers and learning rate."""
    rows = [
        [
            row["label"],
            str(row["layers"]),
            f"{row['rate']:g}",
            str(row["steps"]),
            f"{row['ess_before']:.2f}",
            f"{row['ess']:.2f}",
            spread(row["accuracies"]),
        ]
        for row in averages(runs, "label", "layers", "rate", "steps")
    ]
    header = ["mixer", "layers", "learning rate", "steps", "ESS before training", "after"]
    return {"s6": table([*header, "accuracy"], rows)}


def figures(runs: Sequence[Run]) -> Mapping[str, "Figure"]:
    """Draw accuracy against ESS after training, one point for each training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    groups: dict[str, list[Run]] = {}
    for run in runs:
        name = f"{run['label']}, {run['layers']} layer{'s' * (run['layers'] > 1)}"
        groups.setdefault(name, []).append(run)
    for name, some in groups.items():
        x, y = [run["ess"] for run in some], [run["accuracy"] for run in some]
        marker = "s" if some[0]["layers"] > 1 else "o"
        axes.scatter(x, y, s=28, marker=marker, color=COLOURS[some[0]["label"]], label=name)
    axes.axhline(1 / PAIRS, color="black", linewidth=1, linestyle=":", label="1 / pairs")
    finish(axes, f"{PAIRS} pairs, {STATE} states", "ESS after training", "accuracy")
    axes.legend(fontsize=8, frameon=False)
    return {"ess_s6": figure}


if __name__ == "__main__":
    benchmark("ess_s6", __doc__, settings, blocks, figures)
