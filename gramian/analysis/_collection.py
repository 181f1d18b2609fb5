"""Measure state-sizes on several texts, with means and spreads over the texts.

Every text is analyzed alone, so that padding and the other texts of a batch have no influence. With
n texts, the *deviation* of a number is its sample standard deviation over the texts (divided by n -
1), and its *error*, the standard error of the mean, is the deviation divided by √n. With a single
text both are NaN. They describe the spread between texts, not the rounding of a measurement.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gramian._frames import write_frame
from gramian._json import to_json
from gramian._staging import staged_file
from gramian.analysis._analyze import analyze
from gramian.analysis._frames import layer_frame, state_frame
from gramian.analysis._inputs import SEQUENCES, check_model, positions_in, read_inputs
from gramian.analysis._report import LayerState, StateReport
from gramian.tasks import Document, documents_in

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.table import Table

__all__ = ["LayerSummary", "Spread", "StateReports", "analyze_texts"]

_FORMAT = "gramian.state_reports/1"
_COLUMNS = ("layer", "mixer", "heads or channels", "ESS mean", "deviation", "in use", "deviation")


class Spread(NamedTuple):
    """The mean of numbers over texts, their standard deviation, and the mean's standard error.

    The fields are numbers or tensors of one shape. Deviation and error are NaN for one text.
    """

    mean: Any
    deviation: Any
    error: Any


@dataclass(frozen=True, eq=False)
class LayerSummary:
    """The state-sizes of one layer over several texts.

    Attributes:
        name: path of the module in the model.
        mixer: name of the module's class.
        kind: "attention", "recurrence" or "convolution".
        channels: indices of the measured heads or channels.
        count: number of all heads or channels.
        average: the spread of the layer's average ESS, the mean over heads or channels and over
            each text's own positions.
        in_use: the spread of the share in use (`LayerState.in_use`) over the texts that have one;
            None if none has.
        ess: the spread of ESS for each head or channel at the P positions that all texts share, as
            tensors (len(channels), P) in float64; None if the texts share no position.
    """

    name: str
    mixer: str
    kind: str
    channels: tuple[int, ...]
    count: int
    average: Spread
    in_use: Spread | None
    ess: Spread | None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON can hold."""
        return {
            "name": self.name,
            "mixer": self.mixer,
            "kind": self.kind,
            "channels": list(self.channels),
            "count": self.count,
            "average": self.average._asdict(),
            "in_use": None if self.in_use is None else self.in_use._asdict(),
            "ess": None
            if self.ess is None
            else {key: _numbers(value) for key, value in self.ess._asdict().items()},
        }


