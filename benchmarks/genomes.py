"""Does the memory that is needed to embed and score a genome grow with its length?

The benchmark uses two tiny models of published layouts (`tests/data`): HyenaDNA's has implicit
filters, and StripedHyena's has modal filters. A random genome has one record. It is embedded as the
output of the last norm, once as the mean over its bases (safetensors) and once as one vector for
each base (npy). It is also scored on both strands. Each of these jobs has a process of its own,
which prints its peak of resident memory. The genome is read in chunks of 16,384 tokens, with the
model's state, on one thread.

    python benchmarks/genomes.py [--lengths 100000 1000000] [--output PATH]
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import _child
from benchmarks._report import write

ROOT = Path(__file__).resolve().parent.parent
MODELS = {"HyenaDNA": "hyenadna_tiny.ckpt", "StripedHyena": "stripedhyena_tiny.safetensors"}
JOBS = ("mean", "none", "score")


def measure(model: str, job: str, length: int) -> dict[str, Any]:
    """Run one job in this process, and return its seconds, without loading, and its peak in MiB."""
    from transformers.utils import logging

    from gramian import checkpoints, genomics

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    loaded = checkpoints.load(ROOT / "tests/data" / MODELS[model]).model
    options: dict[str, Any] = {"tokenizer": checkpoints.DNATokenizer()}
    with tempfile.TemporaryDirectory() as folder:
        genome = Path(folder, "genome.fa")
        draw(genome, length)
        start = time.perf_counter()
        if job == "score":
            options["reverse_complement"] = "both"
            genomics.write_scores(Path(folder, "scores.tsv"), loaded, genome, **options)
        else:
            file = Path(folder, "mean.safetensors" if job == "mean" else "none.npy")
            options |= {"layer": -1, "pool": job}
            genomics.write_embeddings(file, loaded, genome, **options)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mib": _child.resident_peak()}


def draw(file: Path, length: int) -> None:
    """Write a genome of one record, in lines of 80 bases."""
    generator = torch.Generator().manual_seed(0)
    with file.open("w", encoding="ascii") as out:
        out.write(">genome\n")
        for place in range(0, length, 80):
            bases = torch.randint(4, (min(80, length - place),), generator=generator)
            out.write("".join("ACGT"[base] for base in bases.tolist()) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/genomes.json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        model, job, length = arguments.child
        print(json.dumps(measure(model, job, int(length))))
        return
    torch.set_num_threads(1)
    rows = []
    for model in MODELS:
        for job in JOBS:
            for length in arguments.lengths:
                command = [__file__, "--child", model, job, str(length)]
                found = _child.run(command, f"{model}, {job}, {length:,} bases")
                if found is None:
                    raise SystemExit(f"{model}, {job}, {length:,} bases: out of memory.")
                rows.append({"model": model, "job": job, "length": length, **found})
                print(
                    f"{model}, {job}, {length:,} bases: {found['peak_mib']:.0f} MiB, "
                    f"{found['seconds']:.1f} s",
                    flush=True,
                )
    write(arguments.output, {"rows": rows})


if __name__ == "__main__":
    main()
