"""Continue every prompt of a large file with a causal language model, on Ray Data.

    python examples/generate_many.py MODEL prompts.jsonl continued --concurrency 2 --batch-size 32

MODEL is the folder of a Gramian model or of any causal language model of transformers, with its
tokenizer. The file has one prompt in each line: as plain text, or, if its name ends in .jsonl or
.ndjson, as a JSON object with the prompt under a key. Blank lines are skipped.

The file is divided into parts, and each part gives one file of the output folder, whose rows have
the number of the line, the prompt and its continuation. Every actor of the cluster loads the model
once. It reads its parts from the file itself, so that only their positions pass through Ray, and
needs no other task of Ray Data beside it: the actors may take all cores. It writes the rows of each
batch as soon as it has them, and gives the file its name when the part is complete. So the same
call continues one that was interrupted, and only does the parts that have no file yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """What is generated, from which prompts, and how.

    All paths are absolute. `format` is the suffix of the files that are written: jsonl or parquet.
    """

    model: str
    prompts: str
    output: str
    key: str
    max_new_tokens: int
    batch_size: int
    format: str
    device: str
    threads: int


@dataclass(frozen=True)
class Part:
    """Consecutive lines of the file of prompts.

    Attributes:
        index: number of the part, from 0.
        line: number of its first line, from 1.
        start: position of its first byte in the file.
        stop: position after its last byte.
    """

    index: int
    line: int
    start: int
    stop: int

    def file(self, job: Job) -> Path:
        """Return the file for the continuations of the part's prompts."""
        return Path(job.output) / f"part-{self.index:06}.{job.format}"


