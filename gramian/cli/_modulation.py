"""Define the command `modulation`, which measures ESS at delimiters over models and texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gramian.cli._app import UserError, command
from gramian.cli._console import Bar, console_for, finish, running
from gramian.cli._inputs import (
    SAVE_TOKENIZER,
    check_models,
    check_new,
    move_model,
    quiet_transformers,
    read_texts,
    read_training_texts,
    recall_options,
)
from gramian.cli._options import (
    Device,
    Include,
    Json,
    MaxChannels,
    Rare,
    Seed,
    TrainingText,
)

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from torch import Tensor

    from gramian.analysis import ModulationReport
    from gramian.evaluation import Measure
    from gramian.tasks import Document

_Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="Folder of a saved model, of Gramian or of transformers; or a GGUF file.",
    ),
]
_Text = Annotated[
    list[Path],
    typer.Option(help="Text, FASTA or JSON-lines file whose documents are read; repeatable."),
]
_Texts = Annotated[
    int, typer.Option(min=1, help="Largest number of texts. Bootstrap samples are drawn from them.")
]
_Delimiters = Annotated[
    list[str],
    typer.Option(
        metavar="auto|TEXT",
        help="Delimiters: auto finds special tokens, newlines and ends of sentences among the "
        "tokens; or the text that a delimiter's token contains; repeatable.",
    ),
]
_Horizon = Annotated[int, typer.Option(min=4, help="Largest number of tokens of a text.")]
_Reach = Annotated[
    int, typer.Option(min=1, help="Largest distance of the positions that are compared.")
]
_Resamples = Annotated[int, typer.Option(min=1, help="Number of bootstrap samples.")]
_Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="New folder for the results as JSON and the figure."),
]
_Picture = Annotated[str, typer.Option("--format", help="Image format: png or svg.")]

_METRICS = {
    "perplexity": "perplexity",
    "bigram-recall perplexity": "bigram_recall_perplexity",
    "perplexity of other tokens": "other_perplexity",
}


@dataclass(frozen=True)
class _Wanted:
    """What is read and how it is measured, the same for all models."""

    documents: list[Document]
    texts: int
    delimiters: list[str]
    horizon: int
    reach: int
    resamples: int
    seed: int
    max_channels: int | None
    include: str
    device: str
    training: list[Document]
    rare: int | None


@dataclass(frozen=True)
class _Measured:
    """The modulation of one model, and its perplexities on the same tokens."""

    modulation: ModulationReport
    measures: list[Measure]
    text: str
    rare: int | None

    def to_dict(self) -> dict[str, Any]:
        measures = {
            one.metric: {"value": one.value, "error": one.error, "tokens": one.tokens}
            for one in self.measures
        }
        return self.modulation.to_dict() | {
            "text": self.text,
            "perplexities": measures,
            "rare": self.rare,
        }


@command
def modulation(
    models: _Models,
    text: _Text,
    texts: _Texts = 8,
    delimiters: _Delimiters = ["auto"],  # noqa: B006 (Typer shows it, and nothing changes it)
    horizon: _Horizon = 256,
    reach: _Reach = 4,
    resamples: _Resamples = 2000,
    max_channels: MaxChannels = 64,
    include: Include = "core",
    output: _Output = None,
    picture: _Picture = "png",
    seed: Seed = 0,
    training_text: TrainingText = None,
    rare: Rare = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure whether the memory in use drops where a context ends, for one or more MODELs.

    The effective state-size after each delimiter is compared with that at positions nearby, over
    several texts and with bootstrap intervals over them. Perplexity and bigram-recall perplexity on
    the same tokens are shown beside it. A text is a document of the files, cut to --horizon tokens.
    If there is a single document, its consecutive pieces of --horizon tokens are the texts.
    """
    if picture not in ("png", "svg"):
        raise typer.BadParameter(f"--format must be png or svg; got {picture!r}.")
    if "auto" in delimiters and len(delimiters) > 1:
        raise typer.BadParameter("--delimiters auto stands alone; other texts name delimiters.")
    if output is not None:
        check_new(output)
    documents = [document for path in text for document in read_texts(path)]
    if not documents:
        raise UserError(f"{', '.join(map(str, text))}: there is no text.")
    wanted = _Wanted(
        documents,
        texts,
        delimiters,
        horizon,
        reach,
        resamples,
        seed,
        max_channels or None,
        include,
        device,
        read_training_texts(training_text, rare),
        rare,
    )
    console, found = console_for(as_json), []
    check_models(models)
    quiet_transformers()
    for name in models:
        with running(console, f"Reading with {name}", about=name) as bar:
            found.append(_measure(name, wanted, bar))
    values = {"models": [one.to_dict() for one in found]}
    if output is not None:
        _save(found, values, output, picture)
    finish(console, as_json, values, _tables(found), output)


