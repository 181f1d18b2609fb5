"""How do time and memory of a training step grow with the length and with the state?

The benchmark runs forward and backward passes of one layer on the processor in float32, with inputs
(batch, length, channels). It compares `LongConvolution` with this library's filters RTF, S4D and S4
with the packages s5-pytorch and mambapy, if they are installed, and with the published RTF and S4,
if they are given:

    --rtf PATH   folder of the published rtf.py (it needs einops)
    --s4 PATH    folder of the published s4.py (its models/s4; without compiled extensions)

Every measurement is made in a fresh process. Its time is that of the fastest of several steps,
after one step to warm up. Its memory is the peak resident memory, minus that of a process that
imports the same modules and makes the same input. Layers that run out of memory (three quarters of
the machine's) or take longer than --limit seconds are left out and named. Two figures are written
beside the results: one shows the cost against the length at one state size, and the other against
the state size at one length.

    python benchmarks/layers.py [--rtf PATH] [--s4 PATH] [--quick] [--output PATH] [--figures DIR]
"""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._child import bound_memory, resident_peak, run
from benchmarks._published import First, module_from, published_s4
from benchmarks._report import write

CHANNELS = 64
LENGTHS = (1024, 4096, 16384, 65536)
STATES = (16, 64, 256, 1024)
LENGTH, STATE = 4096, 64  # the value of each while the other varies
OURS = {"RTF": "rtf", "S4D": "s4d", "S4": "s4"}
COLOURS = {"RTF": "tab:blue", "S4D": "tab:green", "S4": "tab:red", "S5": "tab:purple"}


