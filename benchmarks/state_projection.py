"""How much smaller may a state be if it is projected, and not only cut?

`gramian.shrink` drops coordinates of a state, or projects it obliquely onto coordinates of a
balanced basis (`projection=True`), which needs one gate per head and step. The benchmark trains
byte-level models on the text behind Python's `help()`: linear attention, gated linear attention
with one gate per head, and transformers' Mamba2. It makes the states of the first two smaller in
both ways, without any training after it, and measures the loss on held-out bytes. Mamba2 cannot
hold the maps of a projection, so that only predicted errors are compared there.

    python benchmarks/state_projection.py [--steps N] [--output PATH]
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gramian
from benchmarks._report import write
from gramian.demo.text import python_documentation
from gramian.models import GramianConfig, GramianForCausalLM

LENGTH, STATES, BATCH = 256, 32, 8
SIZES = (24, 16, 8, 4)
MAX_TOKENS = 16_384
RATE = 4e-3


def build(kind: str) -> Any:
    """Return a model with two layers of 2 heads (Mamba2: 4 heads) of 32 states."""
    torch.manual_seed(0)
    shared = {"vocab_size": 259, "hidden_size": 64, "num_hidden_layers": 2}
    if kind == "mamba2":
        heads = {"num_heads": 4, "head_dim": 32, "state_size": STATES, "n_groups": 1}
        return Mamba2ForCausalLM(Mamba2Config(**shared, **heads, chunk_size=64))
    options: dict[str, Any] = {"state_size": STATES, "feature_map": "silu"}
    if kind == "gated_linear_attention":
        options["head_gates"] = True
    config = GramianConfig(**shared, num_heads=2, mixers=kind, linear_recurrence=options)
    return GramianForCausalLM(config)


def train(model: Any, text: Tensor, steps: int) -> None:
    """Train a model on random windows of a text (length), with a rate that falls to zero."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 30) * (1 - step / steps)
        starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=generator)
        ids = torch.stack([text[start : start + LENGTH] for start in starts.tolist()]).long()
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def measure(model: Any, text: Tensor, size: int, projection: bool) -> dict[str, Any]:
    """Return the losses and errors of a model whose states have some size."""
    options = {"context": LENGTH, "max_tokens": MAX_TOKENS, "projection": projection}
    _, report = gramian.shrink(model, text.long(), keep=size, **options)
    layers = [layer.projection for layer in report.layers]
    return {
        "loss before": report.loss_before,
        "loss after": report.loss_after,
        "increase": report.increase,
        "standard error": report.standard_error / report.loss_before,
        "criterion": report.criterion,
        "measured errors": [layer.measured_error for layer in report.layers],
        "predicted errors of coordinates": [one.coordinates_error for one in layers],
        "predicted errors of projections": [one.error for one in layers],
        "bounds of projections": [one.bound for one in layers],
    }


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=here / "results" / "state_projection.json")
    arguments = parser.parse_args()

    corpus = python_documentation()
    results: dict[str, Any] = {
        "benchmark": "projected states against cut ones, without training after it",
        "steps": arguments.steps,
        "states": STATES,
        "tokens": MAX_TOKENS,
    }
    for kind in ("linear_attention", "gated_linear_attention", "mamba2"):
        model = build(kind)
        train(model, corpus.train, arguments.steps)
        results[kind] = {}
        for size in SIZES[: 3 if kind == "mamba2" else 4]:
            row = {"coordinates": measure(model, corpus.held_out, size, False)}
            if kind != "mamba2":
                row["projection"] = measure(model, corpus.held_out, size, True)
            results[kind][str(size)] = row
            words = ", ".join(f"{way} {one['increase']:+.3%}" for way, one in row.items())
            print(f"{kind}, {size} of {STATES} states: {words}", flush=True)
    write(arguments.output, results)


if __name__ == "__main__":
    main()