def _measure(name: str, wanted: _Wanted, bar: Bar) -> _Measured:
    """Measure the modulation and the perplexities of one model."""
    import dataclasses

    from gramian import analysis, evaluation

    model, tokenizer = analysis.open_model(name, progress=bar)
    if tokenizer is None:
        raise UserError(f"{name} has no tokenizer, so it cannot read a text; {SAVE_TOKENIZER}.")
    move_model(model, wanted.device)
    names, rows, about = _rows(tokenizer, wanted)
    reports = analysis.analyze_texts(
        model,
        rows,
        tokenizer=tokenizer,
        names=names,
        max_channels=wanted.max_channels,
        include=wanted.include,
        progress=bar,
    )
    delimiters: Any = "auto" if wanted.delimiters == ["auto"] else wanted.delimiters
    found = analysis.measure_modulation(
        reports,
        delimiters,
        special=analysis.special_tokens(tokenizer),
        reach=wanted.reach,
        resamples=wanted.resamples,
        seed=wanted.seed,
    )
    bar.describe(f"{name}: perplexity")
    score = evaluation.perplexity(
        model,
        tokenizer,
        rows,
        window=wanted.horizon,
        stride=wanted.horizon,
        progress=bar,
        **recall_options(wanted.training, wanted.rare, tokenizer),
    )
    shown = dataclasses.replace(found, model=name.rstrip("/"))
    return _Measured(shown, score.measures("the texts"), about, score.rare)


def _rows(tokenizer: Any, wanted: _Wanted) -> tuple[list[str], list[Tensor], str]:
    """Return the names of the texts, their token ids (tokens,), and a sentence about them."""
    from torch import from_numpy

    from gramian.tasks import Encoder

    encode, size, least = Encoder(tokenizer), wanted.horizon, 2 * wanted.reach + 2
    documents = wanted.documents
    if len(documents) > 1:
        names = [one.name or f"document {number}" for number, one in enumerate(documents, 1)]
        rows = [from_numpy(encode(one)[:size]) for one in documents[: 4 * wanted.texts]]
        about = f"{{}} of {len(documents):,} documents, up to {size:,} tokens of each"
    else:
        ids = from_numpy(encode(documents[0]))
        rows = list(ids.split(size))
        names = [f"tokens {size * k:,} to {size * k + len(row):,}" for k, row in enumerate(rows)]
        about = f"{{}} pieces of up to {size:,} tokens of one document of {len(ids):,}"
    kept = [(name, row) for name, row in zip(names, rows, strict=False) if len(row) >= least]
    kept = kept[: wanted.texts]
    if not kept:
        raise UserError(f"no text has {least} tokens, which a reach of {wanted.reach} needs.")
    return [name for name, _ in kept], [row for _, row in kept], about.format(len(kept))


def _tables(found: list[_Measured]) -> Group:
    """Return a table of all delimiters, one of the models' perplexities, and a caption."""
    from rich.console import Group
    from rich.markup import escape

    ratios = _new_table("model", "delimiters", "number", "ratio", "95 % interval", "heads below 1")
    losses = _new_table("model", "average ESS", *_METRICS)
    for one in found:
        report, values = one.modulation, {measure.metric: measure for measure in one.measures}
        for number, part in enumerate((*report.kinds, report.control)):
            row = [
                report.model if number == 0 else "",
                part.kind,
                f"{part.count:,}",
                f"{part.ratio:.3f}" if part.count else "–",
                "–" if part.low != part.low else f"{part.low:.3f} to {part.high:.3f}",
                f"{part.heads_below} of {part.heads}" if part.heads else "–",
            ]
            ratios.add_row(*map(escape, row))
        ratios.add_section()
        shown = [_value(values.get(name)) for name in _METRICS.values()]
        losses.add_row(escape(report.model), f"{report.average_ess:.2f}", *shown)
    tables: list[Table | str] = [ratios, losses]
    return Group(*tables, escape(_caption(found)))


def _new_table(*headings: str) -> Table:
    """Return a table whose first column may be wrapped, and whose numbers may not."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(headings):
        words = max(map(len, heading.split()))
        table.add_column(
            heading,
            justify="right" if index and heading != "delimiters" else "left",
            overflow="fold",
            min_width=words if index else None,
        )
    return table


def _value(measure: Measure | None) -> str:
    """Return a value with its standard error."""
    if measure is None:
        return "–"
    error = "" if measure.error is None else f" ± {measure.error:.2g}"
    return f"{measure.value:.4g}{error}"


def _caption(found: list[_Measured]) -> str:
    lines = []
    for one in found:
        report = one.modulation
        kinds = []
        for part in report.kinds:
            listed = [f"{token!r} {count}" for token, count in list(part.tokens.items())[:6]]
            kinds.append(f"{part.kind}: {', '.join([*listed, *['…'][: len(part.tokens) > 6]])}")
        tokens = {measure.metric: measure.tokens for measure in one.measures}
        recalled = tokens.get("bigram_recall_perplexity", 0)
        rare = "" if one.rare is None else f" and at most {one.rare:,} times in training"
        lines.append(
            f"{report.model}: {one.text}; {'; '.join(kinds)}; perplexity of "
            f"{tokens['perplexity']:,} tokens, {recalled:,} of them in a pair seen before{rare}"
        )
    first = found[0].modulation
    lines.append(
        f"ratio: {first.measure} ESS after a delimiter over that at up to {first.reach} positions "
        "on each side; elsewhere: the same away from delimiters; intervals from "
        f"{first.resamples:,} bootstrap samples of texts; ± is the standard error over texts"
    )
    return "\n".join(lines)


def _save(found: list[_Measured], values: dict[str, Any], output: Path, suffix: str) -> None:
    """Write a folder with the results as JSON and the figure."""
    from gramian import reports as drawing
    from gramian._json import to_json
    from gramian._staging import staged_directory

    with staged_directory(output) as stage:
        (stage / "modulation.json").write_text(to_json(values, indent=2) + "\n", encoding="utf-8")
        figure = drawing.plot_modulation([one.modulation for one in found])
        drawing.save_figure(figure, stage / f"modulation.{suffix}")
