"""Run one command on many inputs, keep what an earlier call finished, and go on after a failure.

NAME…            what the command writes for the input NAME
jobs/NAME.json   the command, the digests of the files that it reads, and whether it finished
jobs/NAME.log    what it printed, and the traceback of its error

A record is written before its command starts. So a result without a record is not ours, and a
result whose record says that the command did not finish was left by a call that was killed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gramian._cluster import Call, Lost, run_calls
from gramian._hashing import hash_path
from gramian._json import to_json
from gramian._staging import staged_file
from gramian.cli._app import Failure, UserError, one_line, run_command

__all__ = ["Job", "Outcome", "Template", "plan", "run_jobs"]

INPUT, OUTPUT = "{input}", "{output}"
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def _split(text: str, windows: bool = os.name == "nt") -> list[str]:
    """Split a command into words as a shell does. In paths of Windows, a backslash is itself."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    if windows:
        lexer.escape = ""
    return list(lexer)


@dataclass(frozen=True)
class Template:
    """A command whose arguments contain `{input}` and `{output}`.

    Attributes:
        words: the command and its arguments, without `gramian`.
    """

    words: tuple[str, ...]

    @staticmethod
    def of(text: str) -> Template:
        """Split the text of a command into words as a shell does.

        Raises:
            UserError: if the text does not contain both `{input}` and `{output}`, or its quotes do
                not match.
        """
        try:
            words = _split(text)
        except ValueError as error:
            raise UserError(f"the command {text!r} cannot be split: {one_line(error)}.") from error
        for mark in (INPUT, OUTPUT):
            if not any(mark in word for word in words):
                raise UserError(
                    f"the command must contain {INPUT} and {OUTPUT}, such as 'distill {INPUT} "
                    f"{OUTPUT}'; got {text!r}."
                )
        return Template(tuple(words))

    def fill(self, source: Path, target: Path) -> tuple[str, ...]:
        """Return the words for an input and for the path of its results."""
        return tuple(
            word.replace(INPUT, str(source)).replace(OUTPUT, str(target)) for word in self.words
        )

    def outputs(self, target: Path) -> tuple[Path, ...]:
        """Return the paths that the command writes."""
        words = (word[word.index(OUTPUT) :] for word in self.words if OUTPUT in word)
        return tuple(dict.fromkeys(Path(word.replace(OUTPUT, str(target))) for word in words))

    def shared(self) -> dict[str, Path]:
        """Return the files and folders that the command reads for every input, by their words."""
        found = {}
        for word in self.words[1:]:
            path = Path(word.partition("=")[2] if word.startswith("--") and "=" in word else word)
            if INPUT not in word and OUTPUT not in word and str(path) != "." and path.exists():
                found[word] = path
        return found


