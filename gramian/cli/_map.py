"""Define the command `map`, which runs another command on many inputs."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gramian.cli._app import check_usage, command
from gramian.cli._console import console_for, finish, running
from gramian.cli._jobs import Template, plan, run_jobs
from gramian.cli._options import Json

_Command = Annotated[
    str,
    typer.Argument(
        metavar="COMMAND",
        help="Another command and its options, in quotes, with {input} and {output} where the "
        "paths go, such as 'distill {input} {output} --tol 0.01'.",
    ),
]
_Inputs = Annotated[
    list[Path],
    typer.Argument(metavar="INPUT...", help="Files or folders, such as models or genomes."),
]
_Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help="Folder of the results. {output} is the path in it with the name of the input, which "
        "is that of a folder, or of a file without its suffix.",
    ),
]
_Parents = Annotated[
    int,
    typer.Option(min=0, help="Number of folders above an input that its name begins with."),
]
_Address = Annotated[
    str | None,
    typer.Option(
        help="Address of a Ray cluster on which to run; auto is the cluster of this machine."
    ),
]
_Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of threads for each input, and of cores that it requests of a cluster "
        "(default: 1 on a cluster).",
    ),
]


@command
def map(
    template: _Command,
    inputs: _Inputs,
    output: _Output,
    parents: _Parents = 0,
    address: _Address = None,
    threads: _Threads = None,
    imports: list[str] | None = None,
    as_json: Json = False,
) -> None:
    """Run another COMMAND on every INPUT, here or on a Ray cluster.

    The same call continues one that was interrupted, and keeps the results of inputs that are
    finished. If a result was made with other options or from other files, it says which. If the
    command fails for an input, the others continue, and the exit status is 1. The folder of results
    also contains jobs/, with what the command printed for each input.
    """
    wanted = Template.of(template)
    if imports:
        more = [word for module in imports for word in ("--import", module)]
        wanted = Template((*wanted.words, *more))
    if wanted.words[0] == "map":
        raise typer.BadParameter("COMMAND must be another command than map.")
    # The console keeps its stream, because what the commands print is redirected to files.
    console = Console(file=sys.stderr)
    with running(console, f"Running {wanted.words[0]}", errors=()) as bar:
        jobs = plan(wanted, inputs, output, parents)
        for job in jobs:
            check_usage(list(job.words))
        outcomes = list(run_jobs(jobs, address=address, threads=threads, progress=bar))
    outcomes.sort(key=lambda outcome: jobs.index(outcome.job))
    counts = Counter(outcome.state for outcome in outcomes)
    words = {"done": "done", "kept": "kept from an earlier call", "failed": "failed"}
    shown = ", ".join(f"{counts[state]} {word}" for state, word in words.items() if counts[state])
    values = {
        "output": str(output),
        "jobs": [
            {
                "name": one.job.name,
                "input": str(one.job.source),
                "outputs": [str(path) for path in one.job.outputs],
                "state": one.state,
                "error": one.error,
            }
            for one in outcomes
        ],
    }
    finish(console_for(False), as_json, values, f"{shown}.", output)
    failed = [one for one in outcomes if one.state == "failed"]
    for one in failed:
        print(f"gramian: {one.job.name}: {one.error}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)
