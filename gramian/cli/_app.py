"""Define the app, register its commands, and turn errors into one line."""

from __future__ import annotations

import functools
import inspect
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Annotated, Any, NoReturn

try:
    import rich  # noqa: F401
    import typer
except ImportError as missing:
    print(
        f'gramian: the command line needs {missing.name}: pip install "gramian[cli]".',
        file=sys.stderr,
    )
    raise SystemExit(1) from None

__all__ = [
    "Failure",
    "UserError",
    "app",
    "check_usage",
    "command",
    "main",
    "one_line",
    "run_command",
]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train, convert, distil, measure, run and export causal sequence models.",
)

_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
_Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="Python file or module that registers your own tasks, filters or mixers; repeatable.",
    ),
]
_Adapt = Annotated[
    bool,
    typer.Option(
        "--adaptive-threads",
        envvar="GRAMIAN_ADAPTIVE_THREADS",
        help="Leave the processors that other processes use to them (Linux). Results may then "
        "differ by rounding errors from run to run.",
    ),
]
_EXTRAS = {  # the extra that installs each package
    "PIL": "train",
    "accelerate": "train",
    "datasets": "train",
    "gguf": "gguf",
    "lm_eval": "evaluate",
    "matplotlib": "plots",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "pandas": "train",
    "pyarrow": "genomics",
    "pyfaidx": "genomics",
    "peft": "adapters",
    "ray": "ray",
    "safetensors": "models",
    "sklearn": "train",
    "tensorboard": "train",
    "transformers": "models",
    "yaml": "train",
}
_REGISTERED = ("unknown task '", "unknown filter type '", "mixers must be among ")
"""Beginnings of messages that may mean that a module which registers parts is missing."""

_WrongUsage: Any = typer.BadParameter.__base__  # a class of click, or of typer's copy of it


class UserError(Exception):
    """An error that the user can correct. Its message is one sentence."""


class Failure(SystemExit):
    """The end of a command with status 1. Its text is a sentence that was printed, or is to be."""

    def __init__(self, sentence: str) -> None:
        super().__init__(1)
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a function as a command of the same name, and add options that all commands have.

    The modules of `--import` are imported before the function runs. Their names are passed to the
    function if it has a parameter `imports`. With `--adaptive-threads` the function runs in
    `gramian.ops.adaptive_threads`. An exception in the function ends the process with
    status 1 and one line on standard error, or with a traceback under `--debug`.
    """
    # Not by `typing.get_type_hints`: that of Python 3.10 wraps a type in Optional if the default is
    # None, and so hides what is `Annotated`.
    signature = inspect.signature(function, eval_str=True)
    wants_imports = "imports" in signature.parameters
    shared = {
        "imports": (_Imports, None),
        "adaptive_threads": (_Adapt, False),
        "debug": (_Debug, False),
    }

    @functools.wraps(function)
    def run(
        *, imports: list[str] | None, adaptive_threads: bool, debug: bool, **arguments: Any
    ) -> None:
        with _failures(debug):
            if imports:
                _import_parts(imports)
            if wants_imports:
                arguments["imports"] = imports or []
            with _threads(adaptive_threads):
                function(**arguments)

    hints = {one.name: one.annotation for one in signature.parameters.values()}
    hints |= {name: hint for name, (hint, _) in shared.items()}
    defaults = {one.name: one.default for one in signature.parameters.values()}
    defaults |= {name: default for name, (_, default) in shared.items()}
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name]
            )
            for name, default in defaults.items()
        ]
    )
    run.__annotations__ = hints
    app.command()(run)
    return function


def _threads(adaptive: bool) -> AbstractContextManager[None]:
    if not adaptive:
        return nullcontext()
    from gramian.ops import adaptive_threads

    return adaptive_threads()


def main() -> None:
    """Run the `gramian` command, and end the process with the exit status 0, 1 or 2."""
    _write_every_character()
    with _failures():
        app()


def _write_every_character(windows: bool = os.name == "nt") -> None:
    """Write `?` for characters that the encoding of an output lacks, instead of failing.

    On Windows, outputs to files and other programs are in UTF-8, as all files are, unless the user
    chooses another encoding.
    """
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if windows and not stream.isatty() and "PYTHONIOENCODING" not in os.environ:
            stream.reconfigure(encoding="utf-8")
        if stream.errors == "strict":
            stream.reconfigure(errors="replace")


@contextmanager
def _failures(debug: bool = False) -> Iterator[None]:
    """Turn every exception, except Typer's own, into exit status 1 and one line of explanation."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
            raise Failure(one_line(error)) from error
        _fail(error)


def check_usage(words: list[str]) -> None:
    """Check a command's name and arguments without running it.

    Raises:
        typer.BadParameter: if there is no such command, or it does not take the arguments.
    """
    group: Any = typer.main.get_command(app)
    try:
        with group.make_context("gramian", list(words)) as context:
            name, found, rest = group.resolve_command(context, list(words))
            found.make_context(name, rest, parent=context)
    except _WrongUsage as error:
        raise typer.BadParameter(f"{' '.join(words)}: {error.format_message()}") from error


def run_command(words: list[str]) -> None:
    """Run a command in this process.

    Raises:
        Failure: if the command ends with another status than 0.
    """
    group: Any = typer.main.get_command(app)
    try:
        status = group.main(list(words), prog_name="gramian", standalone_mode=False)
    except _WrongUsage as error:
        raise Failure(error.format_message()) from error
    if status:
        raise Failure(f"the command ended with status {status}.")


def _fail(error: Exception) -> NoReturn:
    message = one_line(error)
    if any(kind in message for kind in _REGISTERED):
        message += " Parts of your own need --import MODULE."
    if isinstance(error, ImportError):
        message += _advice(error)
    elif not isinstance(error, UserError | OSError):
        message = f"{type(error).__name__}: {message} (--debug shows where)"
    print(f"gramian: {message}", file=sys.stderr)
    raise Failure(message) from error


def _advice(error: BaseException | None) -> str:
    """Return advice on the extra that installs a missing package, unless the error names it."""
    if error is None or "pip install" in str(error):
        return ""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if package in _EXTRAS:
        return f' Run: pip install "gramian[{_EXTRAS[package]}]".'
    return _advice(error.__cause__)


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line."""
    return " ".join(str(error).split()) or "no message."


def _import_parts(names: list[str]) -> None:
    from gramian._imports import import_parts

    try:
        import_parts(names)
    except ValueError as error:
        raise UserError(one_line(error)) from error


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
