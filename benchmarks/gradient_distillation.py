"""How close do gradient descents in modal and in rational form come to trained filters?

The paper on RTF (arXiv 2405.06147, table 3) distils the filters of a MultiHyena of 160 million
parameters into the modal form of the Laughing Hyena Distillery (LH) and into rational form (RTF),
by 1,000,000 steps of AdamW at a learning rate of 1e-4, to the orders 4, 16 and 64. RTF is closer at
order 4, and LH at 16 and 64.

This benchmark does the same with the filters of the demo's MultiHyena, which `gramian demo` trains
in two minutes and whose loss depends on them. They are reduced to these orders in four ways: by
`gramian.reduce`, by gradient descent in modal form, and by gradient descent in rational form, whose
denominators are either free, as published, or stable by construction. Descents have the published
learning rate, or one of 3e-3 that is annealed to zero. Errors are those of the kernels over the
taps. The loss on held-out bytes is that of the model with these kernels.

    python benchmarks/gradient_distillation.py [--model FOLDER] [--minutes N] [--runs FOLDER]
                                               [--steps N …] [--rates R …] [--orders N …]
                                               [--forms NAME …] [--output PATH]

`--model` is the folder `original` of the output of `gramian demo`. By default, the demo is run
first, into the folder of runs. Reductions and descents are one after the other. Each is kept in the
folder of runs, so an interrupted benchmark goes on where it stopped. After `--minutes`, no further
descent starts. `--steps`, `--rates`, `--orders` and `--forms` choose the descents that may start.
Those that are kept are read anyway. The output names the descents that were not run.
"""

import argparse
import functools
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._report import write
from gramian import reduce
from gramian.demo.measuring import bits_per_byte
from gramian.demo.text import python_documentation
from gramian.filters import ExplicitFilter
from gramian.models import load
from gramian.reduction import Descent, Gradient, rational_interpolation

ORDERS = (4, 16, 64)
FORMS = ("rational", "modal", "rational, stable")
DESCENTS = (
    Descent(20_000),
    Descent(200_000, 1e-4, schedule="constant"),
    Descent(200_000),
    Descent(1_000_000, 1e-4, schedule="constant"),  # the published one
)