@dataclass(frozen=True)
class Job:
    """A command on one input.

    Attributes:
        name: name of the input in the folder of results.
        source: the input, a file or folder.
        words: the command and its arguments.
        outputs: the paths that it writes.
        record: file of the record; the log is beside it.
        template: the words before they were filled, which the record holds.
        shared: digest of every file that the command reads for all inputs.
    """

    name: str
    source: Path
    words: tuple[str, ...]
    outputs: tuple[Path, ...]
    record: Path
    template: tuple[str, ...]
    shared: dict[str, str]

    @property
    def log(self) -> Path:
        """Return the file of what the command prints."""
        return self.record.with_suffix(".log")


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        job: the job.
        state: "done", "kept" from an earlier call, or "failed".
        error: one sentence about the failure, or None.
    """

    job: Job
    state: str
    error: str | None = None


def plan(template: Template, sources: list[Path], folder: Path, parents: int) -> list[Job]:
    """Return the job of every input.

    Args:
        template: the command.
        sources: the inputs.
        folder: folder of the results.
        parents: number of folders above an input that its name begins with.

    Raises:
        UserError: if an input does not exist, or two inputs have the same name.
    """
    found: dict[str, Path] = {}
    for source in sources:
        if not source.exists():
            raise UserError(f"there is no file or folder {source}.")
        name = _name(source, parents)
        if name in found:
            raise UserError(
                f"{found[name]} and {source} would both be named {name} in {folder}; --parents "
                f"{parents + 1} puts the names of {parents + 1} of their folders in front."
            )
        if name == "jobs":
            raise UserError(f"{source} would be named jobs, the folder of the records; rename it.")
        found[name] = source
    shared = {word: hash_path(path) for word, path in template.shared().items()}
    return [
        Job(
            name,
            source,
            template.fill(source, folder / name),
            template.outputs(folder / name),
            folder / "jobs" / f"{name}.json",
            template.words,
            shared,
        )
        for name, source in found.items()
    ]


def run_jobs(
    jobs: list[Job],
    *,
    address: str | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Outcome]:
    """Run the unfinished jobs, and yield every outcome.

    Args:
        jobs: jobs from `plan`.
        address: address of a Ray cluster, or None to run one job after the other in this process.
        threads: number of threads of every job; by default 1 on a cluster and PyTorch's number
            here.
        progress: function that is called as `progress(done, all)` with numbers of jobs.

    Raises:
        UserError: before any job starts, if results exist that were made otherwise.
        ImportError: if an address is given and Ray is not installed.
    """
    kept = [job for job in jobs if _is_finished(job)]
    waiting = [job for job in jobs if job not in kept]
    done = len(kept)
    progress(done, len(jobs))
    for job in kept:
        yield Outcome(job, "kept")
    for job in waiting:
        job.record.parent.mkdir(parents=True, exist_ok=True)
    for outcome in _by_ray(waiting, address, threads or 1) if address else _here(waiting, threads):
        done += 1
        progress(done, len(jobs))
        yield outcome


def _here(jobs: list[Job], threads: int | None) -> Iterator[Outcome]:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    for job in jobs:
        error = _run(job)
        yield Outcome(job, "failed" if error else "done", error)


def _by_ray(jobs: list[Job], address: str, threads: int) -> Iterator[Outcome]:
    calls = [
        Call(job.name, _run, (job,), threads, any("cuda" in word for word in job.words))
        for job in jobs
    ]
    names = {job.name: job for job in jobs}
    for ended in run_calls(calls, address) if calls else ():
        if ended is None:
            continue
        call, error = ended
        reason = error.reason if isinstance(error, Lost) else error
        yield Outcome(names[call.name], "failed" if reason else "done", reason)


def _run(job: Job) -> str | None:
    """Run a job in this process, and return the sentence of its error, or None."""
    with job.log.open("w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            _clear(job)
            description = _describe(job)
            _write(job, description | {"finished": False})
            run_command(list(job.words))
            missing = [str(path) for path in job.outputs if not path.exists()]
            if missing:
                return f"the command did not write {' and '.join(missing)}."
            _write(job, description | {"finished": True})
        except Failure as failure:
            traceback.print_exception(failure.__cause__ or failure)
            return f"{failure}"
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {one_line(error)}"
    return None


def _clear(job: Job) -> None:
    """Remove the results of a call that was killed between two of them."""
    if job.record.exists():
        for path in job.outputs:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _is_finished(job: Job) -> bool:
    """Return whether an earlier call made the results of a job.

    Raises:
        UserError: if there are results that no such call made, or one with other options or files.
    """
    present = [path for path in job.outputs if path.exists()]
    if not present:
        return False
    try:
        record = json.loads(job.record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{present[0]} exists already and was not made by this command; remove it, or name "
            "another folder."
        ) from None
    if not record["finished"]:
        return False
    if len(present) < len(job.outputs):
        gone = next(path for path in job.outputs if path not in present)
        raise UserError(f"{present[0]} exists but {gone} does not; remove {present[0]} too.")
    changed = _changes(record, _describe(job))
    if changed:
        raise UserError(
            f"{present[0]} was made otherwise: {'; '.join(changed)}. Remove it, or name another "
            "folder."
        )
    return True


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Name what differs between two descriptions of a job."""
    changes = []
    if old["command"] != new["command"]:
        was, now = (" ".join(one["command"]) for one in (old, new))
        changes.append(f"its command was {was!r} and is now {now!r}")
    if old["input"] != new["input"]:
        changes.append("the contents of its input have changed")
    files, before = new["files"], old["files"]
    words = [word for word in files if before.get(word, files[word]) != files[word]]
    return changes + [f"the contents of {word} have changed" for word in words]


def _describe(job: Job) -> dict[str, Any]:
    """Return everything that determines the results of a job."""
    return {
        "command": list(job.template),
        "input": hash_path(job.source),
        "files": job.shared,
    }


def _write(job: Job, record: dict[str, Any]) -> None:
    with staged_file(job.record) as stage:
        text = to_json(record | {"source": str(job.source)}, indent=2)
        stage.write_text(text + "\n", encoding="utf-8")


def _name(source: Path, parents: int) -> str:
    """Return the name of an input: that of a folder, or that of a file without its suffix."""
    path = source.absolute()
    if path.is_file():
        path = path.with_suffix("") if path.suffix in _COMPRESSED else path
        path = path.with_suffix("")
    return "-".join(path.parts[1:][-1 - parents :])
