"""What does a training step of the papers' models cost, compared with the published RTF and S4?

The models are those of `recipes/papers` at their full width, depth and length: Hyena and Hyena-RTF
as on WikiText-103, and RTF as on the Long Range Arena and Speech Commands. A step consists of a
forward pass, the loss, a backward pass and AdamW on random data, in bfloat16 if the recipe says so
and there is a GPU. The same models also run with the published layers in place of their mixers. The
published files contain no Hyena, so in Hyena models the published kernels replace the filters:

    --rtf PATH   folder of the published rtf.py (it needs einops)
    --s4 PATH    folder of the published s4.py (its models/s4; without compiled extensions)

On a GPU, the batch is the recipe's share of one device, and memory is the peak that PyTorch
allocates. On a processor, the batch size is 4 (1 for Hyena), and memory is the resident peak minus
that of an idle process. Every measurement is made in a process of its own. Its time is that of the
fastest of several steps, after two steps to warm up. If a measurement runs out of memory or time,
the output says so, and it is left out. After --limit seconds, no further step begins, but at least
one step is measured.

    python benchmarks/training_step.py [--rtf PATH] [--s4 PATH] [--cases NAME …] [--output PATH]
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._child import bound_memory, resident_peak, run
from benchmarks._published import First, module_from, published_s4
from benchmarks._report import write
from gramian import FIR, parameter_groups
from gramian.filters import Filter
from gramian.mixers import LongConvolution
from gramian.tasks import Description
from gramian.training import TrainingConfig, _run, load_config

ROOT = Path(__file__).resolve().parent.parent
CASES = {  # descriptions of the recipes' data, so that the data themselves are not needed
    "wikitext103_hyena": Description("tokens", 1024, vocab_size=50_257),
    "wikitext103_hyena_rtf": Description("tokens", 1024, vocab_size=50_257),
    "lra_listops": Description("classification", 2048, vocab_size=18, num_labels=10),
    "lra_text": Description("classification", 4096, vocab_size=259, num_labels=2),
    "lra_retrieval": Description("pairs", 4000, vocab_size=259, num_labels=2),
    "lra_image": Description("classification", 1024, input_size=1, num_labels=10),
    "lra_pathfinder": Description("classification", 1024, input_size=1, num_labels=2),
    "lra_pathx": Description("classification", 16_384, input_size=1, num_labels=2),
    "speech_commands": Description("classification", 16_000, input_size=1, num_labels=35),
}
SHARE = {"wikitext103_hyena": 16, "wikitext103_hyena_rtf": 16}  # sequences on each of 8 devices
SIDES = ("gramian", "RTF, published", "S4, published")
STATE = 64  # state size of the published S4, its default


class PublishedKernel(Filter):
    """A filter that returns the taps of a published kernel, for a Hyena layer."""

    name = "published"

    def __init__(self, kernel: nn.Module, channels: int, max_length: int) -> None:
        super().__init__(channels, max_length)
        self.kernel = kernel

    def forward(self, length: int | None = None) -> FIR:
        length = self.max_length if length is None else length
        if hasattr(self.kernel, "get_k"):
            taps = self.kernel.get_k(length)
        else:
            taps = self.kernel(L=length)[0][0]
        return FIR(taps)

    def reset_parameters(self) -> None:
        pass


def published_layer(mixer: LongConvolution, side: str, arguments: argparse.Namespace) -> nn.Module:
    """Make the published layer that replaces a long convolution."""
    filter, both = mixer.filter, mixer.bidirectional
    if side == "S4, published":
        s4 = published_s4(arguments.s4)
        layer = s4.FFTConv(
            mixer.width,
            l_max=filter.max_length,
            bidirectional=both,
            mode="dplr",
            activation=None,
            transposed=False,
            d_state=STATE,
        )
        return First(layer)
    denominators = filter.num_denominators // (1 + both)
    rtf = module_from(arguments.rtf, "rtf").RTF
    return rtf(
        mixer.width,
        filter.state_size,
        filter.max_length,
        num_a=max(1, denominators),
        bidirectional=both,
    )


def published_kernel(filter: Filter, side: str, arguments: argparse.Namespace) -> nn.Module:
    """Make the published kernel that replaces a Hyena layer's filter."""
    channels, length = filter.channels, filter.max_length
    if side == "S4, published":
        kernels = published_s4(arguments.s4).kernel_registry
        kernel = kernels["dplr"](d_model=channels, l_max=length, channels=1, d_state=STATE)
    else:
        kernel = module_from(arguments.rtf, "rtf").RTF(channels, STATE, length)
    return PublishedKernel(kernel, channels, length)


