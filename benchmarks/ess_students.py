"""Does a teacher's effective state-size say which state its students need?

This is the distillation experiment of Parnichkun et al. 2025 (arXiv 2504.19561, section 5.2) in
small. Teachers are models with gated linear attention (GLA) of 256 states. They learn multi-query
associative recall of 2, 4 or 8 pairs. Students have the same layers and fewer states, and learn the
predictions of a teacher: the loss is KL(teacher ‖ student) at the queries, as with the key
`teacher` of `gramian train`. According to the paper, the loss rises with the teacher's effective
state-size (ESS), so that ESS is a heuristic for the size of a student.

    python benchmarks/ess_students.py [--seeds N] [--runs FOLDER]

All students of a teacher are trained on the same batches. Divergence, accuracy and ESS are measured
on held-out sequences with all pairs. The results of every teacher and its students are stored in
the folder `--runs`. If the benchmark is interrupted, the same command continues it. `--document`
writes the tables, and `--figure` draws the figure.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._ess_trainings import (
    EVALUATED,
    MEASURED,
    RATE,
    Descent,
    Setting,
    answers,
    model_of,
    spread,
    tokens,
)
from benchmarks._pages import fill_marks
from benchmarks._pages import table as as_table
from benchmarks._report import write
from gramian import effective_state_size
from gramian._staging import staged_file
from gramian.memory import Observer
from gramian.models import GramianForCausalLM
from gramian.reports import save_figure
from gramian.tasks import find_kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRS = (8, 4, 2)
LENGTH = 32
TEACHER = 256
STATES = (2, 4, 8, 16, 32, 64, 128)
BATCH = 16
LONGER = 2  # steps of students, relative to those of teachers: small states learn recall later
TOLERANCE = 1e-2  # of singular values, relative to the largest one, for the tolerance-ESS
KEPT = 0.05  # accuracy that a student may lose and still count as good as its teacher
COLOURS = {2: "#009E73", 4: "#0072B2", 8: "#D55E00"}

Cell = dict[str, Any]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def setting_of(state: int, pairs: int, seed: int, steps: int) -> Setting:
    return Setting(mixer="GLA", state=state, pairs=pairs, length=LENGTH, steps=steps, seed=seed)


def new_model(setting: Setting) -> GramianForCausalLM:
    torch.manual_seed(setting.seed)
    return model_of(setting)


def fit(
    models: Sequence[GramianForCausalLM],
    setting: Setting,
    stream: int,
    loss: Loss,
    teacher: GramianForCausalLM | None = None,
) -> None:
    """Train models in place on the same batches, of between one pair and all pairs.

    Args:
        models: the models, in training mode.
        setting: number of steps, task and seed.
        stream: number of the stream of random sequences.
        loss: function of a model's logits (count, classes), the labels (count) and, if there is a
            teacher, the teacher's logits.
        teacher: model whose logits `loss` receives.
    """
    random = np.random.default_rng([setting.seed, stream])
    descents = [Descent(model, RATE, setting.steps) for model in models]
    for _ in range(setting.steps):
        x, y = tokens(setting, random, BATCH, 1)
        targets = torch.empty(0)
        if teacher is not None:
            with torch.no_grad():
                targets, _ = answers(teacher, x, y)
        for descent in descents:
            logits, values = answers(descent.model, x, y)
            descent.step(loss(logits, values, targets))


def on_labels(logits: Tensor, values: Tensor, _: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, values)


def on_teacher(logits: Tensor, values: Tensor, targets: Tensor) -> Tensor:
    """Return the mean KL(teacher ‖ student) over the queries, in nats."""
    return find_kind("tokens").divergence(logits, targets, values) / len(values)


@torch.no_grad()
def state_sizes(model: GramianForCausalLM, x: Tensor) -> dict[str, float]:
    """Return the ESS of a model's mixer: the mean and the largest over positions."""
    mixer = model.model.layers[1].mixer
    observer = Observer(model, type(mixer))
    model.model(x[:MEASURED])
    (system,) = observer.operators()
    observer.close()
    entropy = effective_state_size(system).mean((0, 1))  # (length)
    counts = effective_state_size(system, measure="tolerance", rtol=TOLERANCE).mean((0, 1))
    return {
        "ess": float(entropy.mean()),
        "largest ess": float(entropy.max()),
        "tolerance ess": float(counts.mean()),
        "largest tolerance ess": float(counts.max()),
    }


@torch.no_grad()
def accuracy(logits: Tensor, values: Tensor) -> float:
    return float((logits.argmax(-1) == values).double().mean())


def teach(setting: Setting, folder: Path) -> GramianForCausalLM:
    """Return the teacher of a setting, which is trained unless an earlier call has stored it."""
    path = folder / f"teacher-{setting.pairs}-{setting.seed}-{setting.steps}.pt"
    teacher = new_model(setting)
    if path.exists():
        teacher.load_state_dict(torch.load(path, weights_only=True))
    else:
        fit([teacher], setting, 0, on_labels)
        with staged_file(path) as stage:
            torch.save(teacher.state_dict(), stage)
    return teacher.eval()


