"""Small models that learn recall, selective copying or compression, and the state that they use.

The benchmarks of effective state-size train them; `ess_effects.py` describes the models.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._pages import fill_marks
from benchmarks._report import write
from gramian import effective_state_size, parameter_groups
from gramian.ess import theoretical_state_size
from gramian.memory import Observer, gate_regularizer
from gramian.mixers import LinearRecurrence, Mixer
from gramian.models import GramianConfig, GramianForCausalLM, GramianForReconstruction
from gramian.reports import save_figure
from gramian.tasks import IGNORED
from gramian.tasks.mad import Compression, SelectiveCopying
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
COLOURS = {"GLA": "#0072B2", "WLA": "#D55E00", "LA": "#009E73", "SA": "#777777"}
COLOURS |= {"S6": "#CC79A7", "GLA-S6, c = 1": "#E69F00", "GLA-S6, c = n": "#56B4E9"}
SIZES = ("ess", "tss")
VOCABULARY = 64
TOKENS = 16  # vocabulary of selective copying and of compression
WIDTH = 64
BATCH = 32
RATES = {"SA": 3e-3}  # learning rates that differ from `RATE`
RATE = 1e-2
EVALUATED = 512  # sequences on which accuracy is measured
MEASURED = 16  # sequences × channels on which state-sizes are measured, at least one sequence

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
    task: str = "recall"
    """"recall", "copying" or "compression"; `pairs` counts the tokens of the last two."""
    layers: int = 1
    """The number of layers with the mixer."""
    rate: float | None = None
    """The learning rate; None means that of the mixer in `RATES`, or `RATE`."""

    @property
    def label(self) -> str:
        if self.mixer != "GLA-S6":
            return self.mixer
        return f"GLA-S6, c = {'n' if self.normalization is None else f'{self.normalization:g}'}"


def model_of(setting: Setting) -> GramianForCausalLM | GramianForReconstruction:
    """Make a model of a convolution and the mixers, each followed by an MLP."""
    recurrence: dict[str, Any] = {"state_size": setting.state}
    if setting.mixer in ("GLA", "WLA"):
        recurrence["temperature"] = setting.temperature
    if setting.mixer == "GLA-S6":
        recurrence["normalization"] = setting.normalization
    if setting.mixer == "S6":
        recurrence["expand"] = 1
    attention = {"head_width": setting.state, "rotary_base": None}
    config = GramianConfig(
        vocab_size=VOCABULARY if setting.task == "recall" else TOKENS,
        hidden_size=WIDTH,
        num_hidden_layers=1 + setting.layers,
        num_heads=1,
        mixers=["long_convolution", *[MIXERS[setting.mixer]] * setting.layers],
        filter={"type": "rtf", "state_size": 4},
        max_position_embeddings=2048,
        attention=attention if setting.mixer == "SA" else None,
        linear_recurrence=None if setting.mixer == "SA" else recurrence,
        intermediate_size=WIDTH,
        tie_word_embeddings=False,
        initializer_range=WIDTH**-0.5,
        use_cache=False,
        pooling="last" if setting.task == "compression" else "mean",
    )
    reconstructs = setting.task == "compression"
    model = (GramianForReconstruction if reconstructs else GramianForCausalLM)(config)
    nn.init.normal_(model.get_input_embeddings().weight)
    return model


def task_of(setting: Setting, pairs: int) -> MQAR | SelectiveCopying | Compression:
    """Return the task whose sequences have `pairs` pairs, or tokens to copy or to decode."""
    if setting.task == "recall":
        return MQAR(
            vocab_size=VOCABULARY, length=setting.length, pairs=pairs, random_non_queries=False
        )
    if setting.task == "copying":
        return SelectiveCopying(vocab_size=TOKENS, length=setting.length, tokens=pairs)
    return Compression(vocab_size=TOKENS, length=pairs + 1)


def tokens(
    setting: Setting, random: np.random.Generator, count: int, fewest: int
) -> tuple[Tensor, Tensor]:
    """Return inputs and labels (count, length) of sequences with at least ``fewest`` pairs.

    Sequences of compression have all tokens, so that they have one length.
    """
    if setting.task == "compression":
        fewest = setting.pairs
    numbers = random.integers(fewest, setting.pairs + 1, size=count)
    rows = [task_of(setting, pairs).row(random, "train") for pairs in numbers.tolist()]
    x, y = (np.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    if setting.task == "compression":
        y[:, -1] = IGNORED  # the mark
    return torch.from_numpy(x), torch.from_numpy(y)


def answers(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits and the labels at the positions that have a label."""
    due = y != IGNORED
    if isinstance(model, GramianForReconstruction):
        return model(x).logits[due], y[due]
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


