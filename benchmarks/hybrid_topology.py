"""Where in a hybrid should attention stand, and does the state in use of the layers tell why?

Hybrids of four layers learn multi-query associative recall. Three layers are gated linear attention
(GLA), whose state is too small for all pairs, and one is softmax attention (SA): the first, the
second, the third or the last. Parnichkun et al. 2025 (arXiv 2504.19561) find that the effective
state-size (ESS) of the layers explains why attention is better not the first. Four layers of GLA
are the control. All mixers have one head, no short convolution and no positions, so that a layer
mixes neighboring tokens by its own memory alone.

Each batch contains new sequences, of between one pair and all pairs. Accuracy and ESS are measured
on held-out sequences with all pairs. ESS is averaged over positions and sequences.

    python benchmarks/hybrid_topology.py [--seeds N] [--runs FOLDER] [--quick]

The result of every training is stored in the folder `--runs`. If the benchmark is interrupted, the
same command continues it. `--document` writes the table of `docs/results/hybrid_topology.md`, and
`--figures` the figure.
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
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._pages import fill_marks, table
from benchmarks._report import write
from gramian import effective_state_size, parameter_groups
from gramian.memory import Observer
from gramian.mixers import Mixer
from gramian.models import GramianConfig, GramianForCausalLM
from gramian.reports import save_figure
from gramian.tasks import IGNORED
from gramian.tasks.mqar import MQAR

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYERS = 4
PLACES = (1, 2, 3, 4, None)  # of attention, from 1; None stands for no attention
VOCABULARY = 64
WIDTH = 64
STATE = 4
PAIRS = 8
LENGTH = 32
BATCH = 32
RATE = 3e-3
EVALUATED = 256  # sequences on which accuracy is measured
MEASURED = 16  # sequences on which state-sizes are measured

Run = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """The settings of one training."""

    place: int | None
    steps: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.place or 'none'}-{self.steps}-{self.seed}"


def model_of(setting: Setting) -> GramianForCausalLM:
    """Make a hybrid whose layer `place` is attention, and whose other layers are GLA."""
    torch.manual_seed(setting.seed)
    mixers = ["gated_linear_attention"] * LAYERS
    if setting.place is not None:
        mixers[setting.place - 1] = "softmax_attention"
    config = GramianConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_heads=1,
        mixers=mixers,
        attention={"rotary_base": None} if setting.place is not None else None,
        linear_recurrence={"state_size": STATE},
        short_kernel=1,
        intermediate_size=WIDTH,
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


def answers(model: GramianForCausalLM, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits and the labels at the positions that have a label."""
    due = y != IGNORED
    return model.lm_head(model.model(x).last_hidden_state[due]), y[due]


def train(setting: Setting) -> Run:
    """Train a hybrid, and return its accuracy, its loss and the ESS of its layers."""
    began = time.process_time()
    model = model_of(setting)
    random = np.random.default_rng([setting.seed, 0])
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=RATE, weight_decay=0.01))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps=setting.steps,
        pct_start=0.1,
        cycle_momentum=False,
    )
    for _ in range(setting.steps):
        loss = nn.functional.cross_entropy(*answers(model, *tokens(random, BATCH, 1)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
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
    """Return the average ESS of every layer."""
    observer = Observer(model, Mixer)
    model.model(x)
    return [float(effective_state_size(system).mean()) for system in observer.operators()]


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


def topology_table(runs: Sequence[Run]) -> str:
    """Return the table of the page, with a row for each place of attention."""
    rows = []
    for place in PLACES:
        some = [run for run in runs if run["place"] == place]
        accuracy = [run["accuracy"] for run in some]
        sizes = [mean(run["ess"][layer] for run in some) for layer in range(LAYERS)]
        rows.append(
            [
                label(place),
                f"{mean(accuracy):.3f} ({min(accuracy):.3f} … {max(accuracy):.3f})",
                f"{mean(run['loss'] for run in some):.2f}",
                *(
                    f"**{size:.2f}**" if layer + 1 == place else f"{size:.2f}"
                    for layer, size in enumerate(sizes)
                ),
            ]
        )
    head = ["attention", "accuracy", "loss", *(f"ESS, layer {n + 1}" for n in range(LAYERS))]
    seeds = len({run["seed"] for run in runs})
    about = f"{runs[0]['steps']} steps, {seeds} seed{'s' if seeds > 1 else ''}."
    figure = (
        "![Accuracy by the place of attention, and ESS of the layers]"
        "(../figures/hybrid_topology.png)"
    )
    return f"{about}\n\n{table(head, rows)}\n\n{figure}"


def figure_of(runs: Sequence[Run]) -> "Figure":
    """Draw accuracy by the place of attention, and the ESS of every layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, place in enumerate(PLACES):
        some = [run for run in runs if run["place"] == place]
        color = "#777777" if place is None else f"C{index}"
        left.plot([index] * len(some), [run["accuracy"] for run in some], "o", color=color, ms=5)
        sizes = [mean(run["ess"][layer] for run in some) for layer in range(LAYERS)]
        right.plot(range(1, LAYERS + 1), sizes, "o-", color=color, ms=4, label=label(place))
        if place is not None:
            right.plot([place], [sizes[place - 1]], "s", color=color, ms=8)
    left.set_xticks(range(len(PLACES)), [label(place) for place in PLACES])
    right.set_xticks(range(1, LAYERS + 1))
    right.legend(fontsize=8, frameon=False, title="attention", title_fontsize=8)
    for axes, title, x, y in (
        (left, "Recall by the place of attention", "attention", "accuracy"),
        (right, "ESS of the layers (attention as a square)", "layer", "average ESS"),
    ):
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, alpha=0.25, linewidth=0.5)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/hybrid_topology"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--document", type=Path, help="Page with marks for the table.")
    parser.add_argument("--figures", type=Path, help="Folder for the figure.")
    parser.add_argument("--quick", action="store_true", help="Train for two steps only.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steps, seeds = (2, 1) if arguments.quick else (arguments.steps, arguments.seeds)
    chosen = [Setting(place, steps, seed) for seed in range(seeds) for place in PLACES]
    runs = sweep(chosen, arguments.runs)
    found = topology_table(runs)
    print(found)
    if arguments.quick:
        return
    results = {"steps": steps, "seconds": sum(run["seconds"] for run in runs), "runs": runs}
    write(arguments.output / "hybrid_topology.json", results)
    if arguments.document is not None:
        page = arguments.document.read_text(encoding="utf-8")
        filled = fill_marks(page, {"topology": found})
        arguments.document.write_text(filled, encoding="utf-8")
    if arguments.figures is not None:
        save_figure(figure_of(runs), arguments.figures / "hybrid_topology.png")


if __name__ == "__main__":
    main()