def measure(pairs: int, seed: int, steps: int, folder: Path) -> Cell:
    """Train a teacher and its students, and measure them on held-out sequences."""
    began = time.process_time()
    setting = setting_of(TEACHER, pairs, seed, steps)
    x, y = tokens(setting, np.random.default_rng([seed, 1]), EVALUATED, pairs)
    teacher = teach(setting, folder)
    students = {n: new_model(setting_of(n, pairs, seed, steps)) for n in STATES}
    longer = replace(setting, steps=LONGER * steps)
    fit(list(students.values()), longer, 2, on_teacher, teacher)
    with torch.no_grad():
        targets, values = answers(teacher, x, y)
        found = {n: answers(student.eval(), x, y)[0] for n, student in students.items()}
    return {
        "pairs": pairs,
        "seed": seed,
        "steps": steps,
        "teacher": {"accuracy": accuracy(targets, values), **state_sizes(teacher, x)},
        "students": {
            str(n): {
                "divergence": float(on_teacher(logits, values, targets)),
                "accuracy": accuracy(logits, values),
                **state_sizes(students[n], x),
            }
            for n, logits in found.items()
        },
        "seconds": time.process_time() - began,
    }


def sweep(steps: int, seeds: int, folder: Path) -> list[Cell]:
    """Measure all teachers that have no result yet, seed by seed, and return all results."""
    path = folder / "cells.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    kept: dict[tuple[int, int, int], Cell] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            cell = json.loads(line)
            kept[cell["pairs"], cell["seed"], cell["steps"]] = cell
    chosen = [(pairs, seed, steps) for seed in range(seeds) for pairs in PAIRS]
    for one in chosen:
        if one in kept:
            continue
        cell = kept[one] = measure(*one, folder)
        with path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(cell) + "\n")
        told = ", ".join(
            f"{n}: {student['divergence']:.3f} / {student['accuracy']:.2f}"
            for n, student in cell["students"].items()
        )
        print(
            f"{cell['pairs']} pairs, seed {cell['seed']}: accuracy "
            f"{cell['teacher']['accuracy']:.3f}, ESS {cell['teacher']['ess']:.2f}; KL / accuracy "
            f"of students: {told} ({cell['seconds']:.0f} s)",
            flush=True,
        )
    return [kept[one] for one in chosen]


def pooled(cells: Sequence[Cell]) -> list[dict[str, float]]:
    """List all pairs of a teacher and a student, each with what correlations need."""
    return [
        {
            "pairs": cell["pairs"],
            "state": int(n),
            "ess": cell["teacher"]["ess"],
            "largest ess": cell["teacher"]["largest ess"],
            "divergence": student["divergence"],
            "lost": cell["teacher"]["accuracy"] - student["accuracy"],
        }
        for cell in cells
        for n, student in cell["students"].items()
    ]


def correlations(cells: Sequence[Cell]) -> dict[str, dict[str, float]]:
    """Return Spearman's correlations of the teacher's ESS with the two losses of its students.

    The keys are the sizes of students, and "all", whose correlations are over all students. There,
    "per state" replaces the ESS by its ratio to the student's state.
    """
    rows = pooled(cells)
    found: dict[str, dict[str, float]] = {}
    for n in STATES:
        some = [row for row in rows if row["state"] == n]
        found[str(n)] = {name: _rank(some, name) for name in ("divergence", "lost")}
    found["all"] = {name: _rank(rows, name) for name in ("divergence", "lost")}
    ratios = [{**row, "ess": row["ess"] / row["state"]} for row in rows]
    found["all, per state"] = {name: _rank(ratios, name) for name in ("divergence", "lost")}
    return found


def _rank(rows: Sequence[dict[str, float]], name: str) -> float:
    return float(spearmanr([row["ess"] for row in rows], [row[name] for row in rows]).statistic)


def prediction(cells: Sequence[Cell], size: str) -> dict[str, dict[str, int]]:
    """Count the students that recall like their teachers, by whether their state reaches its ESS.

    Args:
        cells: the results.
        size: "ess", the mean over positions, or "largest ess".
    """
    counts = {side: {"students": 0, "as good": 0} for side in ("below", "at least")}
    for row in pooled(cells):
        side = counts["below" if row["state"] < row[size] else "at least"]
        side["students"] += 1
        side["as good"] += row["lost"] <= KEPT
    return counts


