"""Which tools that users of Hugging Face models type next work on Gramian's models?

Each trial runs a tool on the models of the demo in a process of its own, and compares what it
computes with the model's plain forward pass. A trial has one of these outcomes:

works      the tool works, and its numbers are right
refused    the tool is refused in one sentence
fails      neither of these
not tried  a package that the trial needs is not installed

    make demo
    python benchmarks/ecosystem.py [--models demo-output] [--only NAME,…] [--page]

Rows are kept as they are finished, those of `_trials_SUBJECT.py` in
`results/ecosystem_SUBJECT.json`. A row whose packages are not installed here keeps its earlier
outcome, so that tools which cannot be installed together are tried one after the other. With
`--page` the page is made from the kept rows, and nothing is run. `benchmarks/_trials.py` says how
to add a trial.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._pages import fill_marks, plain, table
from benchmarks._report import write
from benchmarks._trials import TRIALS, Models, Refusal, Trial

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).resolve().parent.parent / "docs/results/ecosystem.md"
OUTCOMES = ("works", "refused", "fails", "not tried")

for file in sorted(Path(__file__).parent.glob("_trials_*.py")):
    importlib.import_module(f"benchmarks.{file.stem}")


def examine(name: str, folder: Path) -> dict[str, Any]:
    """Run a trial in this process, and return its outcome and what was seen."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            seen = TRIALS[name].run(Models(folder, Path(scratch)))
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            return {"outcome": "fails", "seen": f"{type(error).__name__}: {lines[0]}"[:400]}
    return {"outcome": "refused" if isinstance(seen, Refusal) else "works", "seen": str(seen)}


def row(trial: Trial, folder: Path, limit: float) -> dict[str, Any]:
    """Run a trial in a process of its own, and return its row."""
    about = {"tool": trial.tool, "tried": trial.tried, "versions": trial.versions()}
    if missing := trial.missing():
        lacking = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
        return about | {"outcome": "not tried", "seen": f"{lacking}."}
    command = [sys.executable, __file__, "--models", str(folder), "--run", trial.name]
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return about | {"outcome": "fails", "seen": f"It took more than {limit:.0f} seconds."}
    lines = ran.stdout.strip().splitlines()
    if ran.returncode or not lines:
        last = (ran.stderr.strip().splitlines() or [""])[-1]
        return about | {"outcome": "fails", "seen": f"exit status {ran.returncode}: {last}"[:400]}
    found: dict[str, Any] = json.loads(lines[-1])
    if found["outcome"] == "fails":
        print(ran.stderr, file=sys.stderr)
    return about | found


def kept_rows() -> dict[str, dict[str, Any]]:
    """Return the kept rows of all known trials by their names."""
    found: dict[str, dict[str, Any]] = {}
    for file in RESULTS.glob("ecosystem_*.json"):
        found |= json.loads(file.read_text(encoding="utf-8"))["trials"]
    return {name: found[name] for name in TRIALS if name in found}


def keep(rows: dict[str, dict[str, Any]], subject: str) -> None:
    """Write the rows of a subject, and the page about all rows."""
    own = {name: one for name, one in rows.items() if subject_of(name) == subject}
    write(RESULTS / f"ecosystem_{subject}.json", {"trials": own})
    write_page(rows)


def subject_of(name: str) -> str:
    """Return the subject of a trial, which its file is named after."""
    return name.partition(".")[0]


def write_page(rows: dict[str, dict[str, Any]]) -> None:
    """Put the rows into the page about them."""
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(fill_marks(page, blocks(rows)), encoding="utf-8")


def blocks(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the parts of the page that follow from the rows."""
    counts = [
        (outcome, str(sum(one["outcome"] == outcome for one in rows.values())))
        for outcome in OUTCOMES
    ]
    lines = [
        (
            plain(" ".join((one["tool"], next(iter(one["versions"].values()), ""))).strip()),
            plain(one["tried"]),
            one["outcome"],
            plain(one["seen"]),
        )
        for one in rows.values()
    ]
    return {
        "summary": table(("outcome", "trials"), counts),
        "trials": table(("tool", "tried", "outcome", "what was seen"), lines),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("demo-output"), help="Demo's folder.")
    parser.add_argument("--only", help="Names of trials or subjects, with commas.")
    parser.add_argument("--limit", type=float, default=600, help="Seconds that a trial may take.")
    parser.add_argument("--list", action="store_true", help="List the trials, and run none.")
    parser.add_argument("--page", action="store_true", help="Make the page, and run no trial.")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.models.resolve()
    if arguments.run:
        print(json.dumps(examine(arguments.run, folder)))
        return
    if arguments.list or arguments.page:
        if arguments.page:
            write_page(kept_rows())
        else:
            print("\n".join(f"{name}: {one.tool}: {one.tried}" for name, one in TRIALS.items()))
        return
    known = {*TRIALS, *map(subject_of, TRIALS)}
    wanted = set(arguments.only.split(",")) if arguments.only else known
    if unknown := sorted(wanted - known):
        parser.error(f"there is no trial {unknown[0]}; --list names them.")
    for name in ("original", "distilled"):
        if not (folder / name / "config.json").is_file():
            parser.error(f"{folder} must hold the models of the demo; it lacks {name}/config.json.")
    rows = kept_rows()
    for name in [name for name in TRIALS if {name, subject_of(name)} & wanted]:
        found = row(TRIALS[name], folder, arguments.limit)
        if found["outcome"] != "not tried" or name not in rows:
            rows[name] = found
        rows = {known: rows[known] for known in TRIALS if known in rows}
        print(f"{name}: {found['outcome']}: {found['seen']}", flush=True)
        keep(rows, subject_of(name))


if __name__ == "__main__":
    main()