def prompt_in(raw: bytes, file: str, number: int, key: str) -> str | None:
    """Return the prompt in a line, or None if the line is blank.

    Raises:
        ValueError: if the line is not UTF-8, or no JSON object with a prompt under the key.
    """
    where = f"{file}, line {number}"
    try:
        line = raw.decode("utf-8-sig").rstrip("\r\n")
        if not line.strip():
            return None
        if Path(file).suffix not in (".jsonl", ".ndjson"):
            return line
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    prompt = values.get(key) if isinstance(values, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: there is no prompt under {key!r}.")
    return prompt


def split(file: str, key: str, size: int) -> tuple[list[Part], str]:
    """Divide a file into parts of `size` prompts; return them, and the SHA-256 of the file.

    Every line is checked, so that a mistake in the last one is found before the first is continued.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if a line has no prompt.
    """
    parts: list[Part] = []
    digest = hashlib.sha256()
    line, start, stop, prompts = 1, 0, 0, 0
    with open(file, "rb") as stream:
        for number, raw in enumerate(stream, 1):
            digest.update(raw)
            stop += len(raw)
            prompts += prompt_in(raw, file, number, key) is not None
            if prompts == size:
                parts.append(Part(len(parts), line, start, stop))
                line, start, prompts = number + 1, stop, 0
    if prompts:
        parts.append(Part(len(parts), line, start, stop))
    return parts, digest.hexdigest()


def read(part: Part, job: Job) -> Iterator[tuple[int, str]]:
    """Yield the number of the line and the prompt, for each prompt of a part."""
    with open(job.prompts, "rb") as stream:
        stream.seek(part.start)
        number = part.line
        while stream.tell() < part.stop and (raw := stream.readline()):
            prompt = prompt_in(raw, job.prompts, number, job.key)
            if prompt is not None:
                yield number, prompt
            number += 1


@contextmanager
def writer(file: Path) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Yield a function that writes rows. The file gets its name when the block succeeds."""
    stage = file.with_name(f".{file.name}")
    if file.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        schema = pa.schema({"line": pa.int64(), "prompt": pa.string(), "text": pa.string()})
        with ParquetWriter(stage, schema) as table:
            yield lambda rows: table.write_table(pa.Table.from_pylist(rows, schema))
    else:
        with open(stage, "w", encoding="utf-8") as stream:

            def write(rows: list[dict[str, Any]]) -> None:
                stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                stream.flush()

            yield write
    stage.replace(file)


class Generator:
    """A model in the memory of an actor, which continues the prompts of one part after another."""

    def __init__(self, job: Job) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import gramian.models  # noqa: F401 (registers the models with the Auto classes)

        torch.set_num_threads(job.threads)
        self.job = job
        self.tokenizer = AutoTokenizer.from_pretrained(job.model, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = AutoModelForCausalLM.from_pretrained(job.model).to(job.device).eval()

    def __call__(self, row: dict[str, int]) -> dict[str, int]:
        """Write the continuations of a part, and return its index and its number of prompts."""
        part, written = Part(**row), 0
        prompts = read(part, self.job)
        with writer(part.file(self.job)) as write:
            while batch := list(islice(prompts, self.job.batch_size)):
                texts = self.generate([prompt for _, prompt in batch])
                write(
                    [
                        {"line": line, "prompt": prompt, "text": text}
                        for (line, prompt), text in zip(batch, texts, strict=True)
                    ]
                )
                written += len(batch)
        return {"index": part.index, "prompts": written}

    def generate(self, prompts: list[str]) -> list[str]:
        """Return the most likely continuation of each prompt, token by token (greedy search)."""
        batch = self.tokenizer(
            prompts, padding=True, return_tensors="pt", return_token_type_ids=False
        ).to(self.job.device)
        sequences = self.model.generate(
            **batch,
            max_new_tokens=self.job.max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        new = sequences[:, batch["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)


def prepare(job: Job, size: int) -> list[Part]:
    """Make the output folder, and return the parts of the file that are not in it yet.

    Raises:
        OSError: if the file of prompts cannot be read.
        ValueError: if a line has no prompt, or the folder was made from other prompts, by another
            model (according to its path) or with other settings.
    """
    parts, digest = split(job.prompts, job.key, size)
    if not parts:
        raise ValueError(f"{job.prompts} has no prompts.")
    settings = {
        "model": job.model,
        "sha256 of the prompts": digest,
        "key": job.key,
        "max_new_tokens": job.max_new_tokens,
        "prompts in a part": size,
        "format": job.format,
    }
    file = Path(job.output) / "settings.json"
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            raise ValueError(
                f"{job.output} was made otherwise ({', '.join(changed)}): name another folder."
            )
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return [part for part in parts if not part.file(job).exists()]


def run(
    job: Job, parts: list[Part], concurrency: int, address: str | None
) -> Iterator[dict[str, int]]:
    """Yield the index and the number of prompts of each part when it is written."""
    import ray
    import ray.data

    ray.init(address=address, log_to_driver=False)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = ray.data.from_items(
            [dataclasses.asdict(part) for part in parts], override_num_blocks=len(parts)
        )
        # An actor that had parts in its queue would keep them from one that has nothing left to do.
        pool = ray.data.ActorPoolStrategy(
            size=min(concurrency, len(parts)), max_tasks_in_flight_per_actor=1
        )
        written = rows.map(
            Generator,
            fn_constructor_args=(job,),
            compute=pool,
            num_cpus=job.threads,
            num_gpus=1 if job.device == "cuda" else 0,
        )
        yield from written.iter_rows()
    finally:
        ray.shutdown()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a causal language model")
    parser.add_argument("prompts", type=Path, help="file with one prompt in each line")
    parser.add_argument("output", type=Path, help="folder for the files with the continuations")
    parser.add_argument("--key", default="prompt", help="key of the prompts in JSON lines")
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32, help="prompts generated at once")
    parser.add_argument("--part-size", type=int, default=1024, help="prompts in an output file")
    parser.add_argument("--concurrency", type=int, default=1, help="number of actors")
    parser.add_argument("--threads", type=int, default=1, help="cores of each actor")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: one GPU for each actor"
    )
    parser.add_argument(
        "--address", help="address of a Ray cluster (default: one on this machine, for this call)"
    )
    return parser


def main() -> None:
    arguments = parser().parse_args()
    for name in ("max_new_tokens", "batch_size", "part_size", "concurrency", "threads"):
        if getattr(arguments, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1.")
    if not arguments.model.is_dir():
        raise SystemExit(f"there is no model folder {arguments.model}.")
    names = [field.name for field in dataclasses.fields(Job)]
    paths = {
        name: str(getattr(arguments, name).absolute()) for name in ("model", "prompts", "output")
    }
    job = Job(**{name: getattr(arguments, name) for name in names} | paths)
    try:
        parts = prepare(job, arguments.part_size)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    if not parts:
        print(f"Every prompt has its continuation in {arguments.output}.")
        return
    for done, row in enumerate(run(job, parts, arguments.concurrency, arguments.address), 1):
        print(f"part {row['index']}: {row['prompts']} prompts ({done} of {len(parts)})", flush=True)


if __name__ == "__main__":
    main()
