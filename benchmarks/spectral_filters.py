"""Which orders do recurrences of spectral filters need?

The kernels of `SpectralFilter` are sums of 24 fixed eigenvectors and of their copies with
alternating signs (Agarwal et al. 2023, arXiv 2312.06837). SpectraLDS (Shah et al. 2025, arXiv
2505.17868) represents all 48 by one diagonal system, to which the outputs are fitted by least
squares; its published configurations have 100, 200, 400 and 800 states for 8,192 taps. The
benchmark measures:

- the error of a diagonal system of h random poles, half of them positive, fitted to all 24
  eigenvectors by least squares, the best of several draws. 1 - |λ| is log-uniform;
- the orders that `gramian.reduce` needs for each of the 24 filters alone (their alternating copies
  need the same), and for kernels with random coefficients, at several tolerances.

All errors are relative l2 errors.

    python benchmarks/spectral_filters.py [--taps N …] [--channels N] [--output PATH]

Both lengths take a few minutes on one core.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gramian
from benchmarks._report import write
from gramian.filters import SpectralFilter
from gramian.ops.vandermonde import vandermonde_product

STATES = (80, 100, 200, 400, 800)
TOLERANCES = (1e-2, 1e-3, 1e-4)
DRAWS = 2


def random_poles(basis: Tensor, states: int) -> float:
    """Return the relative error of all filters together, for the best draw of random poles.

    Args:
        basis: (filters, taps): the eigenvectors, scaled.
        states: The number of poles, of which half serve the copies with alternating signs.
    """
    taps, count = basis.shape[-1], states // 2
    best = float("inf")
    for _ in range(DRAWS):
        gap = torch.exp(torch.rand(count, dtype=torch.float64) * -torch.tensor(2.0 * taps).log())
        powers = (1 - gap).unsqueeze(-1) ** torch.arange(taps)  # (poles, taps)
        unit = powers / powers.norm(dim=-1, keepdim=True)
        _, values, right = torch.linalg.svd(unit, full_matrices=False)
        used = right[values > 1e-14 * values[0]]
        error = basis - (basis @ used.mT) @ used
        best = min(best, float(error.norm() / basis.norm()))
    return best


def orders(kernels: Tensor, tol: float) -> dict[str, Any]:
    """Reduce kernels (channels, taps) to a tolerance, and summarize orders and errors."""
    start = time.perf_counter()
    reduction = gramian.reduce(kernels, tol=tol)
    seconds = time.perf_counter() - start
    system = reduction.system
    tail = vandermonde_product(system.poles, system.residues, kernels.shape[-1] - 1)
    fitted = torch.cat([system.d.unsqueeze(-1), tail], dim=-1)
    errors = (fitted - kernels).norm(dim=-1) / kernels.norm(dim=-1)
    found = reduction.order.double()
    return {
        "tolerance": tol,
        "order": {
            "mean": float(found.mean()),
            "median": float(found.median()),
            "max": int(found.max()),
        },
        "largest relative error": float(errors.max()),
        "seconds": seconds,
    }


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--taps", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--output", type=Path, default=here / "results" / "spectral_filters.json")
    parser.add_argument("--channels", type=int, default=4, help="kernels of random coefficients")
    arguments = parser.parse_args()
    channels = arguments.channels
    results: dict[str, Any] = {"eigenvectors": 24, "channels": channels, "draws": DRAWS}
    for taps in arguments.taps:
        torch.manual_seed(0)
        filter = SpectralFilter(channels, taps, bias=False).double()
        filter.reset_buffers()  # in double precision
        basis = filter.basis.detach()
        kernels = filter(taps).impulse_response(taps).detach()
        part = results[f"{taps} taps"] = {
            "random poles": [
                {"states": states, "relative error": random_poles(basis, states)}
                for states in STATES
            ]
        }
        for name, some in (("each filter alone", basis), ("random coefficients", kernels)):
            part[name] = []
            for tol in TOLERANCES:
                part[name].append(orders(some, tol))
                print(f"{taps} taps, {name}: {part[name][-1]}", flush=True)
        for row in part["random poles"]:
            print(f"{taps} taps, random poles: {row}", flush=True)
        write(arguments.output, results)


if __name__ == "__main__":
    main()
