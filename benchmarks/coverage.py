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
not causal the model looks ahead, and the analysis refuses it
not built  no model of this type can be built from text alone

    python benchmarks/coverage.py [--types llama,mamba] [--jobs N]

Rows are kept as they are finished, so that a run that was stopped continues. `--fresh` begins anew.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import transformers

import gramian
from benchmarks._architectures import (
    LENGTH,
    CannotBuild,
    causal_types,
    lengths,
    model_class,
    small_config,
    small_model,
    tokens,
)
from benchmarks._calls import tensors
from benchmarks._coverage_page import compact, fill, summary
from benchmarks._further_impulses import further_operators
from benchmarks._impulses import Response, operators_at
from benchmarks._perturbation import Site, find_sites, record_calls
from benchmarks._report import write
from gramian.analysis import StateReport, _analyze

OPERATORS = 1e-4  # the largest error of an operator that is right
SIZES = 1e-3  # the largest error of a state-size that is right
OUTPUTS = 1e-4  # the largest relative difference of outputs during the analysis
_WAYS = 80  # how many choices of values are tried at a place
_PAGE = Path(__file__).resolve().parent.parent / "docs/results/coverage.md"


def build(model_type: str, implementation: str | None = None) -> nn.Module:
    """Return a small model, in double precision if it can run in it."""
    for dtype in (torch.float64, torch.float32):
        precision = double_precision() if dtype == torch.float64 else contextlib.nullcontext()
        config = small_config(model_type)
        config._experts_implementation = "eager"
        if implementation is not None:
            config._attn_implementation = implementation
        model = small_model(model_type, config=config).to(dtype)
        if dtype == torch.float32:
            return model
        with contextlib.suppress(RuntimeError), torch.no_grad(), precision:
            mask = torch.ones(1, len(tokens()), dtype=torch.long)
            output = model(tokens()[None], attention_mask=mask, use_cache=False)
            if bool(output.logits.isfinite().all()):
                return model
    raise AssertionError


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Compute in double precision what code asks to be computed in single precision.

    Many models compute softmax and scans in single precision whatever the dtype of their inputs is.
    Modules that are first imported in this context would keep the other dtype, so it is for a
    process of its own.
    """
    single, cast = torch.float32, Tensor.float
    torch.float32, Tensor.float = torch.float64, Tensor.double
    try:
        yield
    finally:
        torch.float32, Tensor.float = single, cast


def run(model: nn.Module) -> Any:
    """Run a model on random tokens, without a cache."""
    return model(tokens()[None], use_cache=False)


def examine(model_type: str) -> dict[str, Any]:
    """Return the row of a model type."""
    row: dict[str, Any] = {"type": model_type, "class": model_class(model_type).__name__}
    started = time.perf_counter()
    try:
        model = build(model_type)
    except CannotBuild as error:
        return row | {"verdict": "not built", "reason": str(error)}
    double = next(model.parameters()).dtype == torch.float64
    with double_precision() if double else contextlib.nullcontext():
        return _examined(model_type, model, row, started)


def _examined(
    model_type: str, model: nn.Module, row: dict[str, Any], started: float
) -> dict[str, Any]:
    """Return the row of a model."""
    reference = build(model_type, "eager")
    reference.load_state_dict(model.state_dict())  # in double precision other numbers are drawn
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
    except Exception as error:
        if isinstance(error, ValueError) and _looks_ahead(model):
            return row | {"verdict": "not causal", "reason": str(error)}
        message = f"{type(error).__name__}: {error}"
        return row | {"verdict": "raises", "reason": message[:400]}
    row["analysis_seconds"] = round(time.perf_counter() - begun, 2)
    row["output_error"] = _difference(plain, during)
    report: StateReport = row.pop("report")
    row["layers"] = _verified(report, found, sites)
    _verify_further(row["layers"], report, found, reference)
    row["unread"] = [{"name": name, "reason": reason} for name, reason in report.unread]
    row["silent"] = _silent(sites, row["layers"], row["unread"])
    row["seconds"] = round(time.perf_counter() - started, 2)
    return row | _verdict(row)


def _looks_ahead(model: nn.Module) -> bool:
    """Return whether outputs at earlier positions change with the last token."""
    ids = tokens()[None]
    other = ids.clone()
    other[0, -1] = 3 + (other[0, -1] + 17) % 97
    with torch.no_grad():
        before, after = (model(x, use_cache=False).logits[:, :-1] for x in (ids, other))
    return _relative(before, after) > OUTPUTS


def _analyzed(model: nn.Module, row: dict[str, Any]) -> None:
    row["report"] = gramian.analyze(model, tokens(), max_channels=None)


@contextlib.contextmanager
def _operators(found: dict[str, list[Tensor]]) -> Iterator[None]:
    """Keep the operators that `analyze` measures in this context, by the names of their layers."""
    measure = _analyze.measure_layer

    def measured(recorded: Any, positions: Any, length: int, *rest: Any, **options: Any) -> Any:
        operators = recorded.system(slice(0, recorded.count)).matrix(length)
        found.setdefault(recorded.name, []).append(operators.detach().reshape(-1, length, length))
        return measure(recorded, positions, length, *rest, **options)

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
    known: dict[int, Responses] = {}
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
        match = _match(layer.name, maps, _near(layer.name, sites), known)
        if match is not None:
            sizes = state_sizes(match.operators) - layer.ess.double()
            entry |= {
                "places": [str(site) for site in match.sites],
                "error": match.error,
                "independent_size_error": float(sizes.abs().max()),
            }
        entries.append(entry)
    return entries


def _verify_further(
    entries: list[dict[str, Any]],
    report: StateReport,
    found: dict[str, list[Tensor]],
    model: nn.Module,
) -> None:
    """Add what other impulses say to the entries of layers that are found at no place."""
    left = [(entry, layer) for entry, layer in zip(entries, report.layers, strict=True)]
    left = [(entry, layer) for entry, layer in left if "error" not in entry]
    calls = record_calls(model, lambda: run(model)) if left else {}
    for entry, layer in left:
        path = module_of(layer.name)
        if path not in calls:
            continue
        maps = torch.cat(found[layer.name]).cpu().double()
        best = float("inf")
        for response in further_operators(model.get_submodule(path), calls[path][0], LENGTH):
            errors = response.errors(maps)
            error = max(float(errors.amin(0).max()), float(errors.amin(1).max()))
            if error < best:
                best = error
                sizes = state_sizes(response.maps[errors.argmin(1)]) - layer.ess.double()
                entry |= {
                    "places": [path],
                    "error": error,
                    "independent_size_error": float(sizes.abs().max()),
                }
            if best < OPERATORS:
                break


@dataclass
class Match:
    """The places whose operators are those of a layer.

    Attributes:
        sites: the places.
        lacking: the largest error of an operator of these places that the layer lacks.
        errors: the error of each operator of the layer, (h).
        operators: the operator of the places that is nearest to each of the layer, (h, L, L).
    """

    sites: list[Site]
    lacking: float
    errors: Tensor
    operators: Tensor

    @property
    def error(self) -> float:
        """The largest error."""
        return max(self.lacking, float(self.errors.max()))

    def repeats(self, site: Site) -> bool:
        """Return whether a place is another call of the same function in the same run."""
        first = self.sites[0]
        return (site.path, site.name, site.run) == (first.path, first.name, first.run)

    def join(self, other: Match) -> Match:
        """Return the match with the places of both."""
        nearer = other.errors < self.errors
        return Match(
            self.sites + other.sites,
            max(self.lacking, other.lacking),
            torch.where(nearer, other.errors, self.errors),
            torch.where(nearer[:, None, None], other.operators, self.operators),
        )


def _match(name: str, maps: Tensor, sites: list[Site], known: dict[int, Responses]) -> Match | None:
    """Return where the operators of a layer are found, or None if no place has operators.

    A layer may have the operators of several calls of one function, as of one call for each head.

    Args:
        name: The name of the layer.
        maps: The operators of the layer, (h, L, L).
        sites: Places where they may be.
        known: Responses that were obtained before, by the identity of their places.
    """
    best: Match | None = None
    joint: Match | None = None  # of places all of whose operators the layer has
    for site in sites:
        if joint is not None and joint.error < OPERATORS and not joint.repeats(site):
            break
        matches = []
        for response in known.setdefault(id(site), Responses(site)):
            if response.maps.shape[1:] == maps.shape[1:]:
                errors = response.errors(maps)
                nearest = response.maps[errors.argmin(1)]
                matches.append(Match([site], float(errors.amin(0).max()), errors.amin(1), nearest))
                if matches[-1].lacking < OPERATORS:
                    break
        if not matches:
            continue
        whole = min(matches, key=lambda match: match.lacking)
        nearest_match = min(matches, key=lambda match: match.error)
        if best is None or nearest_match.error < best.error:
            best = nearest_match
        if whole.lacking < OPERATORS:
            joint = whole if joint is None or not joint.repeats(site) else joint.join(whole)
    if joint is not None and best is not None and joint.error <= best.error:
        best = joint
    path = module_of(name)
    if best is not None and best.error >= OPERATORS:
        # Around the layer there may be other places than the layer itself.
        inside = [site for site in best.sites if f"{site.path}.".startswith(f"{path}.")]
        return best if inside else None
    return best


class Responses:
    """The operators at a place, each obtained when it is first asked for."""

    def __init__(self, site: Site) -> None:
        self._found: list[Response] = []
        self._left = itertools.islice(operators_at(site), _WAYS)

    def __iter__(self) -> Iterator[Response]:
        """Yield the operators for every choice of values."""
        yield from self._found
        for response in self._left:
            self._found.append(response)
            yield response


def module_of(name: str) -> str:
    """Return the path of the module in the name of a layer."""
    return re.sub(r" .*$", "", name)


def _near(name: str, sites: list[Site]) -> list[Site]:
    """Return the sites that a layer may be: at its path first, then inside, then outside."""
    path = module_of(name)
    run = re.search(r"\(run (\d+)\)", name)
    number = int(run.group(1)) if run else 1
    sites = [site for site in sites if site.run == number]
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
    layers = [{"places": [], **entry} for entry in layers]
    verified = {
        place
        for entry in layers
        if entry.get("error", 1.0) < OPERATORS
        for place in entry["places"]
    }
    known = {str(site) for site in sites}
    others = [
        entry["name"]
        for entry in layers
        if entry.get("error", 1.0) >= OPERATORS or not known & {*entry["places"]}
    ]
    open_sites = [
        site
        for site in sites
        if not site.selects
        and str(site) not in verified
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
    return [{"place": str(site), "class": type(site.module).__name__} for site in open_sites]


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
        missing = [f"{site['place']}, a {site['class']}" for site in row["silent"]]
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
    try:
        signal.alarm(limit)
        torch.set_num_threads(1)
        file.write_text(json.dumps(examine(model_type)), encoding="utf-8")
    except BaseException as error:
        row = _failed(model_type, f"{type(error).__name__}: {error}"[:400])
        file.write_text(json.dumps(row), encoding="utf-8")
    finally:
        os._exit(0)


def _failed(model_type: str, reason: str) -> dict[str, Any]:
    name = model_class(model_type).__name__
    return {"type": model_type, "class": name, "verdict": "raises", "reason": reason}


def examine_all(types: list[str], jobs: int, limit: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of types as they are finished."""
    todo = list(reversed(types))
    running: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        while todo or running:
            while todo and len(running) < jobs:
                model_type = todo.pop()
                process = _in_child(model_type, limit, Path(folder, f"{model_type}.json"))
                running[process] = model_type
            process, _ = os.wait()
            if process not in running:  # another child of this process
                continue
            model_type = running.pop(process)
            file = Path(folder, f"{model_type}.json")
            if file.exists():
                yield json.loads(file.read_text(encoding="utf-8"))
            else:
                yield _failed(model_type, f"it took more than {limit} seconds.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--types", help="Types to examine, with commas; the results are printed, and not kept."
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="Number of processes.")
    parser.add_argument("--limit", type=int, default=600, help="Seconds that a type may take.")
    parser.add_argument("--fresh", action="store_true", help="Examine finished types again.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--page", type=Path, default=_PAGE, help="Markdown file of the results.")
    arguments = parser.parse_args()
    known = causal_types()
    types = arguments.types.split(",") if arguments.types else list(known)
    for unknown in set(types) - set(known):
        parser.error(f"{unknown} is not a causal type of transformers {transformers.__version__}.")
    arguments.output.mkdir(parents=True, exist_ok=True)
    partial = arguments.output / "coverage.partial.jsonl"
    if arguments.fresh and arguments.types is None:
        partial.unlink(missing_ok=True)
    rows = {}
    if partial.exists() and arguments.types is None:
        lines = partial.read_text(encoding="utf-8").splitlines()
        rows = {row["type"]: row for row in map(json.loads, lines)}
    todo = [model_type for model_type in types if model_type not in rows]
    with Progress(transient=True) as progress:
        task = progress.add_task("types", total=len(todo))
        for found in examine_all(todo, arguments.jobs, arguments.limit):
            row = rows[found["type"]] = compact(found)
            progress.update(task, advance=1, description=row["type"])
            if arguments.types is None:
                with partial.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            if row["verdict"] != "read" or arguments.types:
                text = f"{row['type']}: {row['verdict']} {row['reason']}"
                progress.console.print(text, markup=False, soft_wrap=True)
    ordered = [rows[model_type] for model_type in known if model_type in rows]
    print(json.dumps(summary(ordered), indent=2))
    if arguments.types is None:
        results = {"transformers": transformers.__version__, "summary": summary(ordered)}
        write(arguments.output / "coverage.json", {**results, "rows": ordered})
        text = arguments.page.read_text(encoding="utf-8")
        arguments.page.write_text(fill(text, {**results, "rows": ordered}), encoding="utf-8")
        partial.unlink()


if __name__ == "__main__":
    main()
