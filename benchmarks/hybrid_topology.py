"""Where in a hybrid should attention stand, and does the state in use of the layers tell why?

Hybrids of four layers learn multi-query associative recall. Three layers are gated linear attention
(GLA), whose state is too small for all pairs, and one is softmax attention (SA): the first, the
second, the third or the last. Parnichkun et al. 2025 (arXiv 2504.19561) find that the effective
state-size (ESS) of the layers explains why attention is better not the first. Four layers of GLA
are the control.

All mixers have one head. As in published hybrids, GLA has a short convolution, and attention has
none. Attention has no positions either, so that it sees the neighbors of a token only through the
layers before it. To tell this from other effects of the place, all hybrids are trained a second
time behind a layer with a convolution, which shows every mixer the neighbors.

Each batch contains new sequences, of between one pair and all pairs. Accuracy and ESS are measured
on held-out sequences with all pairs. ESS is averaged over positions and sequences.

    python benchmarks/hybrid_topology.py [--seeds N] [--runs FOLDER] [--quick]

The result of every training is stored in the folder `--runs`. If the benchmark is interrupted, the
same command continues it. `--document` writes the tables of `docs/results/hybrid_topology.md`, and
`--figures` the figure.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._ess_trainings import Descent, answers, finish, spread
from benchmarks._pages import fill_marks, table
from benchmarks._report import write
from gramian import effective_state_size
from gramian.memory import Observer
from gramian.mixers import Mixer
from gramian.models import GramianConfig, GramianForCausalLM
from gramian.reports import save_figure
from gramian.tasks.mqar import MQAR

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYERS = 4
PLACES = (1, 2, 3, 4, None)  # of attention, from 1; None stands for no attention
BEHIND = {False: "topology", True: "topology behind a convolution"}  # marks of the page
STEPS = {False: 600, True: 300}  # recall is learned sooner behind a convolution
VOCABULARY = 42
WIDTH = 64
INNER = 8  # width inside the MLPs: recall needs none, and large ones slow its learning
STATE = 2
PAIRS = 10
LENGTH = 40
BATCH = 32
RATE = 5e-3
EVALUATED = 256  # sequences on which accuracy is measured
MEASURED = 16  # sequences on which state-sizes are measured

Run = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """The settings of one training."""

    place: int | None
    convolution: bool
    """Whether a layer with a convolution stands before the others."""
    steps: int
    seed: int

    @property
    def name(self) -> str:
        place = f"{self.place or 'none'}{'-convolution' if self.convolution else ''}"
        return f"{place}-{self.steps}-{self.seed}"


def model_of(setting: Setting) -> GramianForCausalLM:
    """Make a hybrid whose layer `place` is attention, and whose other layers are GLA."""
    torch.manual_seed(setting.seed)
    mixers = ["gated_linear_attention"] * LAYERS
    if setting.place is not None:
        mixers[setting.place - 1] = "softmax_attention"
    if setting.convolution:
        mixers.insert(0, "long_convolution")
    config = GramianConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=len(mixers),
        num_heads=1,
        mixers=mixers,
        filter={"type": "rtf", "state_size": 4},
        attention={"rotary_base": None} if setting.place is not None else None,
        linear_recurrence={"state_size": STATE},
        intermediate_size=INNER,
        tie_word_embeddings=False,
        max_position_embeddings=LENGTH,
        initializer_range=WIDTH**-0.5,
        use_cache=False,
    )
    model = GramianForCausalLM(config)
    nn.init.normal_(model.get_input_embeddings().weight)
    return model


def tokens(random: np.random.Generator, count: int, fewest: int) -> tuple[Tensor, Tensor]:
    """Return inputs and labels (count, length) of sequences with at least ``fewest`` pairs."""
    rows = []
    for pairs in random.integers(fewest, PAIRS + 1, size=count).tolist():
        task = MQAR(vocab_size=VOCABULARY, length=LENGTH, pairs=pairs, random_non_queries=False)
        rows.append(task.row(random, "train"))
    x, y = (np.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    return torch.from_numpy(x), torch.from_numpy(y)


def train(setting: Setting) -> Run:
    """Train a hybrid, and return its accuracy, its loss and the ESS of its layers."""
    began = time.process_time()
    model = model_of(setting)
    random = np.random.default_rng([setting.seed, 0])
    descent = Descent(model, RATE, setting.steps)
    for _ in range(setting.steps):
        logits, values = answers(model, *tokens(random, BATCH, 1))
        descent.step(nn.functional.cross_entropy(logits, values))
    held_out = tokens(np.random.default_rng([setting.seed, 1]), EVALUATED, PAIRS)
    with torch.no_grad():
        logits, values = answers(model, *held_out)
    return {
        **asdict(setting),
        "accuracy": float((logits.argmax(-1) == values).double().mean()),
        "loss": float(nn.functional.cross_entropy(logits, values)),
        "ess": state_sizes(model, held_out[0][:MEASURED]),
        "seconds": time.process_time() - began,
    }


@torch.no_grad()
def state_sizes(model: GramianForCausalLM, x: Tensor) -> list[float]:
    """Return the average ESS of every layer, without that of a convolution before them."""
    observer = Observer(model, Mixer)
    model.model(x)
    systems = list(observer.operators())[-LAYERS:]
    return [float(effective_state_size(system).mean()) for system in systems]


def sweep(chosen: Sequence[Setting], folder: Path) -> list[Run]:
    """Run all trainings that have no result yet, and return the results of all, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = []
    for setting in chosen:
        kept = folder / f"{setting.name}.json"
        if not kept.exists():
            run = train(setting)
            kept.write_text(json.dumps(run) + "\n", encoding="utf-8")
            print(run, flush=True)
        runs.append(json.loads(kept.read_text(encoding="utf-8")))
    return runs


