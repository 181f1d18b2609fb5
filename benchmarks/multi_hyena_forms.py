"""At which sizes is each form of MultiHyena cheaper: FFT of outer products or masked attention?

The benchmark times the forward and backward passes of both forms on the same inputs, for several
lengths and head widths. It prints the ratio of the times beside the choice that `MultiHyena` makes.

    python benchmarks/multi_hyena_forms.py [--output FILE] [--repeats N]
"""

import argparse
import time
from pathlib import Path

import torch
from _report import write

from gramian.mixers.multi_hyena import (
    convolved_outer_products,
    prefers_convolution,
    toeplitz_masked_attention,
)

SIZES = [
    (length, head_width) for length in (256, 1024, 4096, 8192) for head_width in (1, 2, 4, 8, 16)
]
HEADS = 4


def seconds(form, inputs: list[torch.Tensor], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        form(*inputs).square().sum().backward()
        best = min(best, time.perf_counter() - begin)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/forms.json")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows = []
    print(f"{'length':>7} {'head width':>10} {'attention':>12} {'FFT':>12} {'ratio':>7}  taken")
    for length, head_width in SIZES:
        torch.manual_seed(0)
        shape = (1, HEADS, length, head_width)
        inputs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
        inputs.append(torch.randn(HEADS, length, requires_grad=True))
        attention = seconds(toeplitz_masked_attention, inputs, arguments.repeats)
        fft = seconds(convolved_outer_products, inputs, arguments.repeats)
        taken = "FFT" if prefers_convolution(length, head_width) else "attention"
        rows.append(
            {
                "length": length,
                "head_width": head_width,
                "attention_seconds": attention,
                "fft_seconds": fft,
                "taken": taken,
            }
        )
        print(
            f"{length:7d} {head_width:10d} {1e3 * attention:9.1f} ms {1e3 * fft:9.1f} ms "
            f"{attention / fft:7.2f}  {taken}",
            flush=True,
        )
    write(arguments.output, {"benchmark": "multi_hyena_forms", "rows": rows})


if __name__ == "__main__":
    main()
