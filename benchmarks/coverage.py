"""Which causal models does `gramian.analyze` read, and is what it reads right?

A small random model of every causal type that the installed transformers has is analyzed, in a
process of its own. What the analysis says is compared with three tests that share no code with it:

- The places where tokens are mixed are found by perturbation (`benchmarks/_perturbation.py`). Each
  must be a layer of the report, or be named as one that was not read. Parts that return no values,
  but only choose the tokens to attend to, need not be named.
- The operator at each place is obtained from impulses through the model's own code
  (`benchmarks/_impulses.py`). Operators of the report must predict the answer to random values.
  State-sizes must be those of singular values of the blocks of these operators.
- The outputs of every block during the analysis must equal those of a plain forward pass.

Models run in double precision where their code permits it. Each type gets a verdict:

read       every place where tokens are mixed is measured
in part    some places are measured, and the others are named
named      no place is measured, and all are named
silent     a place is neither measured nor named
wrong      an operator or a state-size is wrong, or the analysis changed the model's outputs
raises     the analysis raised an error, or took too long
not built  no model of this type can be built from text alone

    python benchmarks/coverage.py [--types llama,mamba] [--jobs N]

Rows are kept as they are finished, so that a run that was stopped continues. `--fresh` begins anew.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import transformers

import gramian
from benchmarks._architectures import (
    CannotBuild,
    causal_types,
    lengths,
    model_class,
    small_config,
    small_model,
    tokens,
)
from benchmarks._impulses import Response, operators_at
from benchmarks._perturbation import Site, find_sites, tensors
from benchmarks._report import write
from gramian.analysis import StateReport, _analyze

VERDICTS = ("read", "in part", "named", "silent", "wrong", "raises", "not built")
OPERATORS = 1e-4  # the largest error of an operator that is right
SIZES = 1e-3  # the largest error of a state-size that is right
OUTPUTS = 1e-4  # the largest relative difference of outputs during the analysis
_WAYS = 80  # how many choices of values are tried at a place
_PAGE = Path(__file__).resolve().parent.parent / "docs/results/coverage.md"


def build(model_type: str, implementation: str | None = None) -> nn.Module:
    """Return a small model, in double precision if it can run in it."""
    for dtype in (torch.float64, torch.float32):
        config = small_config(model_type)
        config._experts_implementation = "eager"
        if implementation is not None:
            config._attn_implementation = implementation
        model = small_model(model_type, config=config).to(dtype)
        if dtype == torch.float32:
            return model
        with contextlib.suppress(RuntimeError), torch.no_grad():
            run(model)
            return model
    raise AssertionError


def run(model: nn.Module) -> Any:
    """Run a model on random tokens, without a cache."""
    return model(tokens()[None], use_cache=False)


def examine(model_type: str) -> dict[str, Any]:
    """Return the row of a model type."""
    row: dict[str, Any] = {"type": model_type, "class": model_class(model_type).__name__}
    started = time.perf_counter()
    try:
        model, reference = build(model_type), build(model_type, "eager")
    except CannotBuild as error:
        return row | {"verdict": "not built", "reason": str(error)}
    row["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    with torch.no_grad():
        sites = find_sites(reference, lambda: run(reference), lengths(model_type))
    blocks = _blocks(model, sites)
    plain = _outputs(model, blocks, lambda: run(model))
    found: dict[str, list[Tensor]] = {}
    begun = time.perf_counter()
    try:
        with _operators(found):
            during = _outputs(model, blocks, lambda: _analyzed(model, row))
    except Exception as error:  # noqa: BLE001 (whatever it raises is the result)
        message = f"{type(error).__name__}: {error}"
        return row | {"verdict": "raises", "reason": message[:400]}
    row["analysis_seconds"] = round(time.perf_counter() - begun, 2)
    row["output_error"] = _difference(plain, during)
    report: StateReport = row.pop("report")
    row["layers"] = _verified(report, found, sites)
    row["unread"] = [{"name": name, "reason": reason} for name, reason in report.unread]
    row["silent"] = _silent(sites, row["layers"], row["unread"])
    row["seconds"] = round(time.perf_counter() - started, 2)
    return row | _verdict(row)


def _analyzed(model: nn.Module, row: dict[str, Any]) -> None:
    row["report"] = gramian.analyze(model, tokens(), max_channels=None)


@contextlib.contextmanager
def _operators(found: dict[str, list[Tensor]]) -> Iterator[None]:
    """Keep the operators that `analyze` measures in this context, by the names of their layers."""
    measure = _analyze.measure_layer

    def measured(recorded: Any, positions: Any, length: int, *rest: Any) -> Any:
        operators = recorded.system(slice(0, recorded.count)).matrix(length)
        found.setdefault(recorded.name, []).append(operators.detach().reshape(-1, length, length))
        return measure(recorded, positions, length, *rest)

    _analyze.measure_layer = measured
    try:
        yield
    finally:
        _analyze.measure_layer = measure


# Outputs during the analysis


def _blocks(model: nn.Module, sites: list[Site]) -> list[str]:
    """Return the entries of lists of modules that mix tokens, and the model itself."""
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    blocks = {
        f"{path}.{number}"
        for path in lists
        for number in range(len(model.get_submodule(path)))
        if any(f"{site.path}.".startswith(f"{path}.{number}.") for site in sites)
    }
    return ["", *sorted(blocks)]


def _outputs(model: nn.Module, blocks: list[str], call: Any) -> dict[str, list[Tensor]]:
    """Return the first tensor of every output of some modules during a call."""
    outputs: dict[str, list[Tensor]] = {path: [] for path in blocks}
    with contextlib.ExitStack() as stack, torch.no_grad():
        for path in blocks:

            def keep(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
                first = next((x for x in tensors(output) if x.is_floating_point()), None)
                if first is not None:
                    outputs[path].append(first.detach().clone())

            stack.callback(model.get_submodule(path).register_forward_hook(keep).remove)
        call()
    return outputs


def _difference(plain: dict[str, list[Tensor]], during: dict[str, list[Tensor]]) -> float:
    """Return the largest relative difference of outputs from those of the plain forward pass.

    The analysis may run parts of a model more often than the plain pass does; every output of the
    plain pass must be among those of the analysis.
    """
    largest = 0.0
    for path, outputs in plain.items():
        for expected in outputs:
            # The analysis may ask for the logits of the last position only.
            near = [
                _relative(x, expected[..., -x.shape[-2] :, :] if x.ndim == 3 else expected)
                for x in during[path]
            ]
            largest = max(largest, min(near, default=float("inf")))
    return largest


def _relative(x: Tensor, y: Tensor) -> float:
    if x.shape != y.shape:
        return float("inf")
    x, y = torch.nan_to_num(x.double()), torch.nan_to_num(y.double())
    return float((x - y).norm() / y.norm().clamp_min(1e-300))


# Operators and state-sizes


def _verified(
    report: StateReport, found: dict[str, list[Tensor]], sites: list[Site]
) -> list[dict[str, Any]]:
    """Return an entry for each layer of a report, with what the tests say of it."""
    responses: dict[int, list[Response]] = {}
    entries = []
    for layer in report.layers:
        maps = torch.cat(found[layer.name]).cpu()
        entry: dict[str, Any] = {
            "name": layer.name,
            "mixer": layer.mixer,
            "kind": layer.kind,
            "reader": layer.reader,
            "operators": layer.count,
            "size_error": float((state_sizes(maps) - layer.ess.double()).abs().max()),
        }
        best: tuple[float, Site, Response] | None = None
        for site in _near(layer.name, sites):
            for response in _responses(site, responses):
                if response.maps.shape[1:] != maps.shape[1:]:
                    continue
                errors = response.errors(maps)
                worst = float(torch.maximum(errors.amin(1).max(), errors.amin(0).max()))
                if best is None or worst < best[0]:
                    best = (worst, site, response)
            if best is not None and best[0] < OPERATORS:
                break
        if best is not None:
            error, site, response = best
            mine = response.maps[response.errors(maps).argmin(1)]
            entry |= {
                "place": f"{site.path} {site.name}".strip(),
                "values": response.label,
                "error": error,
                "independent_size_error": float(
                    (state_sizes(mine) - layer.ess.double()).abs().max()
                ),
            }
        entries.append(entry)
    return entries


def _responses(site: Site, known: dict[int, list[Response]]) -> list[Response]:
    if id(site) not in known:
        ways = zip(range(_WAYS), operators_at(site), strict=False)
        known[id(site)] = [response for _, response in ways]
    return known[id(site)]


def module_of(name: str) -> str:
    """Return the path of the module in the name of a layer."""
    return re.sub(r" .*$", "", name)


def _near(name: str, sites: list[Site]) -> list[Site]:
    """Return the sites that a layer may be: at its path first, then inside, then outside."""
    path = module_of(name)
    same = [site for site in sites if site.path == path]
    inside = [site for site in sites if site.path.startswith(f"{path}.")]
    outside = [site for site in sites if path.startswith(f"{site.path}.")]
    return same + inside + outside


def state_sizes(maps: Tensor) -> Tensor:
    """Return the entropy ESS of operators at every position, (h, L), from singular values."""
    maps = maps.double()
    columns = [torch.zeros(len(maps), dtype=torch.float64)]
    for i in range(1, maps.shape[1]):
        values = torch.linalg.svdvals(maps[:, i:, :i])
        total = values.sum(-1, keepdim=True)
        shares = values / total.clamp_min(1e-300)
        sizes = torch.exp(torch.special.entr(shares).sum(-1))
        columns.append(torch.where(total[:, 0] > 0, sizes, 0.0))
    return torch.stack(columns, -1)


# What is missing


def _silent(
    sites: list[Site], layers: list[dict[str, Any]], unread: list[dict[str, str]]
) -> list[dict[str, str]]:
    """Return the places that mix tokens and are neither measured nor named.

    A layer whose operator was verified is the place where it was. Every other layer stands for one
    place at, inside or around its path; a module that is named stands for all places inside it.
    """
    named = [module_of(entry["name"]) for entry in unread]
    verified = {entry["place"] for entry in layers if entry.get("error", 1.0) < OPERATORS}
    others = [entry["name"] for entry in layers if entry.get("error", 1.0) >= OPERATORS]
    open_sites = [
        site
        for site in sites
        if not site.selects
        and f"{site.path} {site.name}".strip() not in verified
        and not any(f"{site.path}.".startswith(f"{path}." if path else "") for path in named)
    ]
    for name in others:
        near = _near(name, open_sites)
        if near:
            open_sites.remove(near[0])
    # A named part of a module stands for one place in the module's own code.
    for path in named:
        around = [site for site in open_sites if path.startswith(f"{site.path}.")]
        within = {site.path for site in sites}
        if around and path not in within:
            open_sites.remove(around[-1])
    return [
        {"module": site.path, "class": type(site.module).__name__, "function": site.name}
        for site in open_sites
    ]


def _verdict(row: dict[str, Any]) -> dict[str, Any]:
    """Return the verdict on a row, and the reason for it where it is not "read"."""
    wrong = [
        f"{layer['name']}: error {layer['error']:.1e}"
        for layer in row["layers"]
        if layer.get("error", 0.0) > OPERATORS
    ]
    wrong += [
        f"{layer['name']}: state-sizes differ by {layer['size_error']:.1e}"
        for layer in row["layers"]
        if layer["size_error"] > SIZES
    ]
    if row["output_error"] > OUTPUTS:
        wrong.insert(0, f"outputs differ by {row['output_error']:.1e}")
    if wrong:
        return {"verdict": "wrong", "reason": "; ".join(wrong)}
    if row["silent"]:
        missing = [
            f"{site['module']} ({site['class']} {site['function']})".replace(" )", ")")
            for site in row["silent"]
        ]
        return {"verdict": "silent", "reason": "; ".join(missing)}
    if row["unread"]:
        reasons = [f"{entry['name']}: {entry['reason']}" for entry in row["unread"]]
        return {
            "verdict": "in part" if row["layers"] else "named",
            "reason": "; ".join(reasons),
        }
    return {"verdict": "read", "reason": ""}


# Processes


def _in_child(model_type: str, limit: int, file: Path) -> int:
    """Examine a type in a process of its own, which writes the row to a file; return its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        signal.alarm(limit)
        torch.set_num_threads(1)
        file.write_text(json.dumps(examine(model_type)), encoding="utf-8")
        status = 0
    except BaseException as error:  # noqa: BLE001 (a child process must end here)
        row = {"type": model_type, "class": model_class(model_type).__name__}
        row |= {"verdict": "raises", "reason": f"{type(error).__name__}: {error}"[:400]}
        file.write_text(json.dumps(row), encoding="utf-8")
        status = 0
    finally:
        os._exit(status)


