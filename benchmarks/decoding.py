"""How fast does a recurrence generate at any context, compared with a transformer with a cache?

The models have 12 layers, 37 to 38 million parameters outside the embedding, width 512, a
vocabulary of 50,257 and random weights, which do not change the speed. They run on the CPU.
Transformers' GPT-2 has eager or SDPA attention, and the dynamic or the static cache. It is compared
with Hyena and MultiHyena with modal filters of 16 complex modes, before and after
`compile_decoding()`. A step is one forward pass of one token per sequence and the choice of the
best token. Contexts are not read: GPT-2's caches are filled with random numbers, and the state of a
recurrence has the same size at every context. The sides take turns within a round, and their minima
over all rounds are compared. Times are processor time with one thread (the default), and wall time
with several threads.

Parts, chosen with `--part`:

`transformer`  compares times at batch 16 and context 4,096, and at batch 1 and context 512, and
               the bytes of the states.
`axes`         measures tokens a second against batch size, prompt length and generated tokens. The
               time of the generated tokens is their number times the time of a step in the middle.
               The time of a prompt is measured.
`memory`       measures how much the resident memory grows over 500 generated tokens, from the
               100th.
`exact`        compares a model with implicit filters of 2,048 taps, which generates by online
               convolution, with a model of the same shape with modal filters. Two layers of width
               256, eight heads and four sequences are chosen so that the exact state fits into
               memory. The steps fill one whole window, over which the cost of online convolution
               repeats.
`trained`      compares the model in the folder `--model`, such as the one that `make demo` trains,
               with the model that `gramian.distill` makes of it at the tolerance `--tol`.
`million`      reads a prompt of 2^20 tokens with a model of the size of HyenaDNA (width 256, 8
               layers), in a process of its own, and measures its peak of resident memory.

    python benchmarks/decoding.py [--part transformer axes …] [--quick] [--threads N]
"""

import argparse
import copy
import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._report import write
from gramian.distillation import distill
from gramian.models import GramianConfig, GramianForCausalLM, load

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"
VOCABULARY, WIDTH, LAYERS, MODES, HEADS = 50_257, 512, 12, 16, 32
EXACT_BATCH = 4

Step = Callable[[], None]


def gramian_model(mixer: str, **changes: Any) -> GramianForCausalLM:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_heads": HEADS,
        "mixers": mixer,
        "filter": {"type": "modal", "orders": MODES},
        "max_position_embeddings": 2048,
    }
    return GramianForCausalLM(GramianConfig(**(settings | changes))).eval()


def transformer(attention: str) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=8,
        n_positions=16_384,
        attn_implementation=attention,
    )
    return GPT2LMHeadModel(config).eval()


def parameters(model: torch.nn.Module) -> int:
    """Count the parameters, without the embeddings and the output projection tied to them."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    return sum(p.numel() for p in model.parameters() if id(p) not in embeddings)


def recurrent_step(model: GramianForCausalLM, batch: int) -> tuple[Step, int]:
    """Return a function that runs one step of a recurrence, and the state's size in bytes."""
    tokens = torch.randint(0, model.config.vocab_size, (batch, 4))
    cache = model.prefill(tokens).past_key_values
    last = tokens[:, -1:]

    def step() -> None:
        nonlocal last
        logits = model(last, past_key_values=cache, logits_to_keep=1).logits
        last = logits[:, -1].argmax(-1, keepdim=True)

    return step, cache.nbytes


