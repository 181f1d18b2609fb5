"""Does the state that a model uses explain its recall better than the state that it has?

Small models learn multi-query associative recall. Each model has a time-invariant convolution and
then one mixer. The effective state-size (entropy-ESS) of the mixer is measured on held-out
sequences. Each part looks for one of three effects in Parnichkun et al. 2025 (arXiv 2504.19561):

- recall: is accuracy correlated more with ESS per key-value pair than with the theoretical
  state-size (TSS) per pair? The runs vary the mixer, the state-size and the number of pairs. The
  mixers are gated, weighted and plain linear attention (GLA, WLA, LA) and softmax attention (SA).
- state: if the state grows, does the ESS of S6 stall while the ESS of GLA grows, and does GLA-S6's
  normalisation of its rates repair this?
- normalization: if the factor c that divides GLA-S6's rates is swept, does a larger c give a larger
  ESS before training, and a higher accuracy after it?
- regularizer: does the penalty λ‖A - I‖ improve GLA and WLA models whose gates forget too fast?

Every training is short. Each batch contains new sequences, of between one pair and all pairs, so
that the model begins to learn early. Accuracy and ESS are measured on sequences with all pairs. ESS
is averaged over positions, heads and sequences. All results are written, whatever they are.

    python benchmarks/ess_effects.py [--part PART] [--seeds N] [--runs FOLDER]

The result of every training is stored in the folder `--runs`. If the benchmark is interrupted, the
same command continues it. `--document` writes the tables, and `--figures` writes the figures.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._ess_trainings import (
    COLOURS,
    MIXERS,
    SIZES,
    Run,
    Setting,
    averages,
    correlations,
    draw_curve,
    finish,
    spread,
    sweep,
)
from benchmarks._pages import fill_marks, table
from benchmarks._report import write
from gramian.reports import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("GLA", {}),
    ("S6", {}),
    ("GLA-S6", {"normalization": 1.0}),
    ("GLA-S6", {}),
)
FORGETFUL = {"GLA": 0.25, "WLA": 1 / 32}  # temperatures at which gates are near 0 before training
LONGER = 1.5  # factor of the steps of softmax attention, and of the part regularizer
FACTORS = (1 / 16, 1 / 4, 1.0, 4.0, 16.0, 64.0)  # values of c in the part normalization
UNTRAINED = 5  # number of seeds of models that are measured without training


def settings(part: str, steps: int, seeds: int) -> list[Setting]:
    """List all trainings of a part, seed by seed, so that an early stop leaves whole seeds."""
    found: list[Setting] = []
    if part == "state":
        found += [
            Setting(mixer=mixer, state=n, pairs=15, length=62, steps=0, seed=seed, **options)
            for seed in range(UNTRAINED)
            for n in (4, 8, 16, 32, 64)
            for mixer, options in KINDS
        ]
    more = round(LONGER * steps)
    for seed in range(seeds):
        common: dict[str, Any]
        if part == "recall":
            for pairs in (8, 4, 2):
                common = {"pairs": pairs, "length": 32, "seed": seed}
                for n in (2, 4, 8, 16):
                    found += [
                        Setting(mixer=mixer, state=n, steps=steps, **common)
                        for mixer in ("GLA", "WLA", "LA")
                    ]
                    found.append(Setting(mixer="SA", state=4 * n, steps=more, **common))
        elif part == "state":
            found += [
                Setting(mixer=m, state=n, pairs=8, length=62, steps=steps, seed=seed, **options)
                for n in (4, 8, 16, 32)
                for m, options in KINDS
            ]
        elif part == "normalization":
            common = {"mixer": "GLA-S6", "state": 32, "pairs": 8, "length": 62}
            found += [
                Setting(steps=steps, seed=seed, normalization=factor, **common)
                for factor in FACTORS
            ]
        else:
            found += [
                Setting(
                    mixer=mixer,
                    state=16,
                    pairs=8,
                    length=32,
                    steps=more,
                    seed=seed,
                    temperature=temperature,
                    penalty=penalty,
                )
                for penalty in (0.0, 0.1, 1.0, 0.03, 0.3)
                for mixer, temperature in FORGETFUL.items()
            ]
    return found


def recall_table(runs: Sequence[Run]) -> str:
    rows = [
        [
            name,
            str(row["runs"]),
            *(f"{row[f'{kind}_{s}']:.2f}" for kind in ("spearman", "pearson") for s in SIZES),
        ]
        for name, row in correlations(runs).items()
    ]
    first = table(
        ["", "trainings", "Spearman, ESS/kv", "TSS/kv", "Pearson, ESS/kv", "TSS/kv"], rows
    )
    by = averages(runs, "label", "state", "pairs")
    pairs = sorted({row["pairs"] for row in by})
    cells = {(row["label"], row["state"], row["pairs"]): row for row in by}
    rows = []
    for label, n in dict.fromkeys((row["label"], row["state"]) for row in by):
        found = [cells[label, n, count] for count in pairs]
        rows.append([label, str(n), *(f"{c['accuracy']:.2f} ({c['ess']:.1f})" for c in found)])
    rows.sort(key=lambda row: (list(MIXERS).index(row[0]), int(row[1])))
    return f"{first}\n\n{table(['mixer', 'n', *(f'{p} pairs' for p in pairs)], rows)}"


def state_table(runs: Sequence[Run]) -> str:
    """Make the tables of ESS before training against n, and of the trained models."""
    before = averages([run for run in runs if not run["steps"]], "label", "state")
    after = averages([run for run in runs if run["steps"]], "label", "state")
    sizes = list(dict.fromkeys(row["state"] for row in before))
    cells = {(row["label"], row["state"]): row["ess"] for row in before}
    labels = dict.fromkeys(row["label"] for row in before)
    first = table(
        ["before training", *(f"n = {n}" for n in sizes)],
        [[label, *(f"{cells[label, n]:.2f}" for n in sizes)] for label in labels],
    )
    rows = [
        [
            row["label"],
            str(row["state"]),
            f"{row['ess_before']:.2f}",
            f"{row['ess']:.2f}",
            f"{100 * row['ess'] / row['tss']:.0f} %",
            spread(row["accuracies"]),
        ]
        for row in sorted(after, key=_label_order)
    ]
    header = ["trained", "n = TSS", "ESS before", "after", "of TSS", "accuracy"]
    return f"{first}\n\n{table(header, rows)}"


def normalization_table(runs: Sequence[Run]) -> str:
    """Make the table of ESS and accuracy against GLA-S6's factor, which has one row for each."""
    rows = [
        [
            f"{row['normalization']:g}",
            f"{row['ess_before']:.2f}",
            f"{row['ess']:.2f}",
            spread(row["accuracies"]),
        ]
        for row in averages(runs, "normalization")
    ]
    return table(["c", "ESS before training", "after", "accuracy"], rows)