class Descent:
    """AdamW for one model, with one cycle of the learning rate and clipped gradients.

    Args:
        model: the model, whose parameters are changed in place.
        rate: the highest learning rate, which is reached after a tenth of the steps.
        steps: the number of steps.
    """

    def __init__(self, model: nn.Module, rate: float, steps: int) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(parameter_groups(model, lr=rate, weight_decay=0.01))
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            [group["lr"] for group in self.optimizer.param_groups],
            total_steps=steps,
            pct_start=0.1,
            cycle_momentum=False,
        )

    def step(self, loss: Tensor) -> None:
        """Take one step down the gradient of the loss, a scalar."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()


def fit(setting: Setting, model: nn.Module, observer: Observer) -> None:
    """Train the model in place, by the settings."""
    random = np.random.default_rng([setting.seed, 0])
    rate = RATES.get(setting.mixer, RATE) if setting.rate is None else setting.rate
    descent = Descent(model, rate, setting.steps)
    for _ in range(setting.steps):
        logits, values = answers(model, *tokens(setting, random, BATCH, 1))
        loss = nn.functional.cross_entropy(logits, values)
        if setting.penalty:
            loss = loss + setting.penalty * gate_regularizer(observer.operators())
        descent.step(loss)


@torch.no_grad()
def state_sizes(model: Any, observer: Observer, x: Tensor) -> Run:
    """Return the mixers' ESS, its mean at every position, TSS, and the gates' distance from 1."""
    model.model(x)
    mixers = list(observer.mixers.values())
    recurrent = isinstance(mixers[0], LinearRecurrence)
    heads = mixers[0].heads if recurrent else 1
    systems = list(observer.operators(sequences=max(1, MEASURED // heads)))
    ess = torch.stack([effective_state_size(system) for system in systems])
    tss = [float(theoretical_state_size(system).mean()) for system in systems]
    return {
        "ess": float(ess.mean()),
        "curve": ess.flatten(0, -2).mean(0).tolist(),
        "tss": mean(tss),
        "gates_from_one": float(gate_regularizer(systems)) if recurrent else None,
    }


def sweep(part: str, chosen: Sequence[Setting], folder: Path) -> list[Run]:
    """Run all trainings that have no result yet, and return the results of all, in order."""
    path = folder / f"{part}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    kept: dict[Setting, Run] = {}
    names = [field.name for field in fields(Setting)]
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            run = json.loads(line)
            kept[Setting(**{name: run[name] for name in names if name in run})] = run
    for number, setting in enumerate(chosen, 1):
        if setting in kept:
            continue
        run = kept[setting] = train(setting)
        with path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(run) + "\n")
        print(
            f"{number}/{len(chosen)} {setting.task}, {setting.label}, n = {setting.state}, "
            f"{setting.pairs} pairs, {setting.layers} layers, "
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
            for name_of, function in (("spearman", spearmanr), ("pearson", pearsonr)):
                known = len(set(ratio)) > 1 and len(set(accuracy)) > 1  # else it is undefined
                row[f"{name_of}_{size}"] = (
                    float(function(ratio, accuracy).statistic) if known else float("nan")
                )
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


def spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f} ({min(values):.3f} … {max(values):.3f})"


def draw_curve(axes: Any, curve: Sequence[float], colour: str, label: str) -> None:
    """Draw ESS against the position i, and its upper bound min(i, L - i) in grey."""
    length = len(curve)
    positions = range(length)
    axes.plot(positions, curve, color=colour, label=label)
    cap = [min(i, length - i) for i in positions]
    axes.plot(positions, cap, color="#BBBBBB", linewidth=0.8, zorder=0)


def finish(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, alpha=0.25, linewidth=0.5)


def benchmark(
    name: str,
    description: str,
    settings: Callable[[int, bool], list[Setting]],
    blocks: Callable[[Sequence[Run]], Mapping[str, str]],
    figures: Callable[[Sequence[Run]], Mapping[str, Figure]],
) -> None:
    """Run the command line of a benchmark: train what is missing, and write the results.

    Args:
        name: The name of the JSON file, and of the file of trainings in the folder `--runs`.
        description: The text of `--help`.
        settings: Returns all trainings, from the number of seeds and whether to be quick.
        blocks: Returns the tables of the page by the names of their marks.
        figures: Returns the figures by their names.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="Train for two steps each.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/ess_effects"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--document", type=Path, help="Page with marks for the tables.")
    parser.add_argument("--figures", type=Path, help="Folder for the figures.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs = sweep(name, settings(arguments.seeds, arguments.quick), arguments.runs)
    tables = blocks(runs)
    print("\n\n".join(tables.values()))
    kept = [{k: v for k, v in run.items() if not k.startswith("curve")} for run in runs]
    results = {"seconds": sum(run["seconds"] for run in runs), "runs": kept}
    write(arguments.output / f"{name}.json", results)
    if arguments.document is not None:
        page = arguments.document.read_text(encoding="utf-8")
        arguments.document.write_text(fill_marks(page, tables), encoding="utf-8")
    if arguments.figures is not None:
        arguments.figures.mkdir(parents=True, exist_ok=True)
        for title, figure in figures(runs).items():
            save_figure(figure, arguments.figures / f"{title}.png")
