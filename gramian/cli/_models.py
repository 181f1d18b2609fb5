"""Commands on models: demo, distill, convert, generate, check, analyze."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from gramian._json import to_json
from gramian.cli._app import (
    Debug,
    Json,
    ModelFolder,
    Seed,
    Settings,
    TaskConfig,
    TaskSeed,
    UserError,
    app,
    byte_tokenizer,
    check_new,
    check_tolerance,
    find_tasks,
    fraction,
    load_model,
    load_tokenizer,
    one_line,
    quiet_transformers,
    read_texts,
    token_ids,
)

if TYPE_CHECKING:
    from gramian.analysis import StateReport
    from gramian.models import GramianForCausalLM
    from gramian.tasks import Document, Task


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
        check_tolerance(tol)
    quiet_transformers()
    from gramian.demo import DemoSettings, run_demo

    settings = DemoSettings(seed=seed)
    if steps is not None:
        settings = replace(settings, training=replace(settings.training, steps=steps))
    if tol is not None:
        settings = replace(settings, tol=tol)
    report = run_demo(output, settings, Console(stderr=as_json))
    if as_json:
        print(to_json(report.to_dict(), indent=2))
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
    max_increase: Annotated[
        str | None,
        typer.Option(help="Rise of the loss on --text to stay within, such as 0.1%: finds --tol."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text or FASTA file for --max-increase and --finetune.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of the text to measure on.")] = 65_536,
    finetune: Annotated[int, typer.Option(help="Steps of training on --text afterwards.")] = 0,
    max_order: Annotated[
        int | None, typer.Option(help="Largest order to try for a tolerance, 256 if not given.")
    ] = None,
    tail: Annotated[
        str,
        typer.Option(help="What filters do past their last tap: auto, free, or zero (they end)."),
    ] = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Replace the long filters of MODEL by small recurrences, saved as a model in OUT.

    distillation.json and distillation.png in OUT tell orders, errors and bounds of every layer.
    """
    given = [name for name in (tol, order, max_increase) if name is not None]
    if len(given) > 1:
        raise typer.BadParameter("give one of --tol, --order and --max-increase.")
    if (max_increase is not None or finetune) and text is None:
        raise typer.BadParameter("--max-increase and --finetune need --text FILE.")
    tol = 1e-3 if tol is None else tol
    check_tolerance(tol)
    for name, number in (("order", order), ("largest order", max_order)):
        if number is not None and number < 1:
            raise UserError(f"The {name} must be at least 1; got {number}.")
    if finetune < 0:
        raise UserError(f"--finetune takes a number of steps; got {finetune}.")
    budget = None if max_increase is None else fraction("--max-increase", max_increase)
    check_new(out)
    quiet_transformers()
    console = Console(stderr=as_json)
    loaded = load_model(model)
    tokenizer = load_tokenizer(model)
    windows = None if text is None else _windows(model, loaded, text, max_tokens)

    import dataclasses

    from rich.progress import Progress

    from gramian import distillation
    from gramian._staging import staged_directory

    with staged_directory(out) as stage:
        bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        with bar as progress:
            task = progress.add_task("Distilling", total=None)

            def advance(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            def tell(trial: distillation.Trial) -> None:
                progress.update(
                    task, description=f"Distilling; at {trial.tol:.1e}: {trial.increase:+.3%}"
                )

            try:
                if budget is not None:
                    assert windows is not None
                    distilled, report = distillation.distill_to_budget(
                        loaded, windows, budget, max_order=max_order, tail=tail, progress=tell
                    )
                else:
                    distilled, report = distillation.distill(
                        loaded, tol, order, max_order=max_order, tail=tail, progress=advance
                    )
                if windows is not None and budget is None:
                    report = dataclasses.replace(
                        report, quality=_quality(loaded, distilled, windows, report)
                    )
                if finetune:
                    assert windows is not None and report.quality is not None
                    progress.update(task, description="Fine-tuning")
                    losses = distillation.finetune(distilled, windows, finetune, progress=advance)
                    quality = dataclasses.replace(report.quality, finetuned=losses)
                    report = dataclasses.replace(report, quality=quality)
            except ValueError as error:
                raise UserError(one_line(error)) from error
        distilled.save_pretrained(stage)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        (stage / "distillation.json").write_text(report.to_json() + "\n")
        _draw_distillation(report, stage / "distillation.png")
    if as_json:
        print(report.to_json())
    else:
        console.print(report)
        console.print(f"Written to {out}", highlight=False)


def _quality(original: Any, distilled: Any, windows: Any, report: Any) -> Any:
    """The loss before and after on the text, without a budget."""
    from gramian.distillation import Quality, Trial, mean_loss

    before, after = (mean_loss(model, windows) for model in (original, distilled))
    trial = Trial(report.tol, report.mean_order, after, after / before - 1)
    return Quality(windows.numel(), None, before, (trial,))


def _draw_distillation(report: Any, path: Path) -> None:
    from gramian.reports import plot_distillation, save_figure

    try:
        save_figure(plot_distillation(report), path)
    except ImportError as error:  # a picture is not worth the result
        print(f"gramian: no figure: {one_line(error)}", file=sys.stderr)


def _windows(folder: Path, model: GramianForCausalLM, text: Path, max_tokens: int) -> Any:
    """(count, length) windows of a text file's tokens, as long as the filters, spread over it.

    No window spans two documents. They are shorter where most of the text is in shorter documents.
    """
    documents = token_ids(folder, model, text)
    longest = max(map(len, documents), default=0)
    length = min(model.config.max_position_embeddings, 2048, longest)
    if length < 2:
        raise UserError(f"{text} has too few tokens: {longest}.")
    total = sum(map(len, documents))
    while length > 2 and 2 * sum(len(one) // length * length for one in documents) < total:
        length = (length + 1) // 2
    windows = _cut(documents, length)
    count = min(len(windows), max(1, max_tokens // length))
    return windows[[i * len(windows) // count for i in range(count)]]


@app.command()
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="File or folder of a published model.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the result.")],
    config: Annotated[
        Path | None,
        typer.Option(help="JSON or YAML configuration, if it is not beside the checkpoint."),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="safari, hyenadna, hyena_rtf or striped_hyena, in place of recognising it."
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a published Hyena, HyenaDNA, Hyena-RTF, StripedHyena or Evo CHECKPOINT a model in OUT.

    Files are read as tensors only: nothing in a checkpoint is run.
    """
    check_new(out)
    quiet_transformers()
    console = Console(stderr=as_json)

    from rich.progress import Progress

    from gramian import checkpoints
    from gramian._staging import staged_directory

    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    with staged_directory(out) as stage, bar as progress:
        task = progress.add_task("Converting", total=None)
        try:
            model, tokenizer, name = checkpoints.load(
                checkpoint,
                config=config,
                format=format,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        except (OSError, ValueError) as error:
            raise UserError(one_line(error)) from error
        model.save_pretrained(stage)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        settings = model.config
        report = {
            "format": name,
            "layers": settings.num_hidden_layers,
            "width": settings.hidden_size,
            "vocabulary": settings.vocab_size,
            "filter_length": settings.max_position_embeddings,
            "parameters": model.num_parameters(),
            "tokenizer": None if tokenizer is None else type(tokenizer).__name__,
        }
        (stage / "conversion.json").write_text(to_json(report, indent=2) + "\n")
    if as_json:
        print(to_json(report, indent=2))
        return
    console.print(
        f"{name}: {report['layers']} layers of width {report['width']:,}, "
        f"{report['parameters']:,} parameters, filters of {report['filter_length']:,} taps; "
        f"{'no tokenizer' if tokenizer is None else report['tokenizer']}.\nWritten to {out}",
        highlight=False,
    )


@app.command()
def generate(
    model: ModelFolder,
    prompt: Annotated[str, typer.Option(help="Text or FASTA record to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="Sharper below 1, wilder above.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample from the k best tokens; 0: from all.")] = 50,
    top_p: Annotated[
        float, typer.Option(help="Sample from the best tokens that make up this probability.")
    ] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the best token always.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Write words as they come.")] = False,
    prefill_chunk: Annotated[
        int | None, typer.Option(min=1, help="Read the prompt in chunks of so many tokens.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the steps first: seconds, for long texts.")
    ] = False,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt with MODEL, one recurrent step a token."""
    if stream and as_json:
        raise typer.BadParameter("give --stream or --json, not both.")
    _check_sampling(prompt, max_new_tokens, temperature, top_k, top_p)
    quiet_transformers()
    loaded = load_model(model)
    tokenizer = load_tokenizer(model) or byte_tokenizer(model, loaded)

    import time

    import torch

    ids = torch.from_numpy(_prompt_ids(tokenizer, prompt))[None]
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
    if compiled:
        loaded.compile_decoding()
    if prefill_chunk is not None:
        sampling["prefill_chunk_size"] = prefill_chunk
    if stream:
        from transformers import TextStreamer

        sys.stdout.write(prompt)
        sampling["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(seed)
    started = time.perf_counter()
    try:
        sequence = loaded.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=not greedy,
            **sampling,
        )[0]
    except FloatingPointError as error:
        raise UserError(f"{model}: {one_line(error)}") from error
    seconds = time.perf_counter() - started
    if stream:
        return
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
    print(to_json(result, indent=2))


@app.command()
def check(
    model: ModelFolder,
    batch: Annotated[int, typer.Option(help="Sequences to run, at least 2.")] = 3,
    length: Annotated[int, typer.Option(help="Tokens of each, run one by one too.")] = 200,
    text: Annotated[
        Path | None, typer.Option(help="Text or FASTA file to run on; random tokens if not given.")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="Precision to check, may be repeated: float64, float32, float16, ..."),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Relative difference accepted of a layer.")
    ] = None,
    order: Annotated[
        int, typer.Option(help="Order of the filters of the distilled copy; 0: make none.")
    ] = 16,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run MODEL in every way that it can be run, and compare: two tables.

    Parallel, recurrent, chunked, batched, reloaded and distilled; padded on the left, on the right,
    in between and in a second turn, packed, and generated with a cache; for every layer and the
    whole model, in float32 and bfloat16. Exits with status 1 if a difference is too large.
    """
    if order < 0:
        raise UserError(f"--order must be at least 1, or 0 for no distilled copy; got {order}.")
    quiet_transformers()
    console = Console(stderr=as_json)
    dtypes = [_dtype(name) for name in dtype] if dtype else None
    loaded = load_model(model)
    ids = None if text is None else _tokens(model, loaded, text, batch, length)

    from rich.progress import Progress

    from gramian import checking

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Checking", total=None)
        try:
            report = checking.check(
                loaded,
                ids,
                batch=batch,
                length=length,
                dtypes=dtypes,
                tolerance=tolerance,
                distill_order=order or None,
                seed=seed,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        except ValueError as error:
            raise UserError(one_line(error)) from error
    if as_json:
        print(report.to_json())
    else:
        console.print(report)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def analyze(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Folder of a saved model, ours or not; GGUF file."),
    ],
    text: Annotated[
        Path | None, typer.Option(help="Text or FASTA file, of which the first document is read.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to read, in place of --text.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Task of ours to read a row of, in place of --text.")
    ] = None,
    settings: Settings = None,
    config: TaskConfig = None,
    split: Annotated[
        str | None, typer.Option(help="Of the task; the test split if there is one.")
    ] = None,
    row: Annotated[int, typer.Option(min=0, help="Of the task's split, counted from 0.")] = 0,
    horizon: Annotated[int, typer.Option(min=1, help="Tokens to read at most.")] = 256,
    every: Annotated[int, typer.Option(min=1, help="Measure at every n-th position.")] = 1,
    measure: Annotated[str, typer.Option(help="entropy or tolerance.")] = "entropy",
    tol: Annotated[float | None, typer.Option(help="Absolute tolerance of a count.")] = None,
    rtol: Annotated[float | None, typer.Option(help="Relative tolerance of a count.")] = None,
    max_channels: Annotated[
        int, typer.Option(min=0, help="Channels to measure of a layer at most; 0: all.")
    ] = 64,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder for numbers and pictures.")
    ] = None,
    picture: Annotated[str, typer.Option("--format", help="Of pictures: png or svg.")] = "png",
    html: Annotated[
        Path | None, typer.Option(help="File for one interactive page, which opens offline.")
    ] = None,
    seed: TaskSeed = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how much of its memory MODEL uses on a text or a task: every layer, head and token.

    Several models are compared on the same input. Exits with status 1 if no layer can be read.
    """
    if sum(source is not None for source in (text, prompt, task, config)) != 1:
        raise typer.BadParameter(
            "give one of --text FILE, --prompt TEXT, --task NAME and --config FILE."
        )
    if settings and task is None and config is None:
        raise typer.BadParameter("--set needs --task NAME or --config FILE.")
    if picture not in ("png", "svg"):
        raise typer.BadParameter(f"--format must be png or svg, got {picture!r}.")
    if output is not None:
        check_new(output)
    quiet_transformers()
    document, source = _document(text, prompt)
    chosen, of_seed = None, 0
    if document is None:
        chosen, of_seed = _one_task(task, settings or [], config, seed)
    console = Console(stderr=as_json)

    import dataclasses

    from rich.progress import Progress, TaskID

    from gramian import analysis
    from gramian.tasks import Encoder

    reports = []
    for name in models:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task(f"Reading with {name}", total=None)

            def show(
                done: int, total: int, bar: TaskID = bar, progress: Progress = progress
            ) -> None:
                progress.update(bar, completed=done, total=total)

            try:
                model, tokenizer = analysis.open_model(name)
                if document is not None:
                    if tokenizer is None:
                        raise UserError(
                            f"{name} has no tokenizer, so it cannot read a text; --task and "
                            "--config read a row of a task."
                        )
                    sequence = Encoder(tokenizer)(document).tolist()
                else:
                    assert chosen is not None
                    sequence, names, source = _row(*chosen, tokenizer, split, of_seed, row)
                    tokenizer = names
                report = analysis.analyze(
                    model,
                    sequence[:horizon],
                    tokenizer=tokenizer,
                    every=every,
                    measure=measure,
                    tol=tol,
                    rtol=rtol,
                    max_channels=max_channels or None,
                    progress=show,
                )
            except (OSError, ValueError) as error:
                raise UserError(f"{name}: {one_line(error)}") from error
        report = dataclasses.replace(report, model=name.rstrip("/"), source=source)
        if not report.layers:
            raise UserError(
                f"No layer of {name} could be read: "
                + "; ".join(f"{path}: {reason}" for path, reason in report.unread)
            )
        if not as_json:
            console.print(report)
        reports.append(report)
    if output is not None:
        _save_states(reports, output, picture)
    if html is not None:
        from gramian.reports import save_state_page

        save_state_page(reports, html)
    for written in (output, html):
        if written is not None and not as_json:
            console.print(f"Written to {written}", highlight=False)
    if as_json:
        found = [report.to_dict() for report in reports]
        print(to_json(found[0] if len(found) == 1 else {"models": found}))


@app.command()
def export(
    model: ModelFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the programs.")],
    format: Annotated[str, typer.Option(help="onnx or torch.")] = "onnx",
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens that attention has room for; the model's length if not given."
        ),
    ] = None,
    verify: Annotated[int, typer.Option(min=1, help="Greedy tokens to compare.")] = 100,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of onnxruntime while comparing.")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the recurrence of MODEL as ONNX files or torch.export programs in OUT, and compare.

    step and prefill take token ids and the state and return logits and the new state; export.json
    describes them. Long convolutions must be distilled first. Weights of half precision become
    float32. Exits with status 1 if the programs write other tokens than the model.
    """
    check_new(out)
    quiet_transformers()
    console = Console(stderr=as_json)
    loaded = load_model(model)
    if loaded.dtype.itemsize < 4:
        loaded = loaded.float()

    from gramian.export import export_model

    try:
        with console.status("Exporting"):
            report = export_model(
                loaded,
                out,
                format,
                context=context,
                tokenizer=load_tokenizer(model),
                verify=verify,
                threads=threads,
                seed=seed,
            )
    except (RuntimeError, ValueError) as error:
        raise UserError(one_line(error)) from error
    if as_json:
        print(report.to_json())
    else:
        console.print(report)
        console.print(f"Written to {out}", highlight=False)


def _document(text: Path | None, prompt: str | None) -> tuple[Document | None, str]:
    """The first document of a file or prompt, and what to call it; None if there is neither."""
    from gramian.tasks import documents_in

    if text is not None:
        documents, source = read_texts(text), str(text)
    elif prompt is not None:
        source = "the prompt"
        try:
            documents = documents_in(prompt, source)
        except ValueError as error:
            raise UserError(one_line(error)) from error
    else:
        return None, ""
    if not documents:
        raise UserError(f"{source} has no tokens: it is empty.")
    if len(documents) > 1:
        name = f", {documents[0].name}" if documents[0].genome else ""
        source += f", document 1 of {len(documents)}{name}"
    return documents[0], source


def _one_task(
    name: str | None, settings: list[str], config: Path | None, seed: int | None
) -> tuple[tuple[str, Task], int]:
    """A task that was named, or the configuration's, and the seed."""
    from gramian import tasks
    from gramian._nearest import unknown

    if name is not None and name not in tasks.names():
        raise UserError(unknown("task", name, tasks.names()))
    found, seed = find_tasks([] if name is None else [name], settings, config, seed)
    [one] = found.items()
    return one, seed


def _row(
    name: str, task: Task, tokenizer: Any, split: str | None, seed: int, row: int
) -> tuple[Any, Any, str]:
    """A row's input, token ids (L) or numbers (L, size), what names its tokens, and its place."""
    import itertools

    import torch

    from gramian.tasks import choose_split

    if tokenizer is not None:
        task = task.tokens_of(tokenizer)
    split = choose_split(task, name, split)
    found = next(itertools.islice(task.rows(split, seed), row, None), None)
    if found is None:
        raise UserError(f"the {split} split of {name} has no row {row}.")
    place = f"{name}, {split} split, row {row}, seed {seed}"
    if "input_ids" in found:
        return torch.as_tensor(found["input_ids"]).long(), task.own_tokenizer(), place
    return torch.as_tensor(found["input_values"]).float(), None, place


def _save_states(reports: list[StateReport], output: Path, suffix: str) -> None:
    """A folder of numbers, pictures and a page."""
    from gramian import reports as drawing
    from gramian._staging import staged_directory

    with staged_directory(output) as stage:
        drawing.save_state_page(reports, stage / "page.html")
        for index, report in enumerate(reports):
            number = f"-{index + 1}" if len(reports) > 1 else ""
            report.save(stage / f"report{number}.json")
            for name, plot in (
                ("map", drawing.plot_state_map),
                ("curves", drawing.plot_state_curves),
                ("utilization", drawing.plot_utilization),
            ):
                drawing.save_figure(plot(report), stage / f"{name}{number}.{suffix}")
        if len(reports) > 1:
            named = {f"{i + 1}: {report.model}": report for i, report in enumerate(reports)}
            figure = drawing.plot_state_comparison(named)
            drawing.save_figure(figure, stage / f"comparison.{suffix}")


def _dtype(name: str) -> Any:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"--dtype must name a floating-point type such as float32; got {name!r}.")
    return found


def _tokens(folder: Path, model: GramianForCausalLM, text: Path, batch: int, length: int) -> Any:
    """(batch, length) tokens from the beginning of a text file, no sequence of two documents."""
    documents = token_ids(folder, model, text)
    windows = _cut(documents, length)
    if len(windows) < batch:
        raise UserError(
            f"{text} has {sum(map(len, documents))} tokens in {len(documents)} documents; {batch} "
            f"sequences of {length} need {batch * length}."
        )
    return windows[:batch]


def _cut(documents: list[Any], length: int) -> Any:
    """(count, length) windows that stand side by side in documents of tokens."""
    import torch

    whole = [ids[: len(ids) // length * length].reshape(-1, length) for ids in documents]
    return torch.cat([torch.empty(0, length, dtype=torch.long), *whole])


def _prompt_ids(tokenizer: Any, prompt: str) -> Any:
    """Tokens of a prompt, which may be a FASTA record: one sequence."""
    import numpy as np

    from gramian.tasks import Encoder, documents_in

    try:
        documents = documents_in(prompt, "the prompt")
        if len(documents) > 1:
            raise UserError(f"The prompt is {len(documents)} FASTA records; give one of them.")
        ids = [Encoder(tokenizer)(document) for document in documents]
    except ValueError as error:
        raise UserError(one_line(error)) from error
    return ids[0] if ids else np.empty(0, dtype=np.int64)


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
