"""How do time and memory grow with length, with the number of filters, and with layers and width?

Parts, chosen with `--part`:

`length`   a training step of one layer, the prefill of a prompt, and the reduction of two kernels,
           from 4,096 to 1,048,576 positions.
`filters`  the reduction of 100 to 100,000 filters, by the closed form.
`distill`, `analyze`, `convert`
           the command on models of 4 to 32 layers and of widths from 64 to 512; for `convert`, of
           11 to 88 layers.

Every measurement is a process of its own, which first does the same work in a smaller size. Then it
counts the processor time, and by how much its resident memory rises above what it was. In the part
`length`, the allocator keeps memory that was freed (see `KEPT`). For models, the part of the memory
is given as well that is not mapped from a file: the system can drop the other pages and read them
again. A straight line on the logarithmic plot has the slope that is printed: the exponent of the
growth over the upper half of the sizes.

    python benchmarks/growth.py [--part length …] [--quick] [--plot FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._child import run
from benchmarks._report import write
from benchmarks.striped_hyena2 import (
    configuration,
    draw_checkpoint,
    resident_peak_again,
    resident_peak_of_this,
)

RESULTS = Path(__file__).parent / "results"
SMALL = 8192  # the largest length of the work that warms up
WIDTH, HEADS, STATE = 8, 2, 16
LENGTHS = tuple(4**k for k in range(6, 11))
FILTERS = (100, 1_000, 10_000, 100_000)
FILTER_TAPS, FILTER_ORDER = 32, 2
LAYERS, WIDTHS = (4, 8, 16, 32), (64, 128, 256, 512)
MODEL_LAYERS, MODEL_WIDTH, MODEL_TAPS = 4, 256, 64  # where the other one grows
BLOCKS = 11  # of a checkpoint of StripedHyena 2, repeated
TIMEOUT = 900.0  # seconds
ROOM = 4 * 2**30  # bytes of memory for one measurement
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(ROOM)}
"""Settings of glibc with which freed memory is used again. Without them, every tensor of more than
32 MiB gets new pages from the system, which costs more than most operations on it: the curves bend
where tensors reach this size."""

MIXERS: dict[str, dict[str, Any]] = {
    "Hyena, implicit filter": {"type": "hyena", "filter": {"type": "implicit"}},
    "Hyena, RTF filter": {"type": "hyena", "filter": {"type": "rtf", "state_size": STATE}},
    "S6": {"type": "s6"},
    "gated linear attention": {"type": "gated_linear_attention"},
}


# --- the work of a child -------------------------------------------------------------------------


def mixer_of(name: str, length: int) -> Any:
    from gramian import mixers

    torch.manual_seed(0)
    return mixers.build(MIXERS[name], width=WIDTH, heads=HEADS, max_length=length)


def step(name: str) -> Callable[[int], None]:
    """A forward and a backward pass of one layer, batch 1."""

    def work(length: int) -> None:
        mixer = mixer_of(name, length)
        mixer(torch.randn(1, length, WIDTH).requires_grad_()).sum().backward()

    return work


def prefill(name: str) -> Callable[[int], None]:
    """A prompt into the state of one layer, batch 1."""

    @torch.no_grad()
    def work(length: int) -> None:
        recurrence = mixer_of(name, length).eval().recurrence()
        recurrence.prefill(torch.randn(1, length, WIDTH), recurrence.initial_state(1))

    return work


def decaying(count: int, taps: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(count, taps, generator=draw) * torch.exp(-5 * torch.arange(taps) / taps)


def reduce_long(length: int) -> None:
    import gramian

    gramian.reduce(decaying(2, length), order=8)


def reduce_many(count: int) -> None:
    import gramian
    from gramian.reduction import Balanced

    kernels = decaying(count, FILTER_TAPS)
    gramian.reduce(kernels, order=FILTER_ORDER, method=Balanced(refine=False))


def works() -> dict[str, Callable[[int], None]]:
    """The work of each curve of the parts `length` and `filters`, by its name."""
    found = {f"training step, {name}": step(name) for name in MIXERS}
    found |= {f"prefill, {name}": prefill(name) for name in MIXERS}
    return found | {"reduction of a kernel": reduce_long, "reduction of filters": reduce_many}


def command_line(*words: str) -> None:
    """Run a command of `gramian` in this process, without its output."""
    import typer

    import gramian.cli

    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        group: Any = typer.main.get_command(gramian.cli.app)
        group.main(list(words), standalone_mode=False)


def on_model(command: str, source: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out")
        if command == "analyze":
            command_line("analyze", source, "--prompt", "abcdefgh" * 4)
        elif command == "distill":
            command_line("distill", source, out, "--order", "2")
        else:
            command_line("convert", source, out)


class Anonymous(threading.Thread):
    """A sampler of the resident memory that is not mapped from a file, in MiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.most = self.read()

    def read(self) -> float:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("RssAnon:")[1].split()[0]) / 2**10

    def run(self) -> None:
        while True:
            self.most = max(self.most, self.read())
            time.sleep(0.002)