def examine_all(types: list[str], jobs: int, limit: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of types as they are finished."""
    todo = list(reversed(types))
    running: dict[int, tuple[str, Path]] = {}
    while todo or running:
        while todo and len(running) < jobs:
            model_type = todo.pop()
            file = folder / f"{model_type}.json"
            file.unlink(missing_ok=True)
            running[_in_child(model_type, limit, file)] = (model_type, file)
        process, _ = os.wait()
        model_type, file = running.pop(process)
        if file.exists():
            yield json.loads(file.read_text(encoding="utf-8"))
        else:
            row = {"type": model_type, "class": model_class(model_type).__name__}
            reason = f"took more than {limit} seconds."
            file.write_text(json.dumps(row | {"verdict": "raises", "reason": reason}))
            yield row | {"verdict": "raises", "reason": reason}


# Results


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return counts and largest errors over all rows."""
    layers = [layer for row in rows for layer in row.get("layers", [])]
    checked = [layer for layer in layers if "error" in layer]
    return {
        "types": len(rows),
        "verdicts": {
            verdict: sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS
        },
        "readers": dict(sorted(Counter(layer["reader"] for layer in layers).items())),
        "layers": len(layers),
        "layers_checked": len(checked),
        "largest_operator_error": max((layer["error"] for layer in checked), default=0.0),
        "largest_size_error": max((layer["size_error"] for layer in layers), default=0.0),
        "largest_independent_size_error": max(
            (layer["independent_size_error"] for layer in checked), default=0.0
        ),
        "largest_output_error": max((row.get("output_error", 0.0) for row in rows), default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--types", help="Model types to examine, with commas; by default all.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="Number of processes.")
    parser.add_argument("--limit", type=int, default=120, help="Seconds that a type may take.")
    parser.add_argument("--fresh", action="store_true", help="Examine finished types again.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--page", type=Path, default=_PAGE, help="Markdown page of the results.")
    arguments = parser.parse_args()
    known = causal_types()
    types = arguments.types.split(",") if arguments.types else list(known)
    for unknown in set(types) - set(known):
        parser.error(f"{unknown} is not a causal type of transformers {transformers.__version__}.")
    folder = arguments.output / "coverage"
    folder.mkdir(parents=True, exist_ok=True)
    finished = {file.stem for file in folder.glob("*.json")}
    again = arguments.fresh or arguments.types is not None
    todo = [t for t in types if again or t not in finished]
    with Progress(transient=True) as progress:
        task = progress.add_task("types", total=len(todo))
        for row in examine_all(todo, arguments.jobs, arguments.limit, folder):
            progress.update(task, advance=1, description=row["type"])
            if row["verdict"] != "read" or arguments.types:
                progress.console.print(
                    f"{row['type']}: {row['verdict']} {row['reason']}", markup=False
                )
    print_summary = [
        json.loads((folder / f"{t}.json").read_text(encoding="utf-8"))
        for t in known
        if (folder / f"{t}.json").exists()
    ]
    print(json.dumps(summary(print_summary), indent=2))


if __name__ == "__main__":
    main()
