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
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._report import write
from gramian import effective_state_size, parameter_groups
from gramian.ess import theoretical_state_size
from gramian.memory import Observer, gate_regularizer
from gramian.mixers import LinearRecurrence, Mixer
from gramian.models import GramianConfig, GramianForCausalLM
from gramian.reports import save_figure
from gramian.tasks import IGNORED
from gramian.tasks.mqar import MQAR

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIXERS = {
    "GLA": "gated_linear_attention",
    "WLA": "weighted_linear_attention",
    "LA": "linear_attention",
    "SA": "softmax_attention",
    "S6": "s6",
    "GLA-S6": "gla_s6",
}
KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("GLA", {}),
    ("S6", {}),
    ("GLA-S6", {"normalization": 1.0}),
    ("GLA-S6", {}),
)
COLOURS = {"GLA": "#0072B2", "WLA": "#D55E00", "LA": "#009E73", "SA": "#777777"}
COLOURS |= {"S6": "#CC79A7", "GLA-S6, c = 1": "#E69F00", "GLA-S6, c = n": "#56B4E9"}
SIZES = ("ess", "tss")
VOCABULARY = 64
WIDTH = 64
BATCH = 32
FORGETFUL = {"GLA": 0.25, "WLA": 1 / 32}  # temperatures at which gates are near 0 before training
RATES = {"SA": 3e-3}  # learning rates that differ from `RATE`
RATE = 1e-2
LONGER = 1.5  # factor of the steps of softmax attention, and of the part regularizer
EVALUATED = 512  # sequences on which accuracy is measured
MEASURED = 16  # sequences × channels on which state-sizes are measured, at least one sequence
FACTORS = (1 / 16, 1 / 4, 1.0, 4.0, 16.0, 64.0)  # values of c in the part normalization
UNTRAINED = 5  # number of seeds of models that are measured without training

Run = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The settings of one training."""

    mixer: str
    state: int
    """The state size n, or the width of keys for softmax attention."""
    pairs: int
    length: int
    steps: int
    seed: int
    temperature: float = 16.0
    """The temperature of the gates of GLA and WLA."""
    normalization: float | None = None
    """The constant c of GLA-S6; None means n."""
    penalty: float = 0.0
    """The weight λ of the gate regulariser."""

    @property
    def label(self) -> str:
        if self.mixer != "GLA-S6":
            return self.mixer
        return f"GLA-S6, c = {'n' if self.normalization is None else f'{self.normalization:g}'}"


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


def model_of(setting: Setting) -> GramianForCausalLM:
    """Make a model of a convolution and the mixer, each followed by an MLP."""
    recurrence: dict[str, Any] = {"state_size": setting.state}
    if setting.mixer in ("GLA", "WLA"):
        recurrence["temperature"] = setting.temperature
    if setting.mixer == "GLA-S6":
        recurrence["normalization"] = setting.normalization
    if setting.mixer == "S6":
        recurrence["expand"] = 1
    attention = {"head_width": setting.state, "rotary_base": None}
    config = GramianConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_heads=1,
        mixers=["long_convolution", MIXERS[setting.mixer]],
        filter={"type": "rtf", "state_size": 4},
        max_position_embeddings=2048,
        attention=attention if setting.mixer == "SA" else None,
        linear_recurrence=None if setting.mixer == "SA" else recurrence,
        intermediate_size=WIDTH,
        tie_word_embeddings=False,
        initializer_range=WIDTH**-0.5,
        use_cache=False,
    )
    model = GramianForCausalLM(config)
    nn.init.normal_(model.get_input_embeddings().weight)
    return model


def tokens(
    setting: Setting, random: np.random.Generator, count: int, fewest: int
) -> tuple[Tensor, Tensor]:
    """Return inputs and labels (count, length) of sequences with at least ``fewest`` pairs."""
    rows = []
    for pairs in random.integers(fewest, setting.pairs + 1, size=count).tolist():
        task = MQAR(
            vocab_size=VOCABULARY, length=setting.length, pairs=pairs, random_non_queries=False
        )
        rows.append(task.row(random, "train"))
    x, y = (np.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    return torch.from_numpy(x), torch.from_numpy(y)


def answers(model: GramianForCausalLM, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits and the labels at the positions that have a label."""
    due = y != IGNORED
    return model.lm_head(model.model(x).last_hidden_state[due]), y[due]


