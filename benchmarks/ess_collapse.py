"""Do the states of GLA and WLA collapse in hard recall, and does a regularizer lift them above LA?

Parnichkun et al. 2025 (arXiv 2504.19561) find that gated and weighted linear attention (GLA, WLA)
use little of their state in hard multi-query associative recall, that the penalty `λ ‖A - I‖`
prevents this collapse, and that the regularized models then beat linear attention (LA), whose gates
are 1. Here the gates have their ordinary temperature, so that nothing plants a collapse.

The models are those of `ess_effects.py`. Sequences have 15 pairs, nearly as many as the 16 states.
GLA and WLA are trained without the penalty, and with it at two λ.

    python benchmarks/ess_collapse.py [--seeds N] [--runs FOLDER]

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

COMPARED = ("LA", "GLA", "WLA")
HARD = 15
STATE = 32
LENGTH = 62
STEPS = 400
PENALTIES = (0.1, 1.0)


def settings(seeds: int, quick: bool) -> list[Setting]:
    """List all trainings, seed by seed."""
    cases = [(mixer, 0.0) for mixer in COMPARED]
    cases += [(mixer, penalty) for penalty in PENALTIES for mixer in COMPARED[1:]]
    return [
        Setting(
            mixer=mixer,
            state=STATE,
            pairs=HARD,
            length=LENGTH,
            steps=2 if quick else STEPS,
            seed=seed,
            penalty=penalty,
        )
        for seed in range(seeds)
        for mixer, penalty in cases
    ]


def blocks(runs: Sequence[Run]) -> Mapping[str, str]:
    """Make the table of ESS and accuracy for each mixer and λ."""
    rows = averages(runs, "label", "penalty")
    rows.sort(key=lambda row: (COMPARED.index(row["label"]), row["penalty"]))
    cells = [
        [
            row["label"],
            f"{row['penalty']:g}",
            f"{row['gates_from_one']:.3f}",
            f"{row['ess_before']:.2f}",
            f"{row['ess']:.2f}",
            f"{100 * row['ess'] / row['tss']:.0f} %",
            spread(row["accuracies"]),
        ]
        for row in rows
    ]
    header = ["mixer", "λ", "‖A - I‖ after", "ESS before training", "after", "of TSS"]
    return {"collapse": table([*header, "accuracy"], cells)}


def figures(runs: Sequence[Run]) -> Mapping[str, "Figure"]:
    """Draw accuracy against ESS for every training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    markers = dict(zip((0.0, *PENALTIES), "ov^", strict=True))
    for label in COMPARED:
        for penalty, marker in markers.items():
            some = [run for run in runs if (run["label"], run["penalty"]) == (label, penalty)]
            if some:
                x, y = [run["ess"] for run in some], [run["accuracy"] for run in some]
                name = label if label == "LA" else f"{label}, λ = {penalty:g}"
                hollow = {} if penalty else {"facecolors": "none"}
                colour = {"edgecolors": COLOURS[label]} if hollow else {"color": COLOURS[label]}
                axes.scatter(x, y, s=28, marker=marker, label=name, **hollow, **colour)
    finish(axes, f"{HARD} pairs, {STATE} states", "ESS", "accuracy")
    axes.legend(fontsize=7, frameon=False, ncols=2)
    return {"ess_collapse": figure}


if __name__ == "__main__":
    benchmark("ess_collapse", __doc__, settings, blocks, figures)
