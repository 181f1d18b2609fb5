"""The app itself, what its commands share, and how they fail: in one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

try:
    import rich  # noqa: F401
    import typer
except ImportError as missing:
    print(
        f'gramian: the command line needs {missing.name}: pip install "gramian[cli]".',
        file=sys.stderr,
    )
    raise SystemExit(1) from None

if TYPE_CHECKING:
    from gramian.models import GramianForCausalLM
    from gramian.tasks import Document, Task

__all__ = [
    "Debug",
    "Json",
    "ModelFolder",
    "Seed",
    "Settings",
    "TaskConfig",
    "TaskSeed",
    "UserError",
    "app",
    "byte_tokenizer",
    "check_new",
    "check_tolerance",
    "find_tasks",
    "fraction",
    "load_model",
    "load_tokenizer",
    "main",
    "one_line",
    "quiet_transformers",
    "read_texts",
    "token_ids",
]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="The memory of causal sequence models: train, convert, distil, measure, generate, export.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback if something goes wrong.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
TaskSeed = Annotated[
    int | None,
    typer.Option(help="Seed of everything random; if not given, that of --config, or 0."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Setting of the task to change; may be repeated."
    ),
]
TaskConfig = Annotated[
    Path | None, typer.Option("--config", help="Training configuration whose task to take.")
]
ModelFolder = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a saved model.")]


class UserError(Exception):
    """Something the user can put right; its message is one sentence."""


def main() -> None:
    """The `gramian` command. Ends the process with the exit statuses named above."""
    debug = "--debug" in sys.argv[1:]
    try:
        app()
    except (UserError, OSError) as error:
        if debug:
            raise
        _fail(one_line(error))
    except ImportError as error:
        if debug:
            raise
        advice = "" if "pip install" in str(error) else ' Run: pip install "gramian[cli]".'
        _fail(one_line(error) + advice)
    except Exception as error:
        if debug:
            raise
        _fail(f"{type(error).__name__}: {one_line(error)} (--debug shows where)")


def _fail(message: str) -> NoReturn:
    print(f"gramian: {message}", file=sys.stderr)
    raise SystemExit(1)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or "no message."


def _show_version(wanted: bool) -> None:
    if wanted:
        from gramian import __version__

        print(f"gramian {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


def read_texts(text: Path) -> list[Document]:
    """The documents of a file: FASTA's records, JSON lines, or a text."""
    from gramian.tasks import read_documents

    try:
        return list(read_documents(text))
    except ValueError as error:
        raise UserError(one_line(error)) from error
    except OSError as error:
        raise UserError(f"The text {text} cannot be read: {error.strerror}.") from error


def check_new(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already; name a folder that does not.")


def check_tolerance(tol: float) -> None:
    if not 0 < tol < 1:
        raise UserError(f"The tolerance must lie between 0 and 1, both excluded; got {tol:g}.")


def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_model(folder: Path) -> GramianForCausalLM:
    from gramian.models import load

    try:
        return load(folder)
    except (OSError, ValueError) as error:
        raise UserError(one_line(error)) from error


def byte_tokenizer(folder: Path, model: GramianForCausalLM) -> Any:
    """What a model without a tokenizer of its own reads, if it has a vocabulary of bytes."""
    from gramian.models import ByteTokenizer

    tokenizer = ByteTokenizer()
    if model.config.vocab_size != len(tokenizer):
        raise UserError(f"{folder} has no tokenizer, so its tokens cannot be read or written.")
    return tokenizer


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer saved with a model, or None."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"The tokenizer in {folder} cannot be read: {one_line(error)}") from error


def token_ids(folder: Path, model: GramianForCausalLM, text: Path) -> list[Any]:
    """All tokens of each document of a file, (count)."""
    from torch import from_numpy

    from gramian.tasks import Encoder

    encode = Encoder(load_tokenizer(folder) or byte_tokenizer(folder, model))
    try:
        return [from_numpy(encode(document)) for document in read_texts(text)]
    except ValueError as error:
        raise UserError(one_line(error)) from error


def find_tasks(
    names: list[str], settings: list[str], config: Path | None, seed: int | None
) -> tuple[dict[str, Task], int]:
    """The tasks of `gramian.tasks` that were named and the configuration's, with changed settings;
    and the seed, which is the configuration's if none was given."""
    from gramian import tasks

    ours = [name for name in names if name in tasks.names()]
    if settings and len(ours) + (config is not None) != 1:
        raise typer.BadParameter("--set needs one --task of gramian.tasks, or --config.")
    found = {}
    try:
        changes: dict[str, Any] = {}
        if settings:
            from gramian.training.configuration import read_change

            changes = dict(read_change(setting) for setting in settings)
        wanted: list[dict[str, Any]] = [{"name": name} for name in ours]
        if config is not None:
            from gramian.training import load_config

            loaded = load_config(config)
            wanted.append(dict(loaded.task))
            seed = loaded.seed if seed is None else seed
        for values in wanted:
            values |= changes
            values.pop("streaming", None)
            name, chosen = values.pop("name"), values.pop("setting", None)
            found[name] = tasks.build(name, chosen, **values)
    except (TypeError, ValueError) as error:
        raise UserError(one_line(error)) from error
    return found, seed or 0


def fraction(name: str, text: str) -> float:
    """A number, or one followed by a percent sign."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise UserError(f"{name} takes a positive number or percentage; got {text!r}.")
    return value
