"""The command line: a thin Typer app over whole-model jobs.

Exit status 0 on success, 1 for what a user can get wrong (one line on standard error) and for a
demo whose checks fail, 2 for wrong usage. `--debug` shows tracebacks. With `--json` standard output
holds one JSON object and nothing else; progress goes to standard error. torch, transformers and the
rest are imported by the command that needs them, so `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

try:
    import typer
    from rich.console import Console
except ImportError as missing:
    print(
        f'gramian: the command line needs {missing.name}: pip install "gramian[cli]".',
        file=sys.stderr,
    )
    raise SystemExit(1) from None

if TYPE_CHECKING:
    from gramian.models import GramianForCausalLM

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="The memory of causal sequence models: train, distil, generate in constant memory.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback if something goes wrong.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
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
        _fail(_one_line(error))
    except ImportError as error:
        if debug:
            raise
        advice = "" if "pip install" in str(error) else ' Run: pip install "gramian[cli]".'
        _fail(_one_line(error) + advice)
    except Exception as error:
        if debug:
            raise
        _fail(f"{type(error).__name__}: {_one_line(error)} (--debug shows where)")


def _fail(message: str) -> NoReturn:
    print(f"gramian: {message}", file=sys.stderr)
    raise SystemExit(1)


def _one_line(error: BaseException) -> str:
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


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for models, figures and numbers.")
    ] = Path("demo-output"),
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    tol: Annotated[
        float | None, typer.Option(help="Relative error allowed to every distilled filter.")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a language model on real English, distil it, generate from both, measure everything.

    Takes a few minutes on two cores. Exits with status 1 if one of its checks fails.
    """
    from dataclasses import replace

    if tol is not None:
        _check_tolerance(tol)
    _quiet_transformers()
    from gramian.demo import DemoSettings, run_demo

    settings = DemoSettings(seed=seed)
    if steps is not None:
        settings = replace(settings, training=replace(settings.training, steps=steps))
    if tol is not None:
        settings = replace(settings, tol=tol)
    report = run_demo(output, settings, Console(stderr=as_json))
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def distill(
    model: ModelFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the result.")],
    tol: Annotated[
        float | None,
        typer.Option(help="Relative l2 error allowed to every filter, 0.001 if not given."),
    ] = None,
    order: Annotated[
        int | None, typer.Option(help="State dimension of every filter, in place of --tol.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Replace the long filters of MODEL by small recurrences, saved as a model in OUT."""
    if tol is not None and order is not None:
        raise typer.BadParameter("give --tol or --order, not both.")
    tol = 1e-3 if tol is None else tol
    _check_tolerance(tol)
    if order is not None and order < 1:
        raise UserError(f"The order must be at least 1; got {order}.")
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already; name a folder that does not.")
    _quiet_transformers()
    console = Console(stderr=as_json)
    loaded = _load(model)
    tokenizer = _tokenizer(model)

    from rich.progress import Progress

    from gramian import distillation
    from gramian._staging import staged_directory

    with staged_directory(out) as stage:
        bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        with bar as progress:
            task = progress.add_task("Distilling", total=None)
            try:
                distilled, report = distillation.distill(
                    loaded,
                    tol=tol,
                    order=order,
                    progress=lambda done, total: progress.update(task, completed=done, total=total),
                )
            except ValueError as error:
                raise UserError(_one_line(error)) from error
        distilled.save_pretrained(stage)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        (stage / "distillation.json").write_text(report.to_json() + "\n")
    if as_json:
        print(report.to_json())
    else:
        console.print(report)
        console.print(f"Written to {out}", highlight=False)


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="What to train, on what, and how.")
    ],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as optimization.steps=100."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a model on a task; a run that was killed goes on where it was.

    On many devices: torchrun --nproc-per-node 8 -m gramian train CONFIG.yaml
    """
    import os

    _quiet_transformers()
    from gramian import training

    first = os.environ.get("RANK", "0") == "0"
    try:
        settings = training.load_config(config, changes or [])
        report = training.train(settings, progress=first and sys.stderr.isatty())
    except training.ConfigError as error:
        raise UserError(_one_line(error)) from error
    if not first:
        return
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
        return
    console = Console()
    console.print(
        f"{report.parameters:,} parameters, {report.steps:,} steps, {report.seconds:.0f} s",
        highlight=False,
    )
    measured = ", ".join(f"{name} {value:.4f}" for name, value in report.metrics.items())
    console.print(f"Held out, at the end: {measured}", highlight=False)
    console.print(f"Written to {report.output}", highlight=False)


@app.command()
def generate(
    model: ModelFolder,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="Sharper below 1, wilder above.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample from the k best tokens; 0: from all.")] = 50,
    top_p: Annotated[
        float, typer.Option(help="Sample from the best tokens that make up this probability.")
    ] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the best token always.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt with MODEL, one recurrent step a token."""
    _check_sampling(prompt, max_new_tokens, temperature, top_k, top_p)
    _quiet_transformers()
    loaded = _load(model)
    tokenizer = _tokenizer(model) or _byte_tokenizer(model, loaded)

    import time

    import torch

    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise UserError("The prompt has no tokens; give some text.")
    if int(ids.max()) >= loaded.config.vocab_size:
        raise UserError(
            f"The tokenizer in {model} knows more tokens than the model's "
            f"{loaded.config.vocab_size}: they do not belong together."
        )
    sampling: dict[str, Any] = (
        {} if greedy else {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    )
    torch.manual_seed(seed)
    started = time.perf_counter()
    sequence = loaded.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        **sampling,
    )[0]
    seconds = time.perf_counter() - started
    new = sequence[ids.shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    if not as_json:
        sys.stdout.write(f"{prompt}{text}\n")
        return
    result = {
        "prompt": prompt,
        "text": text,
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(new),
        "seconds": seconds,
        "state_bytes": loaded.state_bytes(1, len(sequence)),
    }
    print(json.dumps(result, indent=2))


def _check_tolerance(tol: float) -> None:
    if not 0 < tol < 1:
        raise UserError(f"The tolerance must lie between 0 and 1, both excluded; got {tol:g}.")


def _check_sampling(
    prompt: str, max_new_tokens: int, temperature: float, top_k: int, top_p: float
) -> None:
    if not prompt:
        raise UserError("The prompt is empty; give some text.")
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1; got {max_new_tokens}.")
    if not temperature > 0:
        raise UserError(
            f"--temperature must be above 0; got {temperature:g} (--greedy takes the best token)."
        )
    if top_k < 0:
        raise UserError(f"--top-k must be 0 (all tokens) or more; got {top_k}.")
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p must be above 0 and at most 1; got {top_p:g}.")


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _load(folder: Path) -> GramianForCausalLM:
    from gramian.models import load

    try:
        return load(folder)
    except (OSError, ValueError) as error:
        raise UserError(_one_line(error)) from error


def _byte_tokenizer(folder: Path, model: GramianForCausalLM) -> Any:
    """What a model without a tokenizer of its own reads, if it has a vocabulary of bytes."""
    from gramian.models import ByteTokenizer

    tokenizer = ByteTokenizer()
    if model.config.vocab_size != len(tokenizer):
        raise UserError(f"{folder} has no tokenizer, so its tokens cannot be read or written.")
    return tokenizer


def _tokenizer(folder: Path) -> Any:
    """The tokenizer saved with a model, or None."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"The tokenizer in {folder} cannot be read: {_one_line(error)}") from error


if __name__ == "__main__":
    main()