class Layer(nn.Module):
    """A published layer that a block can use as its mixer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return self.layer(x)


def model_of(name: str, side: str, arguments: argparse.Namespace) -> tuple[nn.Module, Any]:
    config = recipe(name)
    torch.manual_seed(0)
    model = _run._model(config, CASES[name])
    if side == "gramian":
        return model, config
    for parent in [*model.modules()]:
        for child, mixer in [*parent.named_children()]:
            if isinstance(mixer, LongConvolution):
                setattr(parent, child, Layer(published_layer(mixer, side, arguments)))
            elif child == "filter" and isinstance(mixer, Filter):
                parent.filter = published_kernel(mixer, side, arguments)
    return model, config


def recipe(name: str) -> TrainingConfig:
    return load_config(ROOT / "recipes" / "papers" / f"{name}.yaml", [])


def inputs(description: Description, batch: int, device: torch.device) -> dict[str, Tensor]:
    """Draw random data of a task's shape."""
    shape = (batch, description.length)
    made: dict[str, Tensor] = {}
    for suffix in ("", "_2") if description.kind == "pairs" else ("",):
        if description.input_size is not None:
            made["input_values"] = torch.randn(*shape, description.input_size)
        else:
            assert description.vocab_size is not None
            made[f"input_ids{suffix}"] = torch.randint(description.vocab_size, shape)
    if description.kind == "tokens":
        made["labels"] = made["input_ids"]
    else:
        assert description.num_labels is not None
        made["labels"] = torch.randint(description.num_labels, (batch,))
    return {key: value.to(device) for key, value in made.items()}


def child(arguments: argparse.Namespace) -> None:
    """Run one measurement in a process of its own, and print it as JSON."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    if not gpu:
        bound_memory()
    (name,), side = arguments.cases, arguments.child
    taken: list[float] = []
    figures: dict[str, Any] = {}
    if not arguments.idle:
        model, config = model_of(name, side, arguments)
        model.to(device).train()
        optimization = config.optimization
        batch = inputs(CASES[name], arguments.batch, device)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, optimization.learning_rate, optimization.weight_decay)
        )
        half = torch.autocast("cuda", torch.bfloat16) if gpu and config.hardware.bf16 else None
        began = time.perf_counter()
        while len(taken) < 5 or (len(taken) < 20 and time.perf_counter() - began < 5):
            start = time.perf_counter()
            with half or contextlib.nullcontext():
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if gpu:
                torch.cuda.synchronize()
            taken.append(1e3 * (time.perf_counter() - start))
            if time.perf_counter() - began > arguments.limit:
                break
        figures["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        figures["milliseconds"] = min(taken[2:] or taken)
        figures["loss"] = loss.item()
    figures["MiB"] = torch.cuda.max_memory_allocated() / 2**20 if gpu else resident_peak()
    print(json.dumps(figures))


def run_child(
    name: str, side: str, batch: int, arguments: argparse.Namespace, idle: bool = False
) -> dict[str, float] | None:
    command = [__file__, "--child", side, "--cases", name, "--batch", str(batch)]
    command += ["--limit", str(arguments.limit)] + ["--idle"] * idle
    for option in ("rtf", "s4"):
        if getattr(arguments, option):
            command += [f"--{option}", str(getattr(arguments, option))]
    return run(command, f"{name}, {side}", 120 + 4 * arguments.limit)


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rtf", type=Path, help="folder of the published rtf.py")
    parser.add_argument("--s4", type=Path, help="folder of the published s4.py")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--batch", type=int, help="number of sequences in a step")
    parser.add_argument(
        "--limit", type=float, default=60, help="largest number of seconds for a measurement"
    )
    parser.add_argument("--output", type=Path, default=here / "results" / "training_step.json")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--idle", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return

    gpu = torch.cuda.is_available()
    given = {"RTF, published": arguments.rtf, "S4, published": arguments.s4}
    sides = [side for side in SIDES if side == "gramian" or given[side]]
    rows: list[dict[str, Any]] = []
    for name in arguments.cases:
        if gpu:
            size = SHARE.get(name, recipe(name).optimization.batch_size)
        else:
            size = 1 if name in SHARE else 4
        size = arguments.batch or size
        idle = 0.0 if gpu else (run_child(name, "gramian", size, arguments, idle=True) or {})["MiB"]
        ours: dict[str, float] | None = None
        for side in sides:
            row: dict[str, Any] = {"recipe": name, "side": side, "batch": size}
            result = run_child(name, side, size, arguments)
            if result is None:
                print(f"{name:22} {side:15} out of memory or time", flush=True)
            else:
                row |= {**result, "MiB": result["MiB"] - idle}
                text = f"{row['milliseconds']:10.1f} ms {row['MiB']:8.0f} MiB"
                if side == "gramian":
                    ours = row
                elif ours is not None:
                    row["time over ours"] = row["milliseconds"] / ours["milliseconds"]
                    row["memory over ours"] = row["MiB"] / max(ours["MiB"], 1.0)
                    text += f"   {row['time over ours']:.2f}x, {row['memory over ours']:.2f}x ours"
                print(f"{name:22} {side:15} {text}", flush=True)
            rows.append(row)
    write(arguments.output, {"benchmark": "training steps of the papers' models", "rows": rows})


if __name__ == "__main__":
    main()
