"""Define the report that `analyze` returns: the state-sizes of every layer, head and position."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gramian._json import to_json
from gramian._staging import staged_file
from gramian.analysis._modulation import compared, ratios
from gramian.ess import aggregate, utilization

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LayerState", "StateReport"]

_FORMAT = "gramian.state_report/2"
_COLUMNS = ("layer", "mixer", "heads or channels", "ESS mean", "ESS max", "TSS mean", "in use")


@dataclass(frozen=True, eq=False)
class LayerState:
    """The state-sizes of one layer.

    Attributes:
        name: path of the module in the model.
        mixer: name of the module's class.
        kind: "attention", "recurrence" or "convolution".
        channels: indices of the measured heads or channels.
        count: number of all heads or channels.
        ess: effective state-size (ESS) at each of the P positions, (len(channels), P).
        tss: theoretically realizable state-size (TSS) at each of the P positions, which is the size
            of the state there, (len(channels), P).
        reader: how the operator was read: "mixer" (from a mixer of Gramian), "attention" (a map of
            attention weights), "scan" (from the arguments of a scan) or "general" (from the
            responses of the layer itself).
        error: error of each estimate in `ess`, of the same shape; None if they are exact.
    """

    name: str
    mixer: str
    kind: str
    channels: tuple[int, ...]
    count: int
    ess: Tensor
    tss: Tensor
    reader: str = "mixer"
    error: Tensor | None = None

    @property
    def utilization(self) -> Tensor:
        """The share ESS / TSS, (len(channels), P). It is 0 where TSS is 0.

        The table of a report shows `in_use`, a mean without the entries where TSS is 0.
        """
        return utilization(self.ess, self.tss)

    @property
    def in_use(self) -> float | None:
        """The mean of ESS / TSS, or None if TSS is 0 everywhere.

        The mean is over all channels and positions where TSS is above 0.
        """
        share = self.utilization[self.tss > 0]
        return float(share.mean()) if share.numel() else None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON can hold."""
        return {
            "name": self.name,
            "mixer": self.mixer,
            "kind": self.kind,
            "channels": list(self.channels),
            "count": self.count,
            "reader": self.reader,
            "average_ess": float(aggregate(self.ess)),
            "ess": _numbers(self.ess),
            "tss": _numbers(self.tss),
            "error": None if self.error is None else _numbers(self.error),
        }