@dataclass(frozen=True, eq=False)
class StateReports:
    """The reports of one model on several texts. It prints as a table with a row for each layer.

    Attributes:
        reports: the report of each text, in the order of the texts. Its `source` is the name of the
            text.
    """

    reports: tuple[StateReport, ...]

    def __post_init__(self) -> None:
        if not self.reports:
            raise ValueError("there must be at least one report; got none.")

    def __len__(self) -> int:
        return len(self.reports)

    def __iter__(self) -> Iterator[StateReport]:
        return iter(self.reports)

    @property
    def model(self) -> str:
        """The name of the model."""
        return self.reports[0].model

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the texts."""
        return tuple(report.source for report in self.reports)

    @property
    def positions(self) -> tuple[int, ...]:
        """The positions that were measured in every text.

        The ESS at a position depends on the tokens after it, too. So texts of different lengths are
        compared best with a `horizon` that all of them reach.
        """
        first, *others = (report.positions for report in self.reports)
        return tuple(i for i in first if all(i in other for other in others))

    @property
    def unread(self) -> tuple[tuple[str, str], ...]:
        """The path of every layer that was not read in all texts, and the reason."""
        reasons = {name: reason for report in self.reports for name, reason in report.unread}
        counts: dict[str, int] = {}
        for report in self.reports:
            for layer in report.layers:
                counts[layer.name] = counts.get(layer.name, 0) + 1
        for name, count in counts.items():
            if count < len(self.reports):
                known = f" ({reasons[name]})" if name in reasons else ""
                reasons[name] = f"it was read in {count} of {len(self.reports)} texts{known}."
        return tuple(reasons.items())

    @cached_property
    def layers(self) -> tuple[LayerSummary, ...]:
        """The layers that were read in every text, with means and spreads over the texts."""
        shared = self.positions
        found = []
        for layer in self.reports[0].layers:
            parts = [_layer(report, layer) for report in self.reports]
            if all(part is not None for part in parts):
                found.append(_summary([part for part in parts if part], self.reports, shared))
        return tuple(found)

    def of_layer(self, name: str) -> tuple[LayerState, ...]:
        """Return the state-sizes of the layer with this path, in each text that has them."""
        every = (layer for report in self.reports for layer in report.layers)
        return tuple(layer for layer in every if layer.name == name)

    def average(self) -> Spread:
        """Return the spread of the average ESS of the model over the texts."""
        return _spread([float(report.average()) for report in self.reports if report.layers])

    def to_dict(self) -> dict[str, Any]:
        """Return the summary and all reports as values that JSON can hold."""
        return {
            "format": _FORMAT,
            "model": self.model,
            "texts": list(self.names),
            "average": self.average()._asdict(),
            "positions": list(self.positions),
            "layers": [layer.to_dict() for layer in self.layers],
            "unread": [{"name": name, "reason": reason} for name, reason in self.unread],
            "reports": [report.to_dict() for report in self.reports],
        }

    def to_json(self, indent: int | None = None) -> str:
        """Return `to_dict` as JSON text. NaN becomes null."""
        return to_json(self.to_dict(), indent=indent)

    def save(self, path: str | Path) -> Path:
        """Write the reports as one JSON file, completely or not at all, and return the path."""
        path = Path(path)
        with staged_file(path) as stage:
            stage.write_text(self.to_json() + "\n", encoding="utf-8")
        return path

    def to_frame(self, by: str = "position") -> DataFrame:
        """Return the reports as one frame of pandas, with a column `text` of the texts' names.

        Args:
            by: "position" or "layer", as in `StateReport.to_frame`.

        Raises:
            ImportError: if pandas is not installed.
            ValueError: if `by` is neither of these.
        """
        if by not in ("position", "layer"):
            raise ValueError(f'by must be "position" or "layer"; got {by!r}.')
        return (state_frame if by == "position" else layer_frame)(self.reports, self.names)

    def to_csv(self, path: str | Path) -> Path:
        """Write `to_frame()` as CSV, completely or not at all, and return the path.

        Raises:
            ImportError: if pandas is not installed.
            ValueError: if the path does not end in .csv.
        """
        return write_frame(self.to_frame, path, ".csv")

    def to_parquet(self, path: str | Path) -> Path:
        """Write `to_frame()` as Parquet, completely or not at all, and return the path.

        Raises:
            ImportError: if pandas or pyarrow is not installed.
            ValueError: if the path does not end in .parquet.
        """
        return write_frame(self.to_frame, path, ".parquet")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StateReports:
        """Return the reports from which `to_dict` made `values`.

        Raises:
            ValueError: if `values` do not have the format of reports.
        """
        found = values.get("format") if isinstance(values, dict) else None
        if found != _FORMAT:
            raise ValueError(f"state reports of format {_FORMAT!r} are needed; got {found!r}.")
        return cls(tuple(StateReport.from_dict(one) for one in values["reports"]))

    @classmethod
    def load(cls, path: str | Path) -> StateReports:
        """Return the reports that `save` wrote.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if the file does not hold reports.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} does not hold state reports: {error}") from error

    def __str__(self) -> str:
        lines = ["\t".join(_COLUMNS), *("\t".join(_row(layer)) for layer in self.layers)]
        return "\n".join([*lines, self._caption()])

    def __rich__(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(
            title=self.model,
            caption=self._caption(),
            caption_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        for index, name in enumerate(_COLUMNS):
            table.add_column(name, justify="left" if index < 2 else "right", overflow="fold")
        for layer in self.layers:
            table.add_row(*_row(layer))
        return table

    def _caption(self) -> str:
        first = self.reports[0]
        lengths = sorted({report.horizon for report in self.reports})
        tokens = f"{lengths[0]:,}" if len(lengths) == 1 else f"{lengths[0]:,} to {lengths[-1]:,}"
        seconds = sum(report.seconds for report in self.reports)
        count = f"{len(self)} text" if len(self) == 1 else f"{len(self):,} texts"
        text = f"{first.measure} ESS of {count} of {tokens} tokens, {seconds:.1f} s"
        if self.layers:
            text += f": average {_shown(self.average(), '.2f')}"
        lines = [text, "± is the standard error over texts, the deviation that between texts"]
        lines += [f"not read: {name}: {reason}" for name, reason in self.unread]
        return "\n".join(lines)


def analyze_texts(
    model: nn.Module,
    texts: Any,
    *,
    tokenizer: Any = None,
    names: Sequence[str] | None = None,
    horizon: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> StateReports:
    """Measure the effective state-size of every layer, head and position on several texts.

    Every text is analyzed alone, as by `analyze`. All texts are encoded and checked before the
    first is analyzed.

    Args:
        model: As in `analyze`.
        texts: A sequence of texts, of `gramian.tasks.Document`, of rows of token ids or of other
            inputs of `analyze`, which may have different lengths. Or a batch: token ids (batch, L),
            continuous inputs (batch, L, size), or a mapping with `input_ids` (batch, L), as
            tokenizers return it. Where its `attention_mask` is 0, a row has no token. Or one text;
            each FASTA record of it is a text.
        tokenizer: Tokenizer of the texts. It also provides the texts of tokens in the reports.
        names: A name for each text. By default, the names of documents, or "text 1" and so on.
        horizon: Largest number of tokens of each text to read; all by default.
        progress: A function that is called after each layer with the number of layers measured so
            far, and an estimate of how many there are in all texts.
        **options: Further arguments of `analyze`, such as `at`, `every`, `measure` and
            `max_channels`.

    Returns:
        The reports, which print as a table.

    Raises:
        TypeError: as `analyze`.
        ValueError: as `analyze`; if there is no text, or another number of names than of texts.
    """
    check_model(model)
    given = list(_rows(texts))
    if not given:
        raise ValueError("there is nothing to analyze: there are no texts.")
    if names is not None and len(names) != len(given):
        raise ValueError(f"{len(given)} texts need as many names; got {len(names)}.")
    if horizon is not None and horizon < 1:
        raise ValueError(f"horizon must be at least 1 or None; got {horizon}.")
    sequences: list[Any] = []
    for number, one in enumerate(given, 1):
        try:
            sequences.append(read_inputs(one, tokenizer).first(horizon))
            length = sequences[-1].length
            at, every, count = (options.get(name) for name in ("at", "every", "positions"))
            positions_in(at, every, count, length)
        except ValueError as error:
            raise ValueError(f"text {number}: {error}") from error
    reports = []
    for index, (one, sequence) in enumerate(zip(given, sequences, strict=True)):
        own = one.name if isinstance(one, Document) else ""
        name = own if names is None else names[index]

        def shown(done: int, known: int, before: int = index) -> None:
            if progress is not None:
                progress(before * known + done, len(given) * known)

        report = analyze(model, sequence, tokenizer=tokenizer, progress=shown, **options)
        reports.append(dataclasses.replace(report, source=name or f"text {index + 1}"))
    return StateReports(tuple(reports))


def _rows(texts: Any) -> Iterator[Any]:
    """Yield the inputs of each text, without padding."""
    if isinstance(texts, str):
        yield from documents_in(texts)
    elif isinstance(texts, Document):
        yield texts
    elif isinstance(texts, Mapping):
        yield from _unpadded(texts)
    elif isinstance(texts, Tensor):
        dimensions = 2 if texts.is_floating_point() else 1
        yield from texts if texts.ndim > dimensions else [texts]
    elif all(isinstance(one, int) for one in texts):
        yield from [texts] if len(texts) else []
    else:
        for one in texts:
            yield from _unpadded(one) if isinstance(one, Mapping) else [one]


def _unpadded(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a mapping for each row of a batch, with the entries where the mask is 1."""
    given = {key: value for key, value in batch.items() if value is not None}
    key = next((key for key in SEQUENCES if key in given), None)
    sequence = None if key is None else torch.as_tensor(given[key])
    if key is None or sequence is None or sequence.ndim < 2 or not sequence.shape[0]:
        yield given  # a single row, or what `analyze` refuses
        return
    rows, length = sequence.shape[:2]
    mask = torch.as_tensor(given.pop("attention_mask", torch.ones(rows, length)))
    if mask.shape != (rows, length) or bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(
            f"attention_mask must be 0 or 1 for each token, ({rows}, {length}), because a model's "
            f"own masks are measured; got shape {tuple(mask.shape)}."
        )
    values = {name: torch.as_tensor(value) for name, value in given.items()}
    for name, value in values.items():
        if value.shape[:2] != (rows, length):
            raise ValueError(
                f"{name} must have an entry for each token of each row, ({rows}, {length}, …); got "
                f"shape {tuple(value.shape)}."
            )
    for row in range(rows):
        real = mask[row].bool().to(sequence.device)
        one = {name: value[row][real.to(value.device)] for name, value in values.items()}
        if "attention_mask" in batch:
            one["attention_mask"] = torch.ones(int(real.sum()), dtype=torch.int64)
        yield one


def _layer(report: StateReport, like: LayerState) -> LayerState | None:
    """Return the layer of the same name and channels, or None."""
    same = (
        layer
        for layer in report.layers
        if layer.name == like.name and layer.channels == like.channels
    )
    return next(same, None)


def _summary(
    parts: list[LayerState], reports: Sequence[StateReport], positions: tuple[int, ...]
) -> LayerSummary:
    first = parts[0]
    shares = [share for part in parts if (share := part.in_use) is not None]
    sizes = None
    if positions:
        columns = [[report.positions.index(i) for i in positions] for report in reports]
        at = [part.ess[:, c].double() for part, c in zip(parts, columns, strict=True)]
        sizes = _tensors(torch.stack(at))  # (texts, channels, P)
    return LayerSummary(
        name=first.name,
        mixer=first.mixer,
        kind=first.kind,
        channels=first.channels,
        count=first.count,
        average=_spread([float(part.ess.double().mean()) for part in parts]),
        in_use=_spread(shares) if shares else None,
        ess=sizes,
    )


def _spread(values: Sequence[float]) -> Spread:
    """Return the spread of numbers, NaN without numbers."""
    if not values:
        return Spread(math.nan, math.nan, math.nan)
    return Spread(*map(float, _tensors(torch.tensor(values, dtype=torch.float64))))


def _tensors(values: Tensor) -> Spread:
    """Return the spread of values (texts, …) as tensors (…)."""
    count, mean = len(values), values.mean(0)
    if count < 2:
        unknown = torch.full_like(mean, math.nan)
        return Spread(mean, unknown, unknown)
    deviation = values.std(0, correction=1)
    return Spread(mean, deviation, deviation / math.sqrt(count))


def _numbers(values: Tensor) -> list[list[float]]:
    return [[float(f"{value:.9g}") for value in row] for row in values.tolist()]


def _row(layer: LayerSummary) -> tuple[str, ...]:
    counted = len(layer.channels)
    measured = f"{counted:,}" if counted == layer.count else f"{counted:,} of {layer.count:,}"
    share = layer.in_use
    percent = None if share is None else Spread(*(100 * value for value in share))
    return (
        layer.name,
        layer.mixer,
        measured,
        _shown(layer.average, ".2f"),
        _known(layer.average.deviation, ".2f"),
        "" if percent is None else f"{_shown(percent, '.1f')} %",
        "" if percent is None else f"{_known(percent.deviation, '.1f')} %",
    )


def _shown(spread: Spread, form: str) -> str:
    error = "" if math.isnan(spread.error) else f" ± {spread.error:{form}}"
    return f"{spread.mean:{form}}{error}"


def _known(value: float, form: str) -> str:
    return "–" if math.isnan(value) else f"{value:{form}}"