def teacher_table(cells: Sequence[Cell]) -> str:
    lines = []
    for pairs in sorted(PAIRS):
        some = [cell["teacher"] for cell in cells if cell["pairs"] == pairs]
        ess = [one["ess"] for one in some]
        lines.append(
            [
                str(pairs),
                spread([one["accuracy"] for one in some]),
                f"{mean(ess):.2f} ({min(ess):.2f} … {max(ess):.2f})",
                f"{mean(one['largest ess'] for one in some):.2f}",
                f"{mean(one['tolerance ess'] for one in some):.1f}",
                f"{100 * mean(ess) / TEACHER:.1f} %",
            ]
        )
    header = ["pairs", "accuracy", "ESS", "at its largest", "tolerance-ESS", "ESS / TSS"]
    return as_table(header, lines)


def student_table(cells: Sequence[Cell]) -> str:
    lines = []
    for n in STATES:
        line = [str(n)]
        for pairs in sorted(PAIRS):
            some = [cell["students"][str(n)] for cell in cells if cell["pairs"] == pairs]
            line.append(spread([one["divergence"] for one in some]))
            line.append(f"{mean(one['accuracy'] for one in some):.2f}")
        lines.append(line)
    header = ["n"]
    for pairs in sorted(PAIRS):
        header += [f"KL, {pairs} pairs", "accuracy"]
    return as_table(header, lines)


def correlation_table(cells: Sequence[Cell]) -> str:
    names = {"all": "all", "all, per state": "all, ESS / n"}
    lines = [
        [names.get(name, name), f"{row['divergence']:.2f}", f"{row['lost']:.2f}"]
        for name, row in correlations(cells).items()
    ]
    return as_table(["n", "ρ(ESS, KL)", "ρ(ESS, lost accuracy)"], lines)


def prediction_table(cells: Sequence[Cell]) -> str:
    lines = []
    for size, name in (("ess", "ESS"), ("largest ess", "largest ESS")):
        for side, row in prediction(cells, size).items():
            sign = "<" if side == "below" else "≥"
            lines.append([f"n {sign} {name}", str(row["students"]), str(row["as good"])])
    return as_table(["students", "number", "as good as the teacher"], lines)


TABLES = {
    "teachers": teacher_table,
    "students": student_table,
    "correlations": correlation_table,
    "prediction": prediction_table,
}


def draw(cells: Sequence[Cell]) -> "Figure":
    """Draw the divergence and the accuracy of students against their state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for pairs in sorted(PAIRS):
        some = [cell for cell in cells if cell["pairs"] == pairs]
        ess = mean(cell["teacher"]["ess"] for cell in some)
        for axes, name in ((left, "divergence"), (right, "accuracy")):
            for cell in some:
                values = [cell["students"][str(n)][name] for n in STATES]
                axes.plot(STATES, values, ".", color=COLOURS[pairs], alpha=0.5)
            means = [mean(cell["students"][str(n)][name] for cell in some) for n in STATES]
            axes.plot(STATES, means, color=COLOURS[pairs], label=f"{pairs} pairs, ESS {ess:.1f}")
            axes.axvline(ess, color=COLOURS[pairs], linewidth=0.8, linestyle=":")
        reached = mean(cell["teacher"]["accuracy"] for cell in some)
        right.axhline(reached, color=COLOURS[pairs], linewidth=0.8, linestyle="--")
    left.set_yscale("log")
    for axes, title, y in (
        (left, "KL(teacher ‖ student); dotted: the teacher's ESS", "nats per query"),
        (right, "accuracy; dashed: the teacher's", "accuracy"),
    ):
        axes.set_xscale("log", base=2)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set(xlabel="states of the student", ylabel=y)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, alpha=0.25, linewidth=0.5)
    left.legend(fontsize=8, frameon=False)
    return figure


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, help="Steps of the teachers.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="One seed of 4 steps; keep nothing.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/ess_students"))
    parser.add_argument("--output", type=Path, default=here / "results" / "ess_students.json")
    parser.add_argument("--document", type=Path, help="Page with marks for the tables.")
    parser.add_argument("--figure", type=Path, help="File for the figure.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            cells = sweep(4, 1, Path(folder))
        print("\n\n".join(table(cells) for table in TABLES.values()))
        return
    cells = sweep(arguments.steps, arguments.seeds, arguments.runs)
    results = {
        "benchmark": "loss of distilling recurrences against the teacher's effective state-size",
        "steps": arguments.steps,
        "seconds": sum(cell["seconds"] for cell in cells),
        "correlations": correlations(cells),
        "prediction": {size: prediction(cells, size) for size in ("ess", "largest ess")},
        "cells": cells,
    }
    tables = {name: table(cells) for name, table in TABLES.items()}
    print("\n\n".join(tables.values()))
    if arguments.document is not None:
        page = arguments.document.read_text(encoding="utf-8")
        arguments.document.write_text(fill_marks(page, tables), encoding="utf-8")
    write(arguments.output, results)
    if arguments.figure is not None:
        save_figure(draw(cells), arguments.figure)


if __name__ == "__main__":
    main()