def regularizer_table(runs: Sequence[Run]) -> str:
    rows = [
        [
            row["label"],
            f"{row['penalty']:g}",
            f"{row['gates_from_one']:.3f}",
            f"{row['ess_before']:.2f}",
            f"{row['ess']:.2f}",
            spread(row["accuracies"]),
        ]
        for row in sorted(averages(runs, "label", "penalty"), key=_label_order)
    ]
    return table(["mixer", "λ", "‖A - I‖ after", "ESS before training", "after", "accuracy"], rows)


def _label_order(row: Run) -> tuple[int, float]:
    return list(COLOURS).index(row["label"]), row.get("state", row.get("penalty", 0))


def figures_of(part: str, runs: Sequence[Run]) -> dict[str, "Figure"]:
    """Draw the figures of a part other than normalization, and return them by name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    figures = {f"ess_{part}": figure}
    if part == "recall":
        for axes, size in ((left, "ess"), (right, "tss")):
            for label in MIXERS:
                some = [run for run in runs if run["label"] == label]
                if some:
                    x = [run[size] / run["pairs"] for run in some]
                    y = [run["accuracy"] for run in some]
                    axes.scatter(x, y, s=18, color=COLOURS[label], label=label, alpha=0.8)
            row = correlations(runs)["all"]
            finish(
                axes,
                f"{size.upper()}: rank correlation {row[f'spearman_{size}']:.2f}",
                f"{size.upper()} / number of pairs",
                "accuracy",
            )
            axes.set_xscale("log", base=2)
        left.legend(fontsize=8, frameon=False)
        figures["memory_saturation"] = saturation(runs)
    elif part == "state":
        for axes, trained in ((left, False), (right, True)):
            rows = averages(
                [run for run in runs if (run["steps"] > 0) == trained], "label", "state"
            )
            for label in dict.fromkeys(row["label"] for row in rows):
                some = [row for row in rows if row["label"] == label]
                n, y = [row["state"] for row in some], [row["ess"] for row in some]
                axes.plot(n, y, "o-", color=COLOURS[label], ms=4, label=label)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
        finish(left, "Before training, 15 pairs", "state n", "ESS")
        finish(right, "After training, 8 pairs", "state n", "ESS")
        left.legend(fontsize=8, frameon=False)
    else:
        rows = averages(runs, "label", "penalty")
        places = sorted({row["penalty"] for row in rows})
        for label in dict.fromkeys(row["label"] for row in rows):
            some = sorted((r for r in rows if r["label"] == label), key=lambda r: r["penalty"])
            at = [places.index(row["penalty"]) for row in some]
            for axes, name in ((left, "ess"), (right, "accuracy")):
                y = [row[name] for row in some]
                axes.plot(at, y, "o-", color=COLOURS[label], ms=4, label=label)
        for axes, name in ((left, "ESS"), (right, "accuracy")):
            axes.set_xticks(range(len(places)), [f"{place:g}" for place in places])
            finish(axes, f"{name} after training", "λ", name)
        left.legend(fontsize=8, frameon=False)
        figures["memory_collapse"] = collapse(runs)
    return figures


def saturation(runs: Sequence[Run]) -> "Figure":
    """Draw the ESS of linear attention at every position, with little and with enough state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, n in zip(figure.subplots(1, 2, sharey=True), (4, 16), strict=True):
        (run,) = (
            r for r in runs if (r["label"], r["state"], r["pairs"], r["seed"]) == ("LA", n, 8, 0)
        )
        draw_curve(axes, run["curve"], COLOURS["LA"], "ESS")
        axes.axhline(n, color="black", linewidth=1, linestyle=":", label=f"TSS = {n}")
        finish(axes, f"n = {n}: accuracy {run['accuracy']:.2f}", "position", "state-size")
        axes.legend(fontsize=8, frameon=False)
    return figure


