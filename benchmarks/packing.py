"""What does a training step cost on packed rows, compared with padding to the longest sequence?

The benchmark runs forward and backward passes of a language model with each mixer on the same
sequences: once with one sequence per row under a mask, and once with all of them in one row, where
restarting positions separate them. Both sides process the same tokens, so the ratio of their tokens
per second is the inverse ratio of their times. The sides take turns.

    python benchmarks/packing.py [--output FILE] [--repeats N] [--width N]
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _report import write

from gramian.models import GramianConfig, GramianForCausalLM

KINDS: dict[str, dict[str, Any]] = {
    "hyena, implicit": {"mixers": "hyena", "filter": {"type": "implicit"}},
    "hyena, rtf": {
        "mixers": "hyena",
        "filter": {"type": "rtf", "state_size": 16, "initialization": "montel"},
    },
    "multi_hyena, modal": {"mixers": "multi_hyena", "filter": {"type": "modal", "orders": 8}},
    "gated_linear_attention": {"mixers": "gated_linear_attention"},
    "s6": {"mixers": "s6"},
    "softmax_attention": {"mixers": "softmax_attention"},
}
LENGTHS = {
    "alike": [496, 512, 480, 505, 511, 490, 470, 500],
    "uneven": [1024, 64, 300, 90, 700, 128, 33, 410, 257, 15, 800, 60],
    "long and short": [1000, *[10] * 20],
}


def step(model: GramianForCausalLM, batch: dict[str, torch.Tensor]) -> float:
    begin = time.perf_counter()
    model(**batch, use_cache=False).loss.backward()
    model.zero_grad()
    return time.perf_counter() - begin


def batches(lengths: list[int]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return two batches: the sequences padded on the right, and packed into one row."""
    rows = [torch.randint(256, (length,)) for length in lengths]
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    ids = pad(rows, batch_first=True)
    packed = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return (
        {"input_ids": ids, "attention_mask": mask, "labels": ids},
        {"input_ids": packed, "position_ids": positions, "labels": packed},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/packing.json"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--width", type=int, default=128)
    arguments = parser.parse_args()
    rows = []
    print(f"{'mixer':24} {'lengths':>15} {'tokens':>7} {'padded':>11} {'packed':>11} {'speed':>6}")
    for kind, settings in KINDS.items():
        torch.manual_seed(0)
        config = GramianConfig(
            vocab_size=256,
            hidden_size=arguments.width,
            num_hidden_layers=2,
            num_heads=4,
            max_position_embeddings=1024,
            **settings,
        )
        model = GramianForCausalLM(config).train()
        for name, lengths in LENGTHS.items():
            padded, packed = batches(lengths)
            losses = [model(**batch, use_cache=False).loss.item() for batch in (padded, packed)]
            assert abs(losses[0] - losses[1]) < 1e-4, losses
            times: dict[str, list[float]] = {"padded": [], "packed": []}
            for repeat in range(arguments.repeats + 1):
                for way, batch in (("padded", padded), ("packed", packed)):
                    seconds = step(model, batch)
                    if repeat:  # the first one warms up
                        times[way].append(seconds)
            middle = {way: statistics.median(found) for way, found in times.items()}
            speed = middle["padded"] / middle["packed"]
            rows.append({"mixer": kind, "lengths": name, "speed": speed, "seconds": times})
            print(
                f"{kind:24} {name:>15} {sum(lengths):7d} {1e3 * middle['padded']:8.1f} ms "
                f"{1e3 * middle['packed']:8.1f} ms {speed:6.2f}",
                flush=True,
            )
    print(f"slowest: {min(row['speed'] for row in rows):.2f} of the padded batch's speed")
    write(arguments.output, {"benchmark": "packing", "width": arguments.width, "rows": rows})


if __name__ == "__main__":
    main()
