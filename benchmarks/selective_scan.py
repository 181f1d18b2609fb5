"""How fast and small is S6, Mamba's block, in training on a processor?

The benchmark runs forward and backward passes of the block (projections, short convolution,
selective scan, gate). It compares them with transformers' `MambaMixer` with the same weights and
without compiled extensions: with its loop over time and, if the package mambapy is installed, with
its parallel scan. Outputs and gradients of the input are compared. Every measurement is made in a
process of its own. Its time is that of the fastest of several steps, and its memory is the resident
peak minus that of an idle process. A step that takes over 20 seconds is not repeated.

    python benchmarks/selective_scan.py [--output PATH]
"""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._child import resident_peak, run
from benchmarks._report import write
from gramian.mixers import S6

SIZES = [  # batch, length, width
    (32, 64, 64),
    (8, 1024, 64),
    (2, 1024, 256),
    (1, 4096, 128),
]
SIDES = {
    "gramian": "S6",
    "loop": "transformers, loop over time",
    "mambapy": "transformers, scan of mambapy",
}
STATE = 16


class Published(nn.Module):
    """The mixer of transformers, with the weights of a Gramian mixer."""

    def __init__(self, ours: S6, scan: bool) -> None:
        super().__init__()
        from transformers import MambaConfig
        from transformers.models.mamba.modeling_mamba import MambaMixer

        config = MambaConfig(
            hidden_size=ours.width,
            state_size=ours.state_size,
            time_step_rank=ours.step_rank,
            use_mambapy=scan,
        )
        self.mixer = MambaMixer(config, 0)
        own = ours.state_dict()
        names = {
            "in_proj.weight": "in_proj.weight",
            "conv1d.bias": "short.bias",
            "x_proj.weight": "x_proj.weight",
            "dt_proj.weight": "dt_proj.weight",
            "dt_proj.bias": "dynamics.dt_bias",
            "A_log": "dynamics.A_log",
            "D": "dynamics.D",
            "out_proj.weight": "out_proj.weight",
        }
        state = {name: own[source] for name, source in names.items()}
        # In transformers, the tap of the present comes last.
        state["conv1d.weight"] = own["short.weight"].flip(-1).unsqueeze(1)
        self.mixer.load_state_dict(state)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x)


def child(side: str, batch: int, length: int, width: int, idle: bool) -> None:
    """Run one measurement, and print it as JSON."""
    torch.manual_seed(0)
    ours = S6(width, STATE)
    mixer = ours if side == "gramian" else Published(ours, side == "mambapy")
    mixer.train()
    torch.manual_seed(1)
    x = torch.randn(batch, length, width, requires_grad=True)
    figures: dict[str, Any] = {}
    taken: list[float] = []
    began = time.perf_counter()
    while not idle and len(taken) < 20:
        spent = time.perf_counter() - began
        if spent > 20 or (len(taken) >= 4 and spent > 3):
            break
        x.grad = None
        start = time.perf_counter()
        y = mixer(x)
        y.square().sum().backward()
        taken.append(1e3 * (time.perf_counter() - start))
        figures["output"], figures["gradient"] = y.norm().item(), x.grad.norm().item()
    figures["milliseconds"] = min(taken, default=0.0)
    figures["MiB"] = resident_peak()
    print(json.dumps(figures))


def measure(side: str, size: tuple[int, int, int], idle: bool = False) -> dict[str, float]:
    command = [__file__, "--child", side, "--size", *map(str, size), *["--idle"] * idle]
    figures = run(command, side)
    if figures is None:
        raise SystemExit(f"{side}: out of memory.")
    return figures


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=here / "results" / "selective_scan.json")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--size", nargs=3, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--idle", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, *arguments.size, arguments.idle)
        return

    rows = []
    for size in SIZES:
        ours: dict[str, float] = {}
        for side, name in SIDES.items():
            if side == "mambapy" and importlib.util.find_spec("mambapy") is None:
                continue
            figures = measure(side, size)
            figures["MiB"] -= measure(side, size, idle=True)["MiB"]
            row = {"side": name, **dict(zip(("batch", "length", "width"), size, strict=True))}
            text = f"{figures['milliseconds']:8.1f} ms {figures['MiB']:7.0f} MiB"
            if side == "gramian":
                ours = figures
            else:
                row["time over ours"] = figures["milliseconds"] / ours["milliseconds"]
                row["memory over ours"] = figures["MiB"] / max(ours["MiB"], 1.0)
                row["difference"] = max(
                    abs(figures[key] / ours[key] - 1) for key in ("output", "gradient")
                )
                text += f"   {row['time over ours']:.1f}x, {row['memory over ours']:.1f}x ours"
                text += f", norms within {row['difference']:.0e}"
            rows.append({**row, **figures})
            print(f"{size!s:18} {name:30} {text}", flush=True)
    write(arguments.output, {"benchmark": "training step of S6", "state": STATE, "rows": rows})


if __name__ == "__main__":
    main()