def measured(work: Callable[[], None], repeats: int) -> dict[str, float]:
    """Processor and wall time in seconds, the least of the repeats, and MiB above what was."""
    gc.collect()
    before = resident_peak_again()
    sampler = Anonymous()
    sampler.start()
    cpu, wall = [], []
    while len(cpu) < repeats and sum(wall) < 1:
        began, clock = time.process_time(), time.perf_counter()
        work()
        cpu.append(time.process_time() - began)
        wall.append(time.perf_counter() - clock)
    return {
        "processor seconds": min(cpu),
        "wall seconds": min(wall),
        "MiB": resident_peak_of_this() - before,
        "MiB not mapped": sampler.most - sampler.first,
    }


def child(arguments: argparse.Namespace) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (ROOM, ROOM))
    if arguments.source:
        on_model(arguments.child, arguments.small)
        figures = measured(lambda: on_model(arguments.child, arguments.source), 1)
    else:
        work = works()[arguments.child]
        work(min(SMALL, arguments.size) if "filters" not in arguments.child else 64)
        figures = measured(lambda: work(arguments.size), 5)
    print(json.dumps(figures))


# --- models --------------------------------------------------------------------------------------


def save_model(folder: Path, layers: int, width: int) -> dict[str, float]:
    """Save a model in several files, and return the MiB of it and of its largest layer."""
    from gramian.models import ByteTokenizer, GramianConfig, GramianForCausalLM

    torch.manual_seed(0)
    config = GramianConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_heads=4,
        filter={"type": "implicit"},
        max_position_embeddings=MODEL_TAPS,
    )
    model = GramianForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="10MB")
    ByteTokenizer().save_pretrained(folder)
    largest = max(sum(w.nbytes for w in one.parameters()) for one in model.model.layers)
    whole = sum(weight.nbytes for weight in model.parameters())
    return {"model MiB": whole / 2**20, "layer MiB": largest / 2**20}