def train(setting: Setting) -> Run:
    """Train a model, and return its accuracy, its state-sizes before and after, and its gates."""
    began = time.process_time()
    torch.manual_seed(setting.seed)
    held_out = tokens(setting, np.random.default_rng([setting.seed, 1]), EVALUATED, setting.pairs)
    model = model_of(setting)
    mixer = model.model.layers[1].mixer
    assert isinstance(mixer, Mixer)
    observer = Observer(model, type(mixer))
    before = after = state_sizes(model, observer, held_out[0][:MEASURED])
    if setting.steps:
        fit(setting, model, observer)
        after = state_sizes(model, observer, held_out[0][:MEASURED])
    with torch.no_grad():
        logits, values = answers(model, *held_out)
        accuracy = float((logits.argmax(-1) == values).double().mean())
    return {
        **asdict(setting),
        "label": setting.label,
        "accuracy": accuracy,
        **after,
        "ess_before": before["ess"],
        "curve_before": before["curve"],
        "seconds": time.process_time() - began,
    }


def fit(setting: Setting, model: GramianForCausalLM, observer: Observer) -> None:
    """Train the model in place, by the settings."""
    random = np.random.default_rng([setting.seed, 0])
    rate = RATES.get(setting.mixer, RATE)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=rate, weight_decay=0.01))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps=setting.steps,
        pct_start=0.1,
        cycle_momentum=False,
    )
    for _ in range(setting.steps):
        logits, values = answers(model, *tokens(setting, random, BATCH, 1))
        loss = nn.functional.cross_entropy(logits, values)
        if setting.penalty:
            loss = loss + setting.penalty * gate_regularizer(observer.operators())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def state_sizes(model: GramianForCausalLM, observer: Observer, x: Tensor) -> Run:
    """Return the mixer's ESS, its mean at every position, TSS, and the gates' distance from 1."""
    model.model(x)
    (mixer,) = observer.mixers.values()
    heads = mixer.heads if isinstance(mixer, LinearRecurrence) else 1
    (system,) = observer.operators(sequences=max(1, MEASURED // heads))
    ess = effective_state_size(system)  # (sequences, heads, length)
    recurrent = isinstance(mixer, LinearRecurrence)
    return {
        "ess": float(ess.mean()),
        "curve": ess.mean((0, 1)).tolist(),
        "tss": float(theoretical_state_size(system).mean()),
        "gates_from_one": float(gate_regularizer(system)) if recurrent else None,
    }


def sweep(part: str, chosen: Sequence[Setting], folder: Path) -> list[Run]:
    """Run all trainings that have no result yet, and return the results of all, in order."""
    path = folder / f"{part}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    kept: dict[Setting, Run] = {}
    names = Setting.__dataclass_fields__
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            run = json.loads(line)
            kept[Setting(**{name: run[name] for name in names})] = run
    for number, setting in enumerate(chosen, 1):
        if setting in kept:
            continue
        run = kept[setting] = train(setting)
        with path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(run) + "\n")
        print(
            f"{number}/{len(chosen)} {setting.label}, n = {setting.state}, {setting.pairs} pairs, "
            f"penalty {setting.penalty:g}, seed {setting.seed}: accuracy {run['accuracy']:.3f}, "
            f"ESS {run['ess_before']:.2f} -> {run['ess']:.2f} of {run['tss']:.1f}, "
            f"{run['seconds']:.0f} s",
            flush=True,
        )
    return [kept[setting] for setting in chosen]


def correlations(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Return the correlations of accuracy with ESS and with TSS per pair.

    They are computed over all runs, over those of each mixer, and over those of each number of
    pairs.
    """
    groups = {"all": list(runs)}
    for run in sorted(runs, key=lambda run: list(MIXERS).index(run["label"])):
        groups.setdefault(run["label"], []).append(run)
    for run in sorted(runs, key=lambda run: run["pairs"]):
        groups.setdefault(f"all, {run['pairs']} pairs", []).append(run)
    found = {}
    for name, some in groups.items():
        accuracy = [run["accuracy"] for run in some]
        row: dict[str, float] = {"runs": len(some)}
        for size in SIZES:
            ratio = [run[size] / run["pairs"] for run in some]
            row[f"spearman_{size}"] = float(spearmanr(ratio, accuracy).statistic)
            row[f"pearson_{size}"] = float(pearsonr(ratio, accuracy).statistic)
        found[name] = row
    return found


def averages(runs: Sequence[Run], *by: str) -> list[Run]:
    """Return the means of all measurements over the seeds, one row for each value of ``by``."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run[name] for name in by), []).append(run)
    rows = []
    for key, some in groups.items():
        row: Run = dict(zip(by, key, strict=True))
        for name in ("accuracy", "ess", "ess_before", "tss", "gates_from_one"):
            values = [run[name] for run in some if run[name] is not None]
            row[name] = mean(values) if values else None
        row["accuracies"] = [run["accuracy"] for run in some]
        rows.append(row)
    return rows


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f} ({min(values):.3f} … {max(values):.3f})"


def recall_table(runs: Sequence[Run]) -> str:
    rows = [
        [
            name,
            str(row["runs"]),
            *(f"{row[f'{kind}_{s}']:.2f}" for kind in ("spearman", "pearson") for s in SIZES),
        ]
        for name, row in correlations(runs).items()
    ]
    first = markdown(
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
    return f"{first}\n\n{markdown(['mixer', 'n', *(f'{p} pairs' for p in pairs)], rows)}"


def state_table(runs: Sequence[Run]) -> str:
    """Make the tables of ESS before training against n, and of the trained models."""
    before = averages([run for run in runs if not run["steps"]], "label", "state")
    after = averages([run for run in runs if run["steps"]], "label", "state")
    sizes = list(dict.fromkeys(row["state"] for row in before))
    cells = {(row["label"], row["state"]): row["ess"] for row in before}
    labels = dict.fromkeys(row["label"] for row in before)
    first = markdown(
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
    return f"{first}\n\n{markdown(header, rows)}"


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
    return markdown(["c", "ESS before training", "after", "accuracy"], rows)


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
    return markdown(
        ["mixer", "λ", "‖A - I‖ after", "ESS before training", "after", "accuracy"], rows
    )


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
            _finish(
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
        _finish(left, "Before training, 15 pairs", "state n", "ESS")
        _finish(right, "After training, 8 pairs", "state n", "ESS")
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
            _finish(axes, f"{name} after training", "λ", name)
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
        _curve(axes, run["curve"], COLOURS["LA"], "ESS")
        axes.axhline(n, color="black", linewidth=1, linestyle=":", label=f"TSS = {n}")
        _finish(axes, f"n = {n}: accuracy {run['accuracy']:.2f}", "position", "state-size")
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
            _curve(axes, run["curve"], colour, name)
        axes.axhline(bare["state"], color="black", linewidth=1, linestyle=":", label="TSS")
        axes.set_ylim(0, 1.5 * bare["state"])
        _finish(axes, label, "position", "state-size")
        axes.legend(fontsize=8, frameon=False)
    return figure


def _curve(axes: Any, curve: Sequence[float], colour: str, label: str) -> None:
    """Draw ESS against the position i, and its upper bound min(i, L - i) in grey."""
    length = len(curve)
    positions = range(length)
    axes.plot(positions, curve, color=colour, label=label)
    cap = [min(i, length - i) for i in positions]
    axes.plot(positions, cap, color="#BBBBBB", linewidth=0.8, zorder=0)


def _finish(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, alpha=0.25, linewidth=0.5)


SEEDS = {"recall": 2, "state": 2, "normalization": 3, "regularizer": 3}
TABLES = {
    "recall": recall_table,
    "state": state_table,
    "normalization": normalization_table,
    "regularizer": regularizer_table,
}


def document(path: Path, part: str, table: str) -> None:
    """Put a table between the marks ``<!-- part -->`` and ``<!-- /part -->`` of a Markdown page."""
    text = path.read_text(encoding="utf-8")
    opening, closing = f"<!-- {part} -->\n", f"<!-- /{part} -->"
    before, found, rest = text.partition(opening)
    _, ended, after = rest.partition(closing)
    if not found or not ended:
        raise SystemExit(f"{path} has no place for a table between {opening!r} and {closing!r}.")
    path.write_text(before + opening + table + "\n" + closing + after, encoding="utf-8")


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
        table = TABLES[part](runs)
        print(table)
        kept = [{k: v for k, v in run.items() if not k.startswith("curve")} for run in runs]
        results = {"seconds": sum(run["seconds"] for run in runs), "runs": kept}
        if part == "recall":
            results["correlations"] = correlations(runs)
        write(arguments.output / f"ess_effects_{part}.json", results)
        if arguments.document is not None:
            document(arguments.document, part, table)
        if arguments.figures is not None and part != "normalization":
            for name, figure in figures_of(part, runs).items():
                save_figure(figure, arguments.figures / f"{name}.png")


if __name__ == "__main__":
    main()
