"""Analyze several texts: the part of the command `analyze` that reads more than one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gramian.cli._app import UserError
from gramian.cli._console import Bar, console_for, finish, running
from gramian.cli._inputs import (
    SAVE_TOKENIZER,
    check_models,
    move_model,
    quiet_transformers,
    read_texts,
)

if TYPE_CHECKING:
    from gramian.analysis import StateReports
    from gramian.tasks import Document

__all__ = ["SeveralTexts", "analyze_several"]


@dataclass(frozen=True)
class SeveralTexts:
    """What is read, how it is measured, and what is written.

    Attributes:
        files: files of documents.
        count: largest number of documents of each file.
        horizon: largest number of tokens of each text.
        options: further arguments of `gramian.analysis.analyze_texts`.
        device: device to compute on.
        output: new folder for JSON, figures and a page, or None.
        picture: format of the figures.
        html: file for an interactive page, or None.
        table: file for a table of all numbers, or None.
    """

    files: list[Path]
    count: int
    horizon: int
    options: dict[str, Any]
    device: str
    output: Path | None
    picture: str
    html: Path | None
    table: Path | None


def analyze_several(models: list[str], wanted: SeveralTexts, as_json: bool) -> None:
    """Measure each model on several texts, and print and write means and spreads over them."""
    names, documents = _documents(wanted.files, wanted.count)
    console = console_for(as_json)
    found: list[StateReports] = []
    check_models(models)
    quiet_transformers()
    for one in models:
        with running(console, f"Reading with {one}", about=one) as bar:
            found.append(_measure(one, names, documents, wanted, bar))
        if not as_json:
            console.print(found[-1])
    _write(found, wanted)
    values = [one.to_dict() for one in found]
    shown = values[0] if len(values) == 1 else {"models": values}
    finish(console, as_json, shown, None, wanted.output, wanted.html, wanted.table, indent=None)


def _documents(files: list[Path], count: int) -> tuple[list[str], list[Document]]:
    """Return the first documents of every file, and their names."""
    names, documents = [], []
    for file in files:
        every = read_texts(file)
        if not every:
            raise UserError(f"{file} has no tokens: it is empty.")
        for number, document in enumerate(every[:count], 1):
            part = document.name if document.genome else f"document {number}"
            names.append(str(file) if len(every) == 1 else f"{file}, {part}")
            documents.append(document)
    if len(documents) == 1:
        raise UserError(
            f"{files[0]} has one document, and --texts asks for several; a JSON-lines or FASTA "
            "file and repeated --text have more."
        )
    return names, documents


def _measure(
    name: str, names: list[str], documents: list[Document], wanted: SeveralTexts, bar: Bar
) -> StateReports:
    """Measure one model on all texts."""
    from gramian import analysis

    model, tokenizer = analysis.open_model(name, progress=bar)
    if tokenizer is None:
        raise UserError(f"{name} has no tokenizer, so it cannot read a text; {SAVE_TOKENIZER}.")
    move_model(model, wanted.device)
    found = analysis.analyze_texts(
        model,
        documents,
        tokenizer=tokenizer,
        names=names,
        horizon=wanted.horizon,
        progress=bar,
        **wanted.options,
    )
    if not found.layers:
        raise UserError(
            f"No layer of {name} could be read in all texts: "
            + "; ".join(f"{path}: {reason}" for path, reason in found.unread)
        )
    label = name.rstrip("/")
    return analysis.StateReports(
        tuple(dataclasses.replace(report, model=label) for report in found)
    )


def _write(found: list[StateReports], wanted: SeveralTexts) -> None:
    """Write what was asked for."""
    from gramian import reports as drawing
    from gramian._frames import save_frame
    from gramian._staging import staged_directory
    from gramian.analysis import state_frame

    every = [report for one in found for report in one]
    if wanted.output is not None:
        with staged_directory(wanted.output) as stage:
            drawing.save_state_page(every, stage / "page.html")
            for index, one in enumerate(found):
                number = f"-{index + 1}" if len(found) > 1 else ""
                one.save(stage / f"reports{number}.json")
                figure = drawing.plot_state_spread(one)
                drawing.save_figure(figure, stage / f"spread{number}.{wanted.picture}")
    if wanted.html is not None:
        drawing.save_state_page(every, wanted.html)
    if wanted.table is not None:
        texts = [name for one in found for name in one.names]
        save_frame(state_frame(every, texts), wanted.table)