def save_checkpoint(folder: Path, layers: int, width: int) -> dict[str, float]:
    """Save a StripedHyena 2 in its published layout, and return sizes as `save_model` does."""
    folder.mkdir()
    config = configuration(width, 16 * (width // 6), layers // BLOCKS)
    tensors = draw_checkpoint(config)
    torch.save(tensors, folder / "model.pt")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    blocks: dict[str, int] = {}
    for name, value in tensors.items():
        block = ".".join(name.split(".")[:2])
        blocks[block] = blocks.get(block, 0) + value.nbytes
    whole = sum(blocks.values())
    largest = max(size for name, size in blocks.items() if name.startswith("blocks"))
    return {"model MiB": whole / 2**20, "layer MiB": largest / 2**20}


def of_models(command: str, quick: bool) -> list[dict[str, Any]]:
    sizes = [("layers", count, MODEL_WIDTH) for count in LAYERS[: 2 if quick else None]]
    sizes += [("width", MODEL_LAYERS, width) for width in WIDTHS[: 2 if quick else None]]
    save, unit = save_model, 1
    if command == "convert":
        save, unit = save_checkpoint, BLOCKS
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small"
        save(small, unit, 64)
        for number, (axis, layers, width) in enumerate(sizes):
            layers = unit * (layers // MODEL_LAYERS if unit > 1 else layers)
            source = Path(folder) / str(number)
            row: dict[str, Any] = {"curve": command, "axis": axis, "layers": layers}
            row |= {"width": width, "size": layers if axis == "layers" else width}
            row |= save(source, layers, width)
            row |= taken(command, ["--source", str(source), "--small", str(small)])
            rows.append(row)
            print(row, flush=True)
    return rows


def taken(name: str, more: list[str]) -> dict[str, Any]:
    figures = run([__file__, "--child", name, *more], name, TIMEOUT)
    return {"MiB": None} if figures is None else figures


# --- results -------------------------------------------------------------------------------------


def of_sizes(names: list[str], axis: str, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        for size in sizes:
            row = {"curve": name, "axis": axis, "size": size} | taken(name, ["--size", str(size)])
            rows.append(row)
            print(row, flush=True)
            if row["MiB"] is None:
                break
    return rows


def exponent(rows: list[dict[str, Any]], figure: str) -> float | None:
    """The slope of log(figure) over log(size), by least squares over the upper half of sizes."""
    found = [(row["size"], row[figure]) for row in rows if row.get(figure)]
    found = [(math.log(x), math.log(y)) for x, y in found[len(found) // 2 :] if y > 0]
    if len(found) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(found) for values in zip(*found, strict=True))
    products = sum((x - mean_x) * (y - mean_y) for x, y in found)
    return products / sum((x - mean_x) ** 2 for x, _ in found)


def exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    found = {}
    for curve, axis in dict.fromkeys((row["curve"], row["axis"]) for row in rows):
        some = [row for row in rows if (row["curve"], row["axis"]) == (curve, axis)]
        found[f"{curve}, {axis}"] = {
            "time": exponent(some, "processor seconds"),
            "memory": exponent(some, "MiB"),
            "largest size": max((row["size"] for row in some if row["MiB"] is not None), default=0),
        }
    return found


def draw(results: Path, folder: Path) -> None:
    """Draw every curve on logarithmic axes: time on the left, memory on the right."""
    from gramian._drawing import CYCLE, finish, new_figure, save_figure

    files = [results / f"growth_{part}.json" for part in PARTS]
    rows = [
        row
        for file in files
        if file.is_file()
        for row in json.loads(file.read_text(encoding="utf-8"))["rows"]
    ]
    panels: dict[str, list[str]] = {}
    for row in rows:
        kind = row["curve"].split(", ")[0] if row["axis"] == "length" else "commands"
        kind = "reduction" if row["curve"].startswith("reduction") else kind
        panels.setdefault(f"{kind}, against {row['axis']}", []).append(row["curve"])
    figure = new_figure(9, 2.6 * len(panels))
    axes = figure.subplots(len(panels), 2, squeeze=False)
    for line, (title, curves) in zip(axes, panels.items(), strict=True):
        axis = title.rpartition(" ")[2]
        figures = (("processor seconds", "seconds"), ("MiB", "MiB"))
        for panel, (figure_name, label) in zip(line, figures, strict=True):
            for number, curve in enumerate(dict.fromkeys(curves)):
                some = [row for row in rows if (row["curve"], row["axis"]) == (curve, axis)]
                points = [(row["size"], row[figure_name]) for row in some if row.get(figure_name)]
                x, y = zip(*points, strict=True) if points else ((), ())
                style = "-" if number < len(CYCLE) else "--"
                name = curve.partition(", ")[2] or curve
                panel.plot(
                    x, y, style, color=CYCLE[number % len(CYCLE)], marker="o", ms=3, label=name
                )
            panel.set_xscale("log", base=2 if axis != "filters" else 10)
            panel.set_yscale("log")
            finish(panel, title=title, x=axis, y=label)
        line[0].legend(fontsize=7, frameon=False)
    save_figure(figure, folder / "growth.png")


COMMANDS = ("distill", "analyze", "convert")
PARTS = (*COMMANDS, "filters", "length")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="small sizes only, for a look")
    parser.add_argument("--plot", type=Path, help="draw the results into this folder, and stop")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    parser.add_argument("--small", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        child(arguments)
        return
    if arguments.plot:
        draw(arguments.output, arguments.plot)
        return
    for part in arguments.part:
        if part in COMMANDS:
            rows = of_models(part, arguments.quick)
        elif part == "filters":
            rows = of_sizes(
                ["reduction of filters"], "filters", FILTERS[: 2 if arguments.quick else 4]
            )
        else:
            os.environ.update(KEPT)
            names = [name for name in works() if name != "reduction of filters"]
            rows = of_sizes(names, "length", LENGTHS[: 2 if arguments.quick else None])
        found = exponents(rows)
        print(json.dumps(found, indent=1))
        record = {"benchmark": f"growth, {part}", "quick": arguments.quick, "rows": rows}
        write(arguments.output / f"growth_{part}.json", record | {"exponents": found})


if __name__ == "__main__":
    main()