def layer_of(side: str, length: int, state: int, arguments: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    if side in OURS:
        from gramian.filters import build
        from gramian.mixers import LongConvolution

        options = {"initialization": "montel"} if side == "RTF" else {}
        config = {"type": OURS[side], "state_size": state, **options}
        return LongConvolution(build(config, channels=CHANNELS, max_length=length))
    if side == "RTF, published":
        return module_from(arguments.rtf, "rtf").RTF(CHANNELS, state, length, init="montel")
    if side in ("S4, published", "S4D, published"):
        mode = "dplr" if side.startswith("S4,") else "diag"
        published = published_s4(arguments.s4).FFTConv
        return First(
            published(
                CHANNELS,
                l_max=length,
                mode=mode,
                activation=None,
                transposed=False,
                d_state=state,
            )
        )
    if side == "S5 (s5-pytorch)":
        from s5 import S5

        return S5(CHANNELS, state)
    assert side == "Mamba (mambapy)"
    from mambapy.mamba import MambaBlock, MambaConfig

    return MambaBlock(MambaConfig(d_model=CHANNELS, n_layers=1, d_state=state))


def sides(arguments: argparse.Namespace) -> list[str]:
    found = list(OURS)
    if arguments.rtf:
        found.append("RTF, published")
    if arguments.s4:
        found += ["S4D, published", "S4, published"]
    for name, package in (("S5 (s5-pytorch)", "s5"), ("Mamba (mambapy)", "mambapy")):
        if importlib.util.find_spec(package):
            found.append(name)
    return found


def child(arguments: argparse.Namespace) -> None:
    """Run one measurement in a process of its own, and print the result as JSON."""
    bound_memory()
    length, state = arguments.length, arguments.state
    u = torch.randn(arguments.batch, length, CHANNELS).requires_grad_()
    g = torch.randn(arguments.batch, length, CHANNELS)
    layer = layer_of(arguments.child, length, state, arguments)
    taken: list[float] = []
    if not arguments.idle:
        began = time.perf_counter()
        while len(taken) < 4 or (len(taken) < 30 and time.perf_counter() - began < 3):
            layer.zero_grad()
            u.grad = None
            start = time.perf_counter()
            layer(u).backward(g)
            taken.append(1e3 * (time.perf_counter() - start))
            if time.perf_counter() - began > arguments.limit:
                break
    figures = {"milliseconds": min(taken[1:] or taken or [0.0]), "peak MiB": resident_peak()}
    print(json.dumps(figures))


def run_child(
    side: str, length: int, state: int, arguments: argparse.Namespace, idle: bool = False
) -> dict[str, float] | None:
    command = [__file__, "--child", side, "--length", str(length)]
    command += ["--state", str(state), "--batch", str(arguments.batch)]
    command += ["--limit", str(arguments.limit)] + ["--idle"] * idle
    for name in ("rtf", "s4"):
        if getattr(arguments, name):
            command += [f"--{name}", str(getattr(arguments, name))]
    return run(command, f"{side} at length {length}, state {state}", 60 + 6 * arguments.limit)


def measure(side: str, length: int, state: int, arguments: argparse.Namespace) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": side, "length": length, "state": state}
    result = run_child(side, length, state, arguments)
    if result is None:
        print(f"{side:18} length {length:6} state {state:5}   out of memory or time", flush=True)
        return row
    idle = run_child(side, length, state, arguments, idle=True)
    assert idle is not None
    row["milliseconds"] = result["milliseconds"]
    row["MiB"] = max(result["peak MiB"] - idle["peak MiB"], 0.0)
    print(
        f"{side:18} length {length:6} state {state:5}{row['milliseconds']:11.1f} ms"
        f"{row['MiB']:9.0f} MiB",
        flush=True,
    )
    return row


def ratios(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the ratios of the most important comparisons, at all sizes at which both sides ran."""
    at = {(r["layer"], r["length"], r["state"]): r for r in rows if "milliseconds" in r}
    found: dict[str, Any] = {}

    def compare(name: str, theirs: str, ours: str, state: int | None = None) -> None:
        speed = {
            f"length {length}, state {n}": their["milliseconds"]
            / at[ours, length, n]["milliseconds"]
            for (layer, length, n), their in at.items()
            if layer == theirs and (ours, length, n) in at and state in (None, n)
        }
        if speed:
            logs = torch.tensor(list(speed.values()), dtype=torch.float64).log()
            found[name] = {"geometric mean": float(logs.mean().exp()), **speed}

    compare("RTF here over the published RTF", "RTF, published", "RTF")
    compare("RTF here over the published S4, state 64", "S4, published", "RTF", 64)
    compare("S4D here over the published S4D", "S4D, published", "S4D")
    compare("S4 here over the published S4", "S4, published", "S4")
    growth = [at[key] for key in at if key[0] == "RTF" and key[1] == LENGTH]
    for figure in ("milliseconds", "MiB"):
        values = {row["state"]: row[figure] for row in growth}
        if len(values) > 1:
            name = f"RTF at the largest state over the smallest, {figure}"
            found[name] = values[max(values)] / max(values[min(values)], 1e-9)
    return found


def draw(rows: list[dict[str, Any]], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for axis, other, fixed in (("length", "state", STATE), ("state", "length", LENGTH)):
        figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for panel, key, label in zip(
            panels, ("milliseconds", "MiB"), ("training step, ms", "peak memory, MiB"), strict=True
        ):
            for side in dict.fromkeys(row["layer"] for row in rows):
                points = sorted(
                    (row[axis], row[key])
                    for row in rows
                    if row["layer"] == side and row[other] == fixed and key in row
                )
                if points:
                    theirs = side not in OURS
                    panel.loglog(
                        *zip(*points, strict=True),
                        "o--" if theirs else "o-",
                        label=side,
                        color=COLOURS.get(side.split(",")[0].split(" ")[0], "tab:gray"),
                        alpha=0.6 if theirs else 1,
                    )
            panel.set_xlabel("sequence length" if axis == "length" else "state size")
            panel.set_ylabel(label)
            panel.grid(alpha=0.3)
        panels[0].set_title(f"{other} {fixed}", loc="left", fontsize=10)
        panels[1].legend(fontsize=8)
        path = folder / f"layers_against_{axis}.png"
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        print(f"drew {path}")


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rtf", type=Path, help="folder of the published rtf.py")
    parser.add_argument("--s4", type=Path, help="folder of the published s4.py")
    parser.add_argument("--quick", action="store_true", help="only the smaller sizes")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--limit", type=float, default=30, help="seconds for a measurement")
    parser.add_argument("--output", type=Path, default=here / "results" / "layers.json")
    parser.add_argument("--figures", type=Path, default=here.parent / "docs" / "figures")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--idle", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--state", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return

    lengths = LENGTHS[:2] if arguments.quick else LENGTHS
    states = STATES[:2] if arguments.quick else STATES
    sizes = dict.fromkeys(
        [(length, STATE) for length in lengths] + [(LENGTH, state) for state in states]
    )
    # The sides take turns at every size, so that a slowdown of the machine affects all of them.
    rows = [measure(side, *size, arguments) for size in sizes for side in sides(arguments)]
    found = ratios(rows)
    for name, value in found.items():
        if isinstance(value, dict):
            mean, *_ = value.values()
            low, high = (f(v for k, v in value.items() if "mean" not in k) for f in (min, max))
            print(f"{name}: {mean:.1f}x (geometric mean; {low:.1f}x to {high:.1f}x)")
        else:
            print(f"{name}: {value:.2f}x")
    write(
        arguments.output,
        {
            "benchmark": "layers, forward and backward",
            "channels": CHANNELS,
            "batch": arguments.batch,
            "dtype": "float32",
            "rows": rows,
            "ratios": found,
        },
    )
    draw(rows, arguments.figures)


if __name__ == "__main__":
    main()