def collapse(runs: Sequence[Run]) -> "Figure":
    """Draw the ESS of GLA and WLA with gates near 0, without and with the regularizer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, label in zip(figure.subplots(1, 2, sharey=True), FORGETFUL, strict=True):
        some = [run for run in runs if run["label"] == label and run["seed"] == 0]
        bare = next(run for run in some if not run["penalty"])
        best = max((run for run in some if run["penalty"]), key=lambda run: run["accuracy"])
        for run, colour in ((bare, "#777777"), (best, COLOURS[label])):
            name = f"λ = {run['penalty']:g}: accuracy {run['accuracy']:.2f}"
            draw_curve(axes, run["curve"], colour, name)
        axes.axhline(bare["state"], color="black", linewidth=1, linestyle=":", label="TSS")
        axes.set_ylim(0, 1.5 * bare["state"])
        finish(axes, label, "position", "state-size")
        axes.legend(fontsize=8, frameon=False)
    return figure


SEEDS = {"recall": 2, "state": 2, "normalization": 3, "regularizer": 3}
TABLES = {
    "recall": recall_table,
    "state": state_table,
    "normalization": normalization_table,
    "regularizer": regularizer_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--part", choices=TABLES, help="Part to run; by default all.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, help=f"Number of seeds; by default {SEEDS}.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/ess_effects"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--document", type=Path, help="Page with marks for the tables.")
    parser.add_argument("--figures", type=Path, help="Folder for the figures.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for part in [arguments.part] if arguments.part else TABLES:
        seeds = SEEDS[part] if arguments.seeds is None else arguments.seeds
        runs = sweep(part, settings(part, arguments.steps, seeds), arguments.runs)
        found = TABLES[part](runs)
        print(found)
        kept = [{k: v for k, v in run.items() if not k.startswith("curve")} for run in runs]
        results = {"seconds": sum(run["seconds"] for run in runs), "runs": kept}
        if part == "recall":
            results["correlations"] = correlations(runs)
        write(arguments.output / f"ess_effects_{part}.json", results)
        if arguments.document is not None:
            page = arguments.document.read_text(encoding="utf-8")
            arguments.document.write_text(fill_marks(page, {part: found}), encoding="utf-8")
        if arguments.figures is not None and part != "normalization":
            for name, figure in figures_of(part, runs).items():
                save_figure(figure, arguments.figures / f"{name}.png")


if __name__ == "__main__":
    main()