class Filters:
    """The filters of a model, whose kernels can be replaced, and the loss on held-out bytes."""

    def __init__(self, folder: Path) -> None:
        self.model = load(folder).eval().requires_grad_(False)
        self.mixers: list[Any] = [block.mixer for block in self.model.base_model.layers]
        self.taps = self.mixers[0].filter.max_length
        corpus = python_documentation().held_out
        self.windows = corpus[: len(corpus) // self.taps * self.taps].reshape(-1, self.taps)
        filters = [mixer.filter(self.taps).impulse_response(self.taps) for mixer in self.mixers]
        self.kernel = torch.cat(filters).double()  # (filters, taps)

    def loss(self, kernel: Tensor) -> float:
        """Return the bits per byte of the model with the kernels (filters, taps)."""
        parts = kernel.float().split(len(kernel) // len(self.mixers))
        for mixer, part in zip(self.mixers, parts, strict=True):
            mixer.filter = ExplicitFilter.from_kernel(part)
        return bits_per_byte(self.model, self.windows)


def described(filters: Filters, found: Tensor, seconds: float) -> dict[str, Any]:
    """Return the measures of reduced kernels: their errors, and the loss of the model with them."""
    error = found - filters.kernel
    relative = error.norm(dim=-1) / filters.kernel.norm(dim=-1)
    return {
        "relative errors": relative.tolist(),
        "mean relative error": float(relative.mean()),
        "mean square error": float(error.square().mean()),
        "bits per byte": filters.loss(found),
        "seconds": seconds,
    }


def reduced(filters: Filters, order: int) -> dict[str, Any]:
    start = time.perf_counter()
    reduction = reduce(filters.kernel, order)
    seconds = time.perf_counter() - start
    return {
        "order": order,
        "mean lower bound": float(reduction.lower_bound.mean()),
        **described(filters, reduction.system.impulse_response(filters.taps), seconds),
    }


def descend(filters: Filters, form: str, order: int, descent: Descent) -> dict[str, Any]:
    """Return the measures of a descent."""
    measures: dict[str, Any] = {
        "form": form,
        "order": order,
        "steps": descent.steps,
        "learning rate": descent.learning_rate,
        "schedule": descent.schedule,
    }
    start = time.perf_counter()
    if form == "modal":
        method = Gradient(
            descent.steps, descent.learning_rate, objective="l2", schedule=descent.schedule
        )
        system: Any = reduce(filters.kernel, order, method=method).system
    else:
        stability = "none" if form == "rational" else "schur"
        fit = rational_interpolation(filters.kernel, order, descent, stability=stability)
        measures["stable"], system = int(fit.stable.sum()), fit.system
    seconds = time.perf_counter() - start
    return {**measures, **described(filters, system.impulse_response(filters.taps), seconds)}


def kept(file: Path, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the date and the measures of a run, which takes place if `file` does not exist."""
    if not file.is_file():
        write(file, run())
    found = json.loads(file.read_text(encoding="utf-8"))
    return {key: value for key, value in found.items() if key != "machine"}


def name(form: str, order: int, descent: Descent) -> str:
    """Return the name of a descent."""
    rate = f"{descent.learning_rate:g}, {descent.schedule}"
    return f"{form}, order {order}, {descent.steps:,} steps at {rate}"


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="by default, the demo's model is trained")
    parser.add_argument("--minutes", type=float, default=240)
    parser.add_argument("--steps", type=int, nargs="+", help="by default, all of them")
    parser.add_argument("--rates", type=float, nargs="+", help="by default, all of them")
    parser.add_argument("--orders", type=int, nargs="+", choices=ORDERS, default=ORDERS)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument(
        "--runs", type=Path, default=Path(tempfile.gettempdir()) / "gramian_gradient_distillation"
    )
    parser.add_argument(
        "--output", type=Path, default=here / "results" / "gradient_distillation.json"
    )
    arguments = parser.parse_args()

    start = time.monotonic()
    model = arguments.model or arguments.runs / "demo/original"
    if not model.exists():
        demo = ["-m", "gramian", "demo", "--output", str(model.parent)]
        subprocess.run([sys.executable, *demo], check=True)
    filters = Filters(model)
    silent = torch.nn.functional.pad(filters.kernel[:, :1], (0, filters.taps - 1))
    results: dict[str, Any] = {
        "benchmark": "gradient descents in modal and in rational form on trained filters",
        "filters": len(filters.kernel),
        "taps": filters.taps,
        "bits per byte": filters.loss(filters.kernel),
        "bits per byte, filters cut to tap 0": filters.loss(silent),
        "reduce": [
            kept(arguments.runs / f"reduce_{n}.json", functools.partial(reduced, filters, n))
            for n in ORDERS
        ],
        "descents": [],
        "not run": [],
    }
    for descent, form, order in itertools.product(DESCENTS, FORMS, ORDERS):
        cell = f"{form.replace(', ', '_')}_{order}_{descent.steps}_{descent.schedule}"
        file = arguments.runs / f"{cell}.json"
        chosen = (
            descent.steps in (arguments.steps or [descent.steps])
            and descent.learning_rate in (arguments.rates or [descent.learning_rate])
            and form in arguments.forms
            and order in arguments.orders
            and time.monotonic() - start < 60 * arguments.minutes
        )
        if not file.is_file() and not chosen:
            results["not run"].append(name(form, order, descent))
            continue
        found = kept(file, functools.partial(descend, filters, form, order, descent))
        results["descents"].append(found)
        best = results["reduce"][ORDERS.index(order)]["mean relative error"]
        print(
            f"{name(form, order, descent)}: {found['mean relative error']:.2e} (reduce {best:.2e})"
            + (f", {found['stable']} of {len(filters.kernel)} stable" if "stable" in found else ""),
            flush=True,
        )
    write(arguments.output, results)


if __name__ == "__main__":
    main()
