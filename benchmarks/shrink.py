"""Which states may be dropped, what does it cost, and what does a short recovery bring back?

Small models (Mamba2 and Gated DeltaNet of transformers, Gramian's GLA) are trained on the text
behind Python's `help()` and on multi-query associative recall. Their states are made smaller in
several ways, at several shares:

- shrink: what `gramian.shrink` keeps, the best of its criteria. On text they are compared by the
  loss, and on recall, where the answers are labelled, by the accuracy, both on windows by which it
  chooses. With a recovery, the three best are recovered, and the best one is kept, by windows that
  the recovery did not see;
- error: the greedy elimination by the exact error of the scan;
- diagonal: the largest contributions of single coordinates;
- weights: the coordinates with the largest weights, by the sum of their squares;
- random.

For each, the loss on other windows, or the accuracy of recall, is measured before and after a
recovery: full training towards the original's predictions, for a tenth of the steps. Labels count
alone there, too. The batches and rates of the recovery were chosen with the seeds 100 to 102.

    python benchmarks/shrink.py [--quick] [--seeds 3] [--recovery 10] [--runs FOLDER]
    python benchmarks/shrink.py --part cost [--layers 24] [--windows 32] [--output PATH]

Each model on each task with each seed is a file in the folder of runs, so an interrupted benchmark
goes on where it stopped. The second command measures the time and memory of one pass that chooses
states of a Mamba2 with the shape of the 130M model, and random weights.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._report import write
from benchmarks._shrink_models import MODELS, STATES, TASKS, Task, score, train
from gramian.shrinking import Recovery
from gramian.shrinking._choosing import Choices
from gramian.shrinking._family import Layer, find_layers
from gramian.shrinking._folding import fold
from gramian.shrinking._passes import measure_importance
from gramian.shrinking._recovery import recover, recover_best
from gramian.shrinking._texts import Windows, split_windows
from gramian.shrinking._trying import Run

SHARES = (0.75, 0.5, 0.25, 0.125)
CRITERIA = ("shrink", "error", "diagonal", "weights", "random")
COMPARED = 2**12  # tokens on which `shrink` compares criteria
CANDIDATES = 3  # models that are recovered
Kept = dict[str, Tensor]


def others(
    layers: list[Layer], candidates: dict[str, Kept], size: int, generator: torch.Generator
) -> dict[str, Kept]:
    """Return the coordinates that every other way keeps, (groups, size), by the layer's path."""
    drawn = {
        layer.path: torch.rand(layer.shape.groups, layer.shape.states, generator=generator)
        for layer in layers
    }
    random = {path: each.argsort(1)[:, :size].sort(1).values for path, each in drawn.items()}
    return {name: candidates[name] for name in ("error", "diagonal", "weights")} | {
        "random": random
    }


