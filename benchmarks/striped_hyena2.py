"""How fast and small is StripedHyena 2, beside the published modules, on a processor?

The model has the shape of the unreleased Evo 2 of 50 million parameters at width 512: 11 blocks
(short, medium and long Hyena three times each, two of attention), 8 heads, 64 filters for the short
and the medium operators. Its random weights are written once in the published layout, in bfloat16;
both sides read that file and compute in float32. The published side is a folder with a clone of
Zymrael/vortex, whose modules are run as they are but for what a processor does not have: CUDA's
device context, the compiled extension of flash attention, and the Triton kernel of the rotary
positions, in whose place stands the library's own version in PyTorch. It needs the package einops.

Parts, chosen with `--part`:

`time`     a prompt of each length into a new cache, and the tokens after it, batch 1. Each side is
           a process of its own, which stays; the two take turns, and minima over all rounds are
           compared: seconds on the processor with one thread (the default), on the wall with more.
           First the logits of both are compared, whole and from the cache.
`memory`   growth of the resident peak over a loaded model while a prompt is read, each in a process
           of its own.
`convert`  the resident peak of `gramian convert` on a file of about 300 MB, above that on a file of
           a few, beside the size of the file and of its largest layer.

    python benchmarks/striped_hyena2.py --vortex FOLDER [--part time …] [--quick] [--threads N]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._child import resident_peak, run
from benchmarks._report import write

RESULTS = Path(__file__).parent / "results"
LENGTHS = (1, 6, 128, 512, 2048, 8192)
STEPS = 24
SIDES = ("gramian", "vortex")
ORDER = ("hcs", "hcm", "hcl", "attn", "hcs", "hcm", "hcl", "hcs", "hcm", "hcl", "attn")
WIDTH, INNER = 512, 1376
WIDE, WIDE_INNER = 1024, 2736  # of the part convert


def configuration(width: int, inner: int, repeats: int = 1) -> dict[str, Any]:
    """The published keys of a model of `repeats` times 11 blocks."""
    order = ORDER * repeats
    return {
        "vocab_size": 512,
        "hidden_size": width,
        "num_filters": width,
        "num_layers": len(order),
        **{f"{kind}_layer_idxs": [i for i, k in enumerate(order) if k == kind] for kind in ORDER},
        "hcs_filter_length": 7,
        "hcm_filter_length": 128,
        "hcs_filter_groups": width // 8,
        "hcm_filter_groups": width // 8,
        "hcl_filter_groups": width,
        "hyena_filter_groups": 1,
        "short_filter_length": 3,
        "short_filter_bias": False,
        "num_attention_heads": width // 64,
        "proj_groups": 1,
        "state_size": 16,
        "eps": 1e-6,
        "rotary_emb_base": 10_000,
        "inner_mlp_size": inner,
        "inner_size_multiple_of": 16,
        "model_parallel_size": 1,
        "pipe_parallel_size": 1,
        "column_split": True,
        "column_split_hyena": False,
        "interleave": True,
        "hyena_flip_x1x2": False,
        "evo2_style_activations": True,
        "tie_embeddings": True,
        "mha_out_proj_bias": True,
        "hyena_out_proj_bias": True,
        "qkv_proj_bias": False,
        "final_norm": True,
        "mlp_activation": "gelu",
        "max_seqlen": 16_384,
        "max_batch_size": 1,
        "prefill_style": "fft",
        "inference_mode": True,
        "print_activations": False,
        "use_flash_attn": False,
        "use_flash_rmsnorm": False,
        "use_flash_depthwise": False,
        "use_flashfft": False,
        "use_fp8_input_projections": False,
    }


def draw_checkpoint(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random tensors in the published layout and dtypes."""
    draw = torch.Generator().manual_seed(0)
    width, inner = config["hidden_size"], config["inner_mlp_size"]

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=draw)).bfloat16()

    def linear(rows: int, columns: int) -> Tensor:
        return normal(rows, columns, scale=columns**-0.5)

    def near_one() -> Tensor:
        return (1 + 0.1 * torch.randn(width, generator=draw)).bfloat16()

    tensors = {"embedding_layer.weight": normal(config["vocab_size"], width)}
    tensors["unembed.weight"] = tensors["embedding_layer.weight"].clone()
    tensors["norm.scale"] = near_one()
    for layer, kind in enumerate(ORDER * (config["num_layers"] // len(ORDER))):
        own = {
            "pre_norm.scale": near_one(),
            "post_norm.scale": near_one(),
            "mlp.l1.weight": linear(inner, width),
            "mlp.l2.weight": linear(inner, width),
            "mlp.l3.weight": linear(width, inner),
        }
        if kind == "attn":
            half = width // config["num_attention_heads"] // 2
            frequencies = config["rotary_emb_base"] ** (-torch.arange(half) / half)
            own["inner_mha_cls.Wqkv.weight"] = linear(3 * width, width)
            own["inner_mha_cls.out_proj.weight"] = linear(width, width)
            own["inner_mha_cls.out_proj.bias"] = normal(width, scale=0.1)
            own["inner_mha_cls.rotary_emb.inv_freq"] = frequencies.bfloat16()
        else:
            own["projections.weight"] = linear(3 * width, width)
            own["filter.short_filter_weight"] = normal(3 * width, 1, 3, scale=0.5)
            own["out_filter_dense.weight"] = linear(width, width)
            own["out_filter_dense.bias"] = normal(width, scale=0.1)
        if kind == "hcl":
            states = config["state_size"]
            own["filter.log_poles"] = -0.02 - 2 * torch.rand(width, states, 1, generator=draw)
            own["filter.residues"] = 0.07 * torch.randn(width, states, generator=draw)
        elif kind != "attn":
            taps = config[f"{kind}_filter_length"]
            groups = config[f"{kind}_filter_groups"]
            own["filter.h"] = normal(groups, 1, taps, scale=taps**-0.5)
        if kind in ("hcm", "hcl"):
            own["filter.D"] = normal(width, scale=0.5)
        tensors |= {f"blocks.{layer}.{name}": value for name, value in own.items()}
    return tensors


def write_checkpoint(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / f"model_{config['hidden_size']}_{config['num_layers']}.pt"
    torch.save(draw_checkpoint(config), path)
    path.with_suffix(".json").write_text(json.dumps(config), encoding="utf-8")
    return path


# --- the two sides -------------------------------------------------------------------------------


class Ours:
    """Gramian's model of the file."""

    def __init__(self, path: Path) -> None:
        from gramian import checkpoints

        self.model = checkpoints.load(path, dtype=torch.float32).model.eval()
        self.cache: Any = None

    def whole(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits

    def prefill(self, tokens: Tensor, steps: int) -> Tensor:
        outputs = self.model.prefill(tokens)
        self.cache = outputs.past_key_values
        return outputs.logits[:, -1]

    def step(self, token: Tensor) -> Tensor:
        return self.model(token, past_key_values=self.cache, use_cache=True).logits[:, -1]


class Settings(dict[str, Any]):
    """A configuration whose keys are attributes too, as the published modules read it."""

    __getattr__ = dict.__getitem__


class Theirs:
    """The published modules with the same file."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.modules = published_modules(folder)
        self.model: Any
        settings = Settings(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
        kinds = ("attn_block", "hyena_block", "mlp", "params")
        settings |= {f"{kind}_dtype": torch.float32 for kind in kinds}
        self.model = self.modules.StripedHyena(settings).float().eval()
        stored = torch.load(path, map_location="cpu", weights_only=True)
        self.model.custom_load_state_dict({name: value.float() for name, value in stored.items()})
        self.states: Any = None

    def whole(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)[0]

    def prefill(self, tokens: Tensor, steps: int) -> Tensor:
        self.states = self.model.initialize_inference_params(max_seqlen=tokens.shape[1] + steps)
        logits, self.states = self.model(tokens, inference_params_dict=self.states)
        for state in self.states.values():
            state.seqlen_offset = tokens.shape[1]
        return logits[:, -1]

    def step(self, token: Tensor) -> Tensor:
        logits, self.states = self.model(token, inference_params_dict=self.states)
        for state in self.states.values():
            state.seqlen_offset += 1
        return logits[:, -1]


def published_modules(folder: Path) -> Any:
    """The published model's module, with stand-ins for what a processor does not have."""
    import logging
    import warnings

    warnings.simplefilter("ignore")  # that there is no CUDA, at every call
    os.environ["TQDM_DISABLE"] = "1"

    sys.path.insert(0, str(folder.resolve()))
    sys.modules["flash_attn_2_cuda"] = types.ModuleType("flash_attn_2_cuda")
    rotation: Any = types.ModuleType("vortex.ops.embedding.rotary")
    sys.modules["vortex.ops.embedding.rotary"] = rotation
    rotation.apply_rotary = None
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment,misc]
    try:
        with tempfile.TemporaryDirectory() as elsewhere, contextlib.chdir(elsewhere):  # it logs
            from vortex.model import model, rotary  # type: ignore[import-not-found]
    except ImportError as error:
        raise SystemExit(f"the modules in {folder} cannot be imported: {error}.") from error
    logging.disable(logging.ERROR)

    def rotate(
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        seqlen_offsets: int = 0,
        interleaved: bool = False,
        inplace: bool = False,
        **others: Any,
    ) -> Tensor:
        rows = slice(seqlen_offsets, seqlen_offsets + x.shape[1])
        turned = rotary.apply_rotary_emb_torch(x, cos[rows], sin[rows], interleaved)
        return x.copy_(turned) if inplace else turned

    rotary.apply_rotary = rotate
    return model


def side(name: str, path: Path, vortex: Path | None) -> Ours | Theirs:
    if name == "gramian":
        return Ours(path)
    assert vortex is not None
    return Theirs(path, vortex)


# --- children ------------------------------------------------------------------------------------


def now() -> float:
    """Seconds of this process on the processor if it has one thread, which other processes on the
    machine disturb little; else those on the wall.
    """
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def draw_tokens(length: int) -> Tensor:
    return torch.randint(512, (1, length), generator=torch.Generator().manual_seed(length))


@torch.inference_mode()
def serve(model: Ours | Theirs, answers: Any) -> None:
    """Answer each line of the input, a request as JSON, by one line."""
    for line in sys.stdin:
        request = json.loads(line)
        tokens = draw_tokens(request["length"] + request["steps"])
        prompt, rest = tokens.split([request["length"], request["steps"]], dim=1)
        if "logits" in request:
            rows = [model.prefill(prompt, request["steps"])]
            rows += [model.step(token) for token in rest.split(1, dim=1)]
            whole = model.whole(tokens)[:, request["length"] - 1 :]
            torch.save((whole, torch.stack(rows, 1)), request["logits"])
            answer = {}
        else:
            began = now()
            model.prefill(prompt, request["steps"])
            taken = [now() - began]
            for token in rest.split(1, dim=1):
                began = now()
                model.step(token)
                taken.append(now() - began)
            answer = {"prefill": taken[0], "token": min(taken[1:])}
        print(json.dumps(answer), file=answers, flush=True)


@torch.inference_mode()
def measure_peak(model: Ours | Theirs, length: int) -> None:
    model.prefill(draw_tokens(16), 1)  # what is made once
    before = resident_peak_again()
    model.prefill(draw_tokens(length), 1)
    print(json.dumps({"MiB": resident_peak_of_this() - before}))


def resident_peak_again() -> float:
    """Forget the resident peak so far, where the system can; the peak from which it goes on."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return resident_peak_of_this()


def resident_peak_of_this() -> float:
    """The resident peak in MiB; that of Linux's resource usage would be the parent's, if larger."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return resident_peak()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def convert(path: Path) -> None:
    from typer.testing import CliRunner

    from gramian.cli import app

    with tempfile.TemporaryDirectory() as folder:
        arguments = ["convert", str(path), str(Path(folder) / "converted")]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        if result.exit_code:
            raise SystemExit(result.output)
    print(json.dumps({"MiB": resident_peak_of_this()}))


class Server:
    """A child that holds one side and answers requests."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a side ended before its answer.")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# --- parts ---------------------------------------------------------------------------------------


def compare_logits(servers: dict[str, Server], folder: Path, quick: bool) -> dict[str, Any]:
    """Distance of both sides' logits, over the largest logit."""
    found = {}
    for length in (6, 128) if quick else (6, 128, 512, 2048):
        made = {}
        for name, server in servers.items():
            file = folder / f"{name}.logits"
            server.ask(length=length, steps=8, logits=str(file))
            made[name] = torch.load(file, weights_only=True)
        scale = made["vortex"][0].abs().max()
        differences = {
            kind: float((made["gramian"][i] - made["vortex"][i]).abs().max() / scale)
            for i, kind in enumerate(("whole", "cached"))
        }
        print(f"logits at {length:5}: {differences}", flush=True)
        found[str(length)] = differences
    return found


def against_published(
    path: Path, command: list[str], quick: bool, lengths: tuple[int, ...]
) -> dict[str, Any]:
    servers = {name: Server([*command, "--serve", name]) for name in SIDES}
    differences = compare_logits(servers, path.parent, quick)
    rows = []
    for length in lengths:
        rounds = 2 if quick else max(2, min(12, 8192 // length))
        least = {name: {"prefill": math.inf, "token": math.inf} for name in SIDES}
        for attempt in range(rounds + 1):
            for name, server in servers.items():
                taken = server.ask(length=length, steps=STEPS)
                if attempt:  # the first one warms up
                    least[name] = {key: min(least[name][key], taken[key]) for key in taken}
        row: dict[str, Any] = {"length": length, "seconds": least}
        for kind in ("prefill", "token"):
            row[f"{kind} over ours"] = least["vortex"][kind] / least["gramian"][kind]
        rows.append(row)
        print(
            f"{length:6}: "
            + ", ".join(
                f"{kind} {1e3 * least['gramian'][kind]:9.2f} ms, vortex "
                f"{1e3 * least['vortex'][kind]:9.2f} ms ({row[f'{kind} over ours']:.2f}x)"
                for kind in ("prefill", "token")
            ),
            flush=True,
        )
    for server in servers.values():
        server.close()
    clock = "processor" if torch.get_num_threads() == 1 else "wall"
    return {"clock": clock, "differences of logits": differences, "rows": rows}


def of_prompts(command: list[str], lengths: tuple[int, ...]) -> dict[str, Any]:
    rows = []
    for length in lengths:
        row: dict[str, Any] = {"length": length}
        for name in SIDES:
            figures = run([*command, "--peak", name, "--length", str(length)], name)
            row[name] = None if figures is None else figures["MiB"]
        if row["gramian"] is not None and row["vortex"] is not None:
            row["ours over theirs"] = row["gramian"] / row["vortex"]
        rows.append(row)
        print(row, flush=True)
    return {"rows": rows}


def of_converting(folder: Path, quick: bool) -> dict[str, Any]:
    large = configuration(WIDE if not quick else WIDTH, WIDE_INNER if not quick else INNER)
    files = {
        "small": write_checkpoint(folder, configuration(64, 176)),
        "large": write_checkpoint(folder, large),
    }
    tensors = draw_checkpoint(large)
    layers: dict[str, int] = {}
    for name, value in tensors.items():
        layer = ".".join(name.split(".")[:2])
        layers[layer] = layers.get(layer, 0) + value.nbytes
    peaks = {}
    for name, path in files.items():
        figures = run([__file__, "--convert", str(path)], "gramian convert")
        assert figures is not None
        peaks[name] = figures["MiB"]
    result = {
        "file MiB": files["large"].stat().st_size / 2**20,
        "largest layer MiB": max(layers.values()) / 2**20,
        "peaks MiB": peaks,
        "growth MiB": peaks["large"] - peaks["small"],
    }
    print(result)
    return result


def main() -> None:
    parts = ("time", "memory", "convert")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vortex", type=Path, help="a clone of Zymrael/vortex")
    parser.add_argument("--part", nargs="+", choices=parts, help="by default all that can be run")
    parser.add_argument("--quick", action="store_true", help="short prompts, for a look")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--lengths", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--peak", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--convert", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.convert is not None:
        convert(arguments.convert)
        return
    if arguments.serve or arguments.peak:
        answers = sys.stdout
        with contextlib.redirect_stdout(open(os.devnull, "w", encoding="utf-8")):  # to the end
            held = side(arguments.serve or arguments.peak, arguments.checkpoint, arguments.vortex)
            if arguments.serve:
                serve(held, answers)
                return
            with contextlib.redirect_stdout(answers):
                measure_peak(held, arguments.length)
        return
    if arguments.vortex is None and {"time", "memory"} & {*(arguments.part or ())}:
        raise SystemExit("the parts time and memory need --vortex FOLDER.")
    chosen = arguments.part or (parts if arguments.vortex else parts[2:])

    lengths = tuple(arguments.lengths or (LENGTHS[:4] if arguments.quick else LENGTHS))
    for part in chosen:
        with tempfile.TemporaryDirectory() as folder:
            if part == "convert":
                results = of_converting(Path(folder), arguments.quick)
            else:
                path = write_checkpoint(Path(folder), configuration(WIDTH, INNER))
                command = [__file__, "--vortex", str(arguments.vortex), "--checkpoint", str(path)]
                command += ["--threads", str(arguments.threads)]
                if part == "time":
                    results = against_published(path, command, arguments.quick, lengths)
                else:
                    results = of_prompts(command, lengths)
        record = {
            "benchmark": f"StripedHyena 2, {part}",
            "width": WIDE if part == "convert" else WIDTH,
            "blocks": list(ORDER),
            "quick": arguments.quick,
            **results,
        }
        write(arguments.output / f"striped_hyena2_{part}.json", record)


if __name__ == "__main__":
    main()