def transformer_step(
    model: GPT2LMHeadModel, kind: str, batch: int, context: int, steps: int
) -> tuple[Step, int]:
    """Return a function that runs one step of a transformer, and its cache's size in bytes.

    The cache is filled with `context` random keys and values.
    """
    config = model.config
    cache = (
        DynamicCache(config=config)
        if kind == "dynamic"
        else StaticCache(config=config, max_cache_len=context + steps)
    )
    shape = (batch, config.n_head, context, config.n_embd // config.n_head)
    for layer in range(config.n_layer):
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    last = torch.randint(0, config.vocab_size, (batch, 1))

    def step() -> None:
        nonlocal last
        logits = model(last, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        last = logits[:, -1].argmax(-1, keepdim=True)

    numbers = 2 * config.n_layer * batch * context * config.n_embd
    return step, 4 * numbers


def now() -> float:
    """Return processor seconds if this process has one thread, otherwise wall-clock seconds.

    Other processes on the machine change the processor time only a little.
    """
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(step: Step) -> float:
    started = now()
    step()
    return now() - started


def take_turns(sides: dict[str, Step], rounds: int) -> dict[str, float]:
    """Return the least seconds of each side's step over `rounds`, after one round to warm up."""
    least = dict.fromkeys(sides, float("inf"))
    for step in sides.values():
        step()
    for _ in range(rounds):
        for name, step in sides.items():
            least[name] = min(least[name], timed(step))
    return least


def recurrent_sides(batch: int) -> tuple[dict[str, Step], dict[str, int], dict[str, int]]:
    sides, sizes, counts = {}, {}, {}
    for mixer in ("hyena", "multi_hyena"):
        for compiled in (False, True):
            name = f"{mixer}{' compiled' if compiled else ''}"
            model = gramian_model(mixer)
            model.compile_decoding(compiled)
            sides[name], sizes[name] = recurrent_step(model, batch)
            counts[name] = parameters(model)
    return sides, sizes, counts


@torch.no_grad()
def against_transformer(quick: bool) -> dict[str, Any]:
    results = {}
    for batch, context, rounds in ((16, 4096, 3), (1, 512, 20)):
        if quick:
            context, rounds = context // 8, 2
        ours, sizes, counts = recurrent_sides(batch)
        seconds: dict[str, float] = {}
        for attention in ("sdpa", "eager"):
            model = transformer(attention)
            counts["gpt2"] = parameters(model)
            for kind in ("dynamic", "static"):
                name = f"gpt2 {attention} {kind}"
                step, sizes[name] = transformer_step(model, kind, batch, context, rounds + 2)
                for key, value in take_turns({**ours, name: step}, rounds).items():
                    seconds[key] = min(seconds.get(key, value), value)
                del step
                gc.collect()
        rate = {name: batch / value for name, value in seconds.items()}
        best = {
            kind: max(rate[f"gpt2 {a} {kind}"] for a in ("sdpa", "eager"))
            for kind in ("dynamic", "static")
        }
        print(f"\nbatch {batch}, context {context}: tokens a second")
        for name, value in rate.items():
            ratios = "".join(f"  {value / best[kind]:6.2f} x {kind}" for kind in best)
            print(f"{name:>22} {value:9.1f}{ratios}  {sizes[name] / 2**20:9.1f} MiB")
        announced = {
            mixer: [gramian_model(mixer).state_bytes(batch, c) for c in (1, 512, 4096, 2**20)]
            for mixer in ("hyena", "multi_hyena")
        }
        for mixer, bytes_at in announced.items():
            print(f"{mixer}: bytes of state at contexts 1, 512, 4,096 and 1,048,576: {bytes_at}")
        results[f"batch {batch}, context {context}"] = {
            "tokens_per_second": rate,
            "best_transformer": best,
            "ratio_to_dynamic": {n: v / best["dynamic"] for n, v in rate.items()},
            "ratio_to_static": {n: v / best["static"] for n, v in rate.items()},
            "cache_bytes": sizes,
            "state_bytes_at_contexts": announced,
            "parameters_outside_embeddings": counts,
        }
    return results


@torch.no_grad()
def along_axes(quick: bool) -> dict[str, Any]:
    """Measure the tokens per second of generation along each axis, while the others are fixed."""
    models = {"Hyena": gramian_model("hyena"), "MultiHyena": gramian_model("multi_hyena")}
    for model in models.values():
        model.compile_decoding()
    gpt2 = transformer("sdpa")
    kinds = ("dynamic", "static")
    rounds = 2 if quick else 4

    def sides(batch: int, context: int) -> dict[str, Step]:
        made = {name: recurrent_step(model, batch)[0] for name, model in models.items()}
        for kind in kinds:
            step = transformer_step(gpt2, kind, batch, context, rounds + 2)[0]
            made[f"GPT-2, {kind} cache"] = step
        return made

    def rates(batch: int, context: int) -> dict[str, float]:
        return {n: batch / s for n, s in take_turns(sides(batch, context), rounds).items()}

    batches = {b: rates(b, 512) for b in ((1, 4) if quick else (1, 4, 16, 64))}
    prompts = {p: rates(4, p) for p in ((128, 512) if quick else (128, 512, 2048, 8192))}
    # Along the axis of generated tokens, the prompt is read and timed too.
    prompt = torch.randint(0, VOCABULARY, (4, 64 if quick else 512))
    reading = {}
    for name, model in (*models.items(), ("GPT-2", gpt2)):
        reading[name] = min(
            timed(lambda model=model: model(prompt, use_cache=True, logits_to_keep=1))
            for _ in range(2)
        )
    generated: dict[int, dict[str, float]] = {}
    for count in (16, 64) if quick else (64, 256, 1024, 4096):
        middle = rates(4, prompt.shape[1] + count // 2)
        generated[count] = {
            name: 4 * count / (reading[name.split(",")[0]] + 4 * count / rate)
            for name, rate in middle.items()
        }
    axes = {"batch size": batches, "prompt length": prompts, "generated tokens": generated}
    for axis, points in axes.items():
        print(f"\ntokens a second against {axis}")
        for at, rate in points.items():
            print(f"{at:>6}  " + "  ".join(f"{name} {value:.1f}" for name, value in rate.items()))
    return {"axes": axes, "seconds_to_read_prompt": reading}


def draw(axes: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fixed = {
        "batch size": "context 512",
        "prompt length": "batch 4",
        "generated tokens": "batch 4, prompt 512",
    }
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), sharey=False)
    for panel, (axis, points) in zip(panels, axes.items(), strict=True):
        for name in next(iter(points.values())):
            at = [int(value) for value in points]
            panel.plot(at, [rate[name] for rate in points.values()], "o-", ms=4, label=name)
        panel.set(xscale="log", yscale="log", xlabel=axis, title=fixed[axis])
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("tokens a second")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def resident() -> int:
    """Return the bytes of resident memory in use now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def growth(quick: bool) -> dict[str, Any]:
    """Measure the resident memory while `generate` runs."""
    results = {}
    for mixer in ("hyena", "multi_hyena"):
        model = gramian_model(mixer)
        model.compile_decoding()
        prompt = torch.randint(0, VOCABULARY, (1, 16))
        seen: list[int] = []

        class Watch:
            def put(self, value: Tensor, seen: list[int] = seen) -> None:
                seen.append(resident())

            def end(self) -> None:
                pass

        count = 150 if quick else 500
        model.generate(prompt, max_new_tokens=count, do_sample=False, streamer=Watch())
        start, end = seen[min(100, count // 2)], seen[-1]
        results[mixer] = {"tokens": count, "bytes_after_100": start, "bytes_at_the_end": end}
        percent = 100 * (end / start - 1)
        print(f"{mixer}: resident memory grows by {percent:.2f}% to token {count}")
    return results


@torch.no_grad()
def against_exact(quick: bool) -> dict[str, Any]:
    """Compare modal filters with online convolution."""
    results = {}
    taps = 256 if quick else 2048
    shape = {"hidden_size": 256, "num_hidden_layers": 2, "num_heads": 8, "vocab_size": 259}
    for mixer in ("hyena", "multi_hyena"):
        kinds = {"exact": {"type": "implicit"}, "distilled": {"type": "modal", "orders": MODES}}
        models = {
            name: gramian_model(mixer, **shape, filter=kind, max_position_embeddings=taps)
            for name, kind in kinds.items()
        }
        results[mixer] = through_a_window(mixer, models["exact"], models["distilled"], EXACT_BATCH)
    return {**results, "shape": shape, "batch": EXACT_BATCH}


def trained(folder: Path, tol: float, batch: int) -> dict[str, Any]:
    """Compare a trained model with the model that is distilled from it."""
    original = load(folder)
    distilled, report = distill(original, tol)
    print(f"\n{report.summary}")
    found = through_a_window("trained", original, distilled, batch)
    orders = {"mean order": report.mean_order, "largest order": max(report.orders)}
    return {**found, **orders, "tol": tol, "batch": batch}


@torch.no_grad()
def through_a_window(
    name: str, exact: GramianForCausalLM, distilled: GramianForCausalLM, batch: int
) -> dict[str, Any]:
    """Measure the seconds of one window of steps on each side.

    A window has as many steps as the filters have taps. The cost of online convolution repeats with
    every window.
    """
    taps = exact.config.max_position_embeddings
    compiled = copy.deepcopy(distilled)
    compiled.compile_decoding(True)
    models = {"exact": exact, "distilled": distilled, "distilled, compiled": compiled}
    total, steps, size = dict.fromkeys(models, 0.0), {}, {}
    for side, model in models.items():
        steps[side], size[side] = recurrent_step(model, batch)
        for _ in range(3):  # a side that is to be compiled is compiled here
            steps[side]()
    for _ in range(taps):
        for side, step in steps.items():
            total[side] += timed(step)
    ratio = {side: total["exact"] / value for side, value in total.items()}
    print(f"\n{name}, {taps} steps, batch {batch}: exact {total['exact']:.2f} s")
    for side in ("distilled", "distilled, compiled"):
        print(f"  {side}: {total[side]:.2f} s, {ratio[side]:.2f} x as fast")
    return {"seconds": total, "ratio": ratio, "state_bytes": size, "taps": taps}


def million(quick: bool) -> dict[str, Any]:
    """Read the long prompt in a fresh process, so that the peak of memory is that of the prompt."""
    length = 2**16 if quick else 2**20
    command = [sys.executable, __file__, "--prompt", str(length)]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{length} tokens read in {result['seconds']:.0f} s, peak {result['peak_gib']:.2f} GiB")
    return result


def read_prompt(length: int) -> None:
    from rich.console import Console
    from rich.progress import Progress

    changes = {"hidden_size": 256, "num_hidden_layers": 8, "vocab_size": 16}
    model = gramian_model("hyena", **changes, max_position_embeddings=length)
    tokens = torch.randint(0, 16, (1, length))
    started, on_the_wall = now(), time.perf_counter()
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("Reading the prompt", total=length)
        outputs = model.prefill(
            tokens, progress=lambda done, total: progress.update(task, completed=done)
        )
    seconds, on_the_wall = now() - started, time.perf_counter() - on_the_wall
    written = model.generate(
        tokens[:, -1:],
        attention_mask=torch.ones(1, length + 1),
        past_key_values=outputs.past_key_values,
        max_new_tokens=32,
        do_sample=False,
    )
    assert written.shape[1] == 33
    # ru_maxrss would be the parent's peak, if that is larger.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024 / 2**30
    result = {"tokens": length, "seconds": seconds, "wall_seconds": on_the_wall}
    result |= {"peak_gib": peak, "chunk_size": 16_384}
    result |= {"state_bytes": outputs.past_key_values.nbytes, "parameters": parameters(model)}
    print(json.dumps(result))


PARTS = {
    "transformer": against_transformer,
    "axes": along_axes,
    "memory": growth,
    "exact": against_exact,
    "million": million,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=[*PARTS, "trained"], default=list(PARTS))
    parser.add_argument("--model", type=Path, help="folder of the model for the part trained")
    parser.add_argument("--tol", type=float, default=0.02, help="tolerance for the part trained")
    parser.add_argument("--batch", type=int, default=16, help="batch size for the part trained")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    parser.add_argument("--prompt", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.prompt is not None:
        read_prompt(arguments.prompt)
        return
    if "trained" in arguments.part and arguments.model is None:
        raise SystemExit("the part trained needs --model FOLDER.")
    for part in arguments.part:
        if part == "trained":
            results = trained(arguments.model, arguments.tol, arguments.batch)
        else:
            results = PARTS[part](arguments.quick)
        settings: dict[str, Any] = {
            "width": WIDTH,
            "layers": LAYERS,
            "modes": MODES,
            "heads": HEADS,
        }
        clock = "processor" if arguments.threads == 1 else "wall"
        settings |= {"clock": clock}
        record = {"benchmark": f"decoding, {part}", **settings, "quick": arguments.quick, **results}
        write(arguments.output / f"decoding_{part}.json", record)
        if part == "axes":
            draw(results["axes"], arguments.figures / "decoding.png")


if __name__ == "__main__":
    main()