def label(place: int | None) -> str:
    return "none" if place is None else f"layer {place}"


def of_set(runs: Sequence[Run], convolution: bool) -> list[Run]:
    return [run for run in runs if run["convolution"] == convolution]


def correlations(runs: Sequence[Run]) -> dict[str, float]:
    """Return the rank correlations (Spearman) of accuracy with state-sizes, over trainings.

    "all" and "hybrids" are those with the total ESS of the layers, over all trainings and over
    those with attention. "attention" and "recurrences" are, over those with attention, the
    correlations with the ESS of attention and with the total ESS of the other layers.
    """
    hybrids = [run for run in runs if run["place"] is not None]
    attention = [run["ess"][run["place"] - 1] for run in hybrids]
    totals = [sum(run["ess"]) for run in hybrids]
    sizes: dict[str, tuple[Sequence[Run], list[float]]] = {
        "all": (runs, [sum(run["ess"]) for run in runs]),
        "hybrids": (hybrids, totals),
        "attention": (hybrids, attention),
        "recurrences": (hybrids, [a - b for a, b in zip(totals, attention, strict=True)]),
    }
    return {
        name: float(spearmanr([run["accuracy"] for run in some], size).statistic)
        for name, (some, size) in sizes.items()
    }


def topology_table(runs: Sequence[Run]) -> str:
    """Return a table with a row for each place of attention, and the correlations below it."""
    rows = []
    for place in PLACES:
        some = [run for run in runs if run["place"] == place]
        sizes = [mean(run["ess"][layer] for run in some) for layer in range(LAYERS)]
        rows.append(
            [
                label(place),
                spread([run["accuracy"] for run in some]),
                f"{mean(run['loss'] for run in some):.2f}",
                *(
                    f"**{size:.2f}**" if layer + 1 == place else f"{size:.2f}"
                    for layer, size in enumerate(sizes)
                ),
                f"{sum(sizes):.2f}",
            ]
        )
    head = ["attention", "accuracy", "loss", *(f"ESS, layer {n + 1}" for n in range(LAYERS))]
    seeds = len({run["seed"] for run in runs})
    about = f"{runs[0]['steps']} steps, {seeds} seed{'s' if seeds > 1 else ''}."
    found = correlations(runs)
    ranks = (
        f"Rank correlations of accuracy with total ESS: {found['all']:.2f} over all "
        f"{len(runs)} trainings, {found['hybrids']:.2f} over those with attention.\n"
        f"Over those with attention, with the ESS of attention: {found['attention']:.2f}, and with "
        f"the total ESS of GLA: {found['recurrences']:.2f}."
    )
    return f"{about}\n\n{table([*head, 'total'], rows)}\n\n{ranks}"


def blocks(runs: Sequence[Run]) -> Mapping[str, str]:
    """Make the tables of the page by the names of their marks."""
    return {name: topology_table(of_set(runs, behind)) for behind, name in BEHIND.items()}


def figure_of(runs: Sequence[Run]) -> "Figure":
    """Draw accuracy by the place of attention, and the ESS of every layer, a row for each set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    for behind, (left, right) in zip(BEHIND, figure.subplots(2, 2), strict=True):
        for index, place in enumerate(PLACES):
            some = [run for run in of_set(runs, behind) if run["place"] == place]
            color = "#777777" if place is None else f"C{index}"
            accuracy = [run["accuracy"] for run in some]
            x = [index + 0.1 * (run["seed"] - (len(some) - 1) / 2) for run in some]
            left.plot(x, accuracy, "o", color=color, ms=5)
            sizes = [mean(run["ess"][layer] for run in some) for layer in range(LAYERS)]
            right.plot(range(1, LAYERS + 1), sizes, "o-", color=color, ms=4, label=label(place))
            if place is not None:
                right.plot([place], [sizes[place - 1]], "s", color=color, ms=8)
        left.axhline(1 / PAIRS, color="black", linewidth=1, linestyle=":")
        left.set_ylim(0, 1.05)
        left.set_xticks(range(len(PLACES)), [label(place) for place in PLACES])
        right.set_xticks(range(1, LAYERS + 1))
        name = "Behind a convolution" if behind else "Only GLA has convolutions"
        finish(left, f"{name} (dotted: 1 / pairs)", "attention", "accuracy")
        finish(right, f"{name} (squares: attention)", "layer", "average ESS")
        if not behind:
            right.legend(fontsize=8, frameon=False, title="attention", title_fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/hybrid_topology"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--document", type=Path, help="Page with marks for the tables.")
    parser.add_argument("--figures", type=Path, help="Folder for the figure.")
    parser.add_argument("--quick", action="store_true", help="Train for two steps only.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = [
        Setting(place, behind, 2 if arguments.quick else STEPS[behind], seed)
        for seed in range(1 if arguments.quick else arguments.seeds)
        for behind in BEHIND
        for place in PLACES
    ]
    runs = sweep(chosen, arguments.runs)
    if arguments.quick:
        print(*(run["accuracy"] for run in runs))
        return
    found = blocks(runs)
    print("\n\n".join(found.values()))
    results = {
        "seconds": sum(run["seconds"] for run in runs),
        "correlations": {name: correlations(of_set(runs, key)) for key, name in BEHIND.items()},
        "runs": runs,
    }
    write(arguments.output / "hybrid_topology.json", results)
    if arguments.document is not None:
        page = arguments.document.read_text(encoding="utf-8")
        arguments.document.write_text(fill_marks(page, found), encoding="utf-8")
    if arguments.figures is not None:
        save_figure(figure_of(runs), arguments.figures / "hybrid_topology.png")


if __name__ == "__main__":
    main()