@dataclass(frozen=True, eq=False)
class StateReport:
    """The report that `analyze` returns. It prints as a table with a row for each layer.

    Position i separates the tokens before i from token i and later tokens.

    Attributes:
        model: name of the model.
        layers: state-sizes of the layers, in the order in which they ran.
        positions: the P measured positions.
        tokens: text of every token that was read.
        measure: "entropy" or "tolerance".
        tol: absolute tolerance, or None.
        rtol: relative tolerance, or None.
        unread: for every layer that mixes tokens but could not be measured, its path and the
            reason.
        seconds: duration of the analysis in seconds.
        source: name of the input; empty if it has none.
        include: "core" if short convolutions are layers of their own, "mixer" if they are part of
            the operator that they feed.
    """

    model: str
    layers: tuple[LayerState, ...]
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    measure: str
    tol: float | None
    rtol: float | None
    unread: tuple[tuple[str, str], ...]
    seconds: float
    source: str = ""
    include: str = "core"

    @property
    def horizon(self) -> int:
        """The number of tokens that were read. The measured blocks are `T[i:horizon, :i]`."""
        return len(self.tokens)

    @property
    def labels(self) -> tuple[str, ...]:
        """The paths of the layers without their common beginning and end.

        If the report has a single layer, its label is the number in its path, or the path if there
        is no number.
        """
        parts = [layer.name.split(".") for layer in self.layers]
        if len(parts) == 1:
            return tuple(
                [part for part in parts[0] if part.isdecimal()][:1] or [self.layers[0].name]
            )
        for end in (0, -1):
            while len(parts) > 1 and min(map(len, parts)) > 1 and len({p[end] for p in parts}) == 1:
                parts = [p[1:] if end == 0 else p[:-1] for p in parts]
        return tuple(".".join(p) for p in parts)

    @property
    def cap(self) -> Tensor:
        """The bound min(i, horizon - i) on the rank of the block at every position, (P)."""
        positions = torch.tensor(self.positions)
        return torch.minimum(positions, self.horizon - positions)

    @property
    def ess(self) -> tuple[Tensor, ...]:
        """The effective state-sizes, one tensor (heads or channels, P) for each layer."""
        return tuple(layer.ess for layer in self.layers)

    def average(self, *, over_positions: bool = True) -> Tensor:
        """Return the average ESS: the mean over heads or channels, and then over layers.

        Args:
            over_positions: whether to take the mean over positions, too.

        Returns:
            A scalar, or (P) if `over_positions` is False.
        """
        return aggregate(self.ess, "average", over_positions=over_positions)

    def total(self, *, over_positions: bool = True) -> Tensor:
        """Return the total ESS: the sum over all measured heads or channels of all layers.

        Args:
            over_positions: whether to take the mean over positions.

        Returns:
            A scalar, or (P) if `over_positions` is False.
        """
        return aggregate(self.ess, "total", over_positions=over_positions)

    def layer_curves(self) -> Tensor:
        """Return the mean ESS over the heads or channels of each layer, (layers, P)."""
        return torch.stack([layer.ess.double().mean(0) for layer in self.layers])

    def modulation(
        self, delimiter: Callable[[str], bool] | Sequence[str], reach: int = 4
    ) -> dict[str, Any]:
        """Measure state modulation: whether ESS drops where a context ends.

        For every delimiter token, the ESS at the position just after it is divided by the mean ESS
        at positions nearby. At most `reach` positions on each side are used, and none that directly
        follows a delimiter. Both sides have the same number of positions, so that a linear trend
        cancels. A ratio below 1 means that ESS drops.

        Args:
            delimiter: A function that returns, for the text of a token, whether the token is a
                delimiter. Or a sequence of texts; tokens that contain one of them are delimiters.
            reach: Maximal number of positions on each side, at least 1.

        Returns:
            A dictionary with "delimiters", the number of delimiters compared; "average_ratio", the
            ratio for the model's average ESS; and "head_ratios", one tensor (heads or channels) for
            each layer. Ratios are means over delimiters.

        Raises:
            ValueError: if no delimiter has measured positions on both sides.
        """
        if callable(delimiter):
            is_delimiter = delimiter
        else:
            marks = tuple(delimiter)

            def is_delimiter(token: str) -> bool:
                return any(mark in token for mark in marks)

        after = {i + 1 for i, token in enumerate(self.tokens) if is_delimiter(token)}
        places = compared(self.positions, after, after, reach)
        if not places:
            raise ValueError(
                "no delimiter with measured positions on both sides: measure every position, of a "
                "text with delimiters."
            )
        average = self.average(over_positions=False)
        return {
            "delimiters": len(places),
            "average_ratio": float(ratios(average, places).mean()),
            "head_ratios": [ratios(layer.ess, places).mean(-1) for layer in self.layers],
        }

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON can hold."""
        return {
            "format": _FORMAT,
            "model": self.model,
            "source": self.source,
            "include": self.include,
            "measure": self.measure,
            "tol": self.tol,
            "rtol": self.rtol,
            "horizon": self.horizon,
            "average_ess": float(self.average()) if self.layers else None,
            "total_ess": float(self.total()) if self.layers else None,
            "positions": list(self.positions),
            "tokens": list(self.tokens),
            "layers": [layer.to_dict() for layer in self.layers],
            "unread": [{"name": name, "reason": reason} for name, reason in self.unread],
            "seconds": self.seconds,
        }

    def to_json(self, indent: int | None = None) -> str:
        """Return `to_dict` as JSON text."""
        return to_json(self.to_dict(), indent=indent)

    def save(self, path: str | Path) -> Path:
        """Write the report as a JSON file, completely or not at all, and return the path."""
        path = Path(path)
        with staged_file(path) as stage:
            stage.write_text(self.to_json() + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StateReport:
        """Return the report from which `to_dict` made `values`.

        Raises:
            ValueError: if `values` do not have the format of a report.
        """
        if not isinstance(values, dict) or values.get("format") != _FORMAT:
            raise ValueError(f"a state report of format {_FORMAT!r} is needed.")
        layers = tuple(
            LayerState(
                name=layer["name"],
                mixer=layer["mixer"],
                kind=layer["kind"],
                channels=tuple(layer["channels"]),
                count=layer["count"],
                ess=torch.tensor(layer["ess"], dtype=torch.float32),
                tss=torch.tensor(layer["tss"], dtype=torch.float32),
                reader=layer["reader"],
                error=_tensor(layer["error"]),
            )
            for layer in values["layers"]
        )
        return cls(
            model=values["model"],
            layers=layers,
            positions=tuple(values["positions"]),
            tokens=tuple(values["tokens"]),
            measure=values["measure"],
            tol=values["tol"],
            rtol=values["rtol"],
            unread=tuple((entry["name"], entry["reason"]) for entry in values["unread"]),
            seconds=values["seconds"],
            source=values["source"],
            include=values["include"],
        )

    @classmethod
    def load(cls, path: str | Path) -> StateReport:
        """Return the report that `save` wrote.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if the file does not hold a report.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a state report: {error}") from error

    def __str__(self) -> str:
        lines = ["\t".join(_COLUMNS)]
        lines += ["\t".join(_row(layer, layer.name)) for layer in self.layers]
        return "\n".join([*lines, self._summary()])

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title=self.model, caption=self._summary(), caption_justify="left")
        for index, name in enumerate(_COLUMNS):
            table.add_column(name, justify="left" if index < 2 else "right")
        for layer, label in zip(self.layers, self.labels, strict=True):
            table.add_row(*_row(layer, label))
        return table

    def _summary(self) -> str:
        source = f" of {self.source}" if self.source else ""
        lines = [
            f"{self.measure} ESS at {len(self.positions):,} positions of {self.horizon:,} tokens"
            f"{source}, {self.seconds:.1f} s"
        ]
        if self.layers:
            average, total = float(self.average()), float(self.total())
            lines[0] += f": average {average:.2f}, total {total:.1f}"
        lines += [f"not read: {name}: {reason}" for name, reason in self.unread]
        return "\n".join(lines)


def _row(layer: LayerState, label: str) -> tuple[str, ...]:
    """Return the cells of a layer in the table of a report. `_COLUMNS` has their headings."""
    counted = len(layer.channels)
    measured = f"{counted:,}" if counted == layer.count else f"{counted:,} of {layer.count:,}"
    share = layer.in_use
    return (
        label,
        layer.mixer,
        measured,
        f"{float(layer.ess.mean()):.2f}",
        f"{float(layer.ess.max()):.2f}",
        f"{float(layer.tss.mean()):.1f}",
        "" if share is None else f"{100 * share:.1f} %",
    )


def _numbers(values: Tensor) -> list[list[float]]:
    """Return a float32 matrix as lists of numbers with nine digits.

    Nine digits determine a float32 number.
    """
    return [[float(f"{value:.9g}") for value in row] for row in values.tolist()]


def _tensor(values: list[list[float]] | None) -> Tensor | None:
    """Return a matrix of `_numbers` as float32; None stays None."""
    return None if values is None else torch.tensor(values, dtype=torch.float32)