def run(kind: str, task: Task, seed: int, divisor: int, folder: Path) -> dict[str, Any]:
    """Train one model, make its states smaller in every way, and measure.

    The recovery has one step for `divisor` steps of training.
    """
    started, used = time.perf_counter(), time.process_time()
    model = train(kind, task, seed, folder / "weights.pt")
    trained = time.process_time() - used
    windows = task.draw(task.windows, "train", (seed, 10**6))
    scored = task.draw(task.scored, "held_out", (0,))
    layers = list(find_layers(model))
    chosen_by, held_out = split_windows(windows, seed)
    choices = Choices.of(layers, measure_importance(model, layers, chosen_by), 1)
    some = chosen_by.first(COMPARED)  # as in `shrink`
    chooser = Run(model, layers, choices, some, chosen_by, held_out, task.measure)
    generator = torch.Generator().manual_seed(seed)
    steps = max(1, task.steps // divisor)
    recovery = Recovery(
        steps, learning_rate=task.recovery_rate, batch=task.recovery_batch, candidates=CANDIDATES
    )
    shares = []
    for share in SHARES:
        size = round(share * STATES)
        plan = {layer.path: size for layer in layers}
        models = chooser.several(plan, CANDIDATES)
        found = {one.criterion: {"before": score(one.model, scored)} for one in models}
        best, _ = recover_best(model, models, chosen_by, recovery, seed, task.measure)
        known: list[tuple[Mapping[str, Tensor], dict[str, Any]]] = []
        for one in models:
            found[one.criterion]["after"] = score(one.model, scored)
            known.append((one.kept, found[one.criterion]))
        measured = {
            "shrink": {
                "before": found[models[0].criterion]["before"],
                "after": found[models[best].criterion]["after"],
            }
        }
        for name, kept in others(layers, choices.candidates(plan), size, generator).items():
            same = [done for own, done in known if _equal(own, kept)]
            if not same:
                small, cut = fold(model, layers, kept, choices.importance)
                before = score(small, scored)
                recover(model, small, list(cut.values()), chosen_by, recovery, seed)
                same = [{"before": before, "after": score(small, scored)}]
                known.append((kept, same[0]))
            measured[name] = same[0]
        shares.append(
            {
                "share": share,
                "states": size,
                "criterion": models[0].criterion,
                "criterion after": models[best].criterion,
                "measured": measured,
            }
        )
    return {
        "model": kind,
        "task": task.name,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": task.steps,
        "recovery": dataclasses.asdict(recovery),
        "training processor seconds": trained,
        "processor seconds": time.process_time() - used,
        "seconds": time.perf_counter() - started,
        "original": score(model, scored),
        "shares": shares,
    }


def _equal(one: Mapping[str, Tensor], other: Kept) -> bool:
    return all(torch.equal(kept, other[path]) for path, kept in one.items())


def cell(kind: str, task: Task, seed: int, divisor: int, runs: Path) -> dict[str, Any]:
    """Return the results of a run, from its file if it is finished."""
    folder = runs / f"{kind}_{task.name}_{task.steps}_{seed}".replace(" ", "_")
    file = folder / f"result_{divisor}.json"
    if not file.is_file():
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        write(file, run(kind, task, seed, divisor, folder))
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def worse(one: dict[str, Any], original: dict[str, float], task: str) -> float:
    """Return by how much a score is worse: the increase of the loss, or the accuracy that is lost.

    The increase of the loss is relative to the loss of the original.
    """
    if task == "text":
        return float(one["loss"]) / original["loss"] - 1
    return original["accuracy"] - float(one["accuracy"])


def compare(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare the ways over seeds, for every task, model and share, before and after recovery.

    What `shrink` loses is compared with what the best of the others loses: the way with the
    smallest mean over seeds. Two spreads are measured, both standard deviations over seeds: that of
    what this way loses, and that of the difference between the two. The first is 0 if this way
    loses the same with every seed, and the second if the difference is always the same. `shrink` is
    within the spread if its mean is larger by at most the larger of the two.
    """
    found = []
    for task in TASKS:
        for kind in MODELS:
            own = [c for c in cells if (c["task"], c["model"]) == (task, kind)]
            for index, share in enumerate(SHARES if own else ()):
                for when in ("before", "after"):
                    losses = {
                        way: [
                            worse(c["shares"][index]["measured"][way][when], c["original"], task)
                            for c in own
                        ]
                        for way in CRITERIA
                    }
                    means = {way: statistics.fmean(values) for way, values in losses.items()}
                    best = min(("diagonal", "weights", "random"), key=lambda way: means[way])
                    differences = [
                        a - b for a, b in zip(losses["shrink"], losses[best], strict=True)
                    ]
                    spread, paired = (
                        statistics.stdev(values) if len(own) > 1 else 0.0
                        for values in (losses[best], differences)
                    )
                    excess = means["shrink"] - means[best]
                    found.append(
                        {
                            "task": task,
                            "model": kind,
                            "share": share,
                            "when": when,
                            "seeds": len(own),
                            "worse": means,
                            "all": losses,
                            "best of the others": best,
                            "spread": spread,
                            "spread of the difference": paired,
                            "excess": excess,
                            "within spread": excess <= max(spread, paired),
                        }
                    )
    return found


def draw(comparisons: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = dict(zip(CRITERIA, ("C0", "C4", "C2", "C1", "C3"), strict=True))
    figure, panels = pyplot.subplots(2, 3, figsize=(11, 6.5), layout="constrained", sharex=True)
    for row, task in zip(panels, TASKS, strict=True):
        for axes, kind in zip(row, MODELS, strict=True):
            own = [c for c in comparisons if (c["task"], c["model"]) == (task, kind)]
            for way, color in colors.items():
                for when, style in (("before", "o-"), ("after", "s--")):
                    chosen = [c for c in own if c["when"] == when]
                    label = way if when == "before" else None
                    values = [100 * c["worse"][way] for c in chosen]
                    shares = [100 * c["share"] for c in chosen]
                    axes.plot(shares, values, style, color=color, ms=3, lw=1, label=label)
            what = "increase of the loss, %" if task == "text" else "accuracy lost, points"
            axes.set(title=f"{kind}, {task}", ylabel=what, xlabel="states kept, %")
            axes.set_yscale("symlog", linthresh=0.1)
            axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=7)
    figure.suptitle("solid: before the recovery, dashed: after it", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"drew {path}")


def quality(arguments: argparse.Namespace) -> None:
    tasks = [
        replace(task, steps=10, windows=32, scored=32, recovery_batch=4)
        if arguments.quick
        else task
        for task in TASKS.values()
    ]
    jobs = [
        (kind, task, seed, arguments.recovery, arguments.runs)
        for seed in range(1 if arguments.quick else arguments.seeds)
        for task in tasks
        for kind in MODELS
    ]
    started = time.perf_counter()
    cells: list[dict[str, Any]] = []
    if arguments.processes > 1:
        with ProcessPoolExecutor(arguments.processes) as pool:
            cells = list(pool.map(cell, *zip(*jobs, strict=True)))
    for job in jobs[len(cells) :]:
        cells.append(cell(*job))
    elapsed = time.perf_counter() - started
    comparisons = compare(cells)
    texts = [c for c in comparisons if c["task"] == "text" and c["share"] == 0.5]
    after = {c["model"]: c["worse"]["shrink"] for c in texts if c["when"] == "after"}
    spreads = ("spread", "spread of the difference")
    reported = ("task", "model", "share", "when", "excess", *spreads)
    output = arguments.output or Path(__file__).parent / "results" / "shrink.json"
    write(
        output,
        {
            "benchmark": "loss and recall against the share of the states that is kept",
            "states": STATES,
            "wall seconds": elapsed,
            "seconds of all runs": sum(c["seconds"] for c in cells),
            "processor seconds of all runs": sum(c["processor seconds"] for c in cells),
            "increase of the loss on text after recovery, half of the states": after,
            "worse than the best of the others beyond their spread": [
                {key: c[key] for key in reported} for c in comparisons if not c["within spread"]
            ],
            "comparisons": comparisons,
            "runs": cells,
        },
    )
    for c in comparisons:
        print(
            f"{c['task']:>6} {c['model']:<14} {c['share']:6.1%} {c['when']:<6} "
            + " ".join(f"{way} {c['worse'][way]:+.3%}" for way in CRITERIA)
            + ("" if c["within spread"] else f"  worse beyond {max(c[x] for x in spreads):.3%}")
        )
    draw(comparisons, arguments.figure)


def cost(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        hidden_size=768,
        num_hidden_layers=arguments.layers,
        expand=2,
        num_heads=24,
        head_dim=64,
        state_size=128,
        n_groups=1,
        chunk_size=256,
        vocab_size=50_288,
        tie_word_embeddings=True,
    )
    model = transformers.Mamba2ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.windows, arguments.length)
    windows = torch.randint(config.vocab_size, shape, generator=generator)
    layers = list(find_layers(model))
    seconds, processor, peaks = {}, {}, {"model": _peak()}
    for name, chosen in (("model alone", []), ("pass", layers)):
        start, used = time.perf_counter(), time.process_time()
        measure_importance(model, chosen, Windows.of(windows))
        seconds[name], peaks[name] = time.perf_counter() - start, _peak()
        processor[name] = time.process_time() - used
        print(f"{name}: {seconds[name]:.1f} s, peak {peaks[name] / 2**30:.2f} GiB", flush=True)
    output = arguments.output or Path(__file__).parent / "results" / "shrink_cost.json"
    write(
        output,
        {
            "benchmark": "one pass that measures what a text needs of a Mamba2's states",
            "parameters": sum(p.numel() for p in model.parameters()),
            "layers": arguments.layers,
            "tokens": windows.numel(),
            "seconds": seconds,
            "processor seconds": processor,
            "peak resident bytes": peaks,
            "bytes added by the sums": peaks["pass"] - peaks["model alone"],
        },
    )


def _peak() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("quality", "cost"), default="quality")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--recovery", type=int, default=10, help="steps of training for one step of recovery"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "gramian_shrink")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figure", type=Path, default=here.parent / "docs/figures/shrink.png")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    (cost if arguments.part == "cost" else quality)(arguments)


if __name__ == "__main__":
    main()
