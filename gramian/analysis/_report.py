"""Define the report that `analyze` returns: the state-sizes of every layer, head and position."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gramian._frames import write_frame
from gramian._json import to_json
from gramian._staging import staged_file
from gramian.analysis._frames import layer_frame, state_frame
from gramian.analysis._modulation import compared, ratios
from gramian.analysis._ranking import LayerRanking, rank_layers
from gramian.analysis._storage import Storage
from gramian.analysis._table import as_table, as_text
from gramian.ess import aggregate, utilization

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.table import Table

__all__ = ["LayerState", "StateReport"]

_FORMAT = "gramian.state_report/2"
_READABLE = ("gramian.state_report/1", _FORMAT)  # the first does not say how operators were read


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
            responses of the layer itself). It is empty in a report of an earlier version.
        error: error of each estimate in `ess`, of the same shape; None if they are exact.
        mean_error: error of the mean of `ess` over channels and positions; None if it is exact, or
            if the report holds only some of the positions that were measured.
        storage: how the layer stores its past, from which bytes follow; None if it is not known.
        cap: the bound min(i, L - i) on the rank at every position, (P). A report sets it.
        stable_rank: stable rank of the state of each head before each of the P positions,
            (len(channels), P); None if it was not measured (`ranks` of `analyze`), or if the layer
            has no states with several value channels.
        effective_rank: effective rank of these states, in the same form.
        auxiliary: whether this is a short convolution of a layer that has another operator, too.
            Averages over layers, figures and rankings leave it out.
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
    mean_error: float | None = None
    storage: Storage | None = None
    cap: Tensor | None = None
    stable_rank: Tensor | None = None
    effective_rank: Tensor | None = None
    auxiliary: bool = False

    @property
    def usable(self) -> Tensor:
        """The size of the state that can be used, (len(channels), P): min(TSS, i, L - i).

        TSS is each channel's own, i is the position, and L the number of tokens that were read. A
        layer outside of a report has no positions, so there it is TSS.
        """
        return self.tss if self.cap is None else self.tss.minimum(self.cap.to(self.tss))

    @property
    def utilization(self) -> Tensor:
        """The share of the usable state that is in use, ESS / `usable`, (len(channels), P).

        It is 0 where there is no usable state. `in_use` is its mean without these entries.
        `gramian.ess.utilization(layer.ess, layer.tss)` is the share of all of TSS.
        """
        return utilization(self.ess, self.usable)

    @property
    def in_use(self) -> float | None:
        """The share of the usable state that is in use, or None if there is no usable state.

        It is the mean of `utilization` over all channels and positions where `usable` is above 0.
        Tables, figures, pages, frames and JSON show this number.
        """
        share = self.utilization[self.usable > 0]
        return float(share.double().mean()) if share.numel() else None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON can hold."""
        return {
            "name": self.name,
            "mixer": self.mixer,
            "kind": self.kind,
            "channels": list(self.channels),
            "count": self.count,
            "reader": self.reader,
            "auxiliary": self.auxiliary,
            "storage": None if self.storage is None else self.storage.to_dict(),
            "average_ess": float(aggregate(self.ess)),
            "in_use": self.in_use,
            "ess": _numbers(self.ess),
            "tss": _numbers(self.tss),
            "error": None if self.error is None else _numbers(self.error),
            "mean_error": self.mean_error,
            **{
                name: _numbers(value)
                for name in ("stable_rank", "effective_rank")
                if (value := getattr(self, name)) is not None
            },
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

    def __post_init__(self) -> None:
        layers = tuple(dataclasses.replace(layer, cap=self.cap) for layer in self.layers)
        object.__setattr__(self, "layers", layers)

    @property
    def horizon(self) -> int:
        """The number of tokens that were read. The measured blocks are `T[i:horizon, :i]`."""
        return len(self.tokens)

    @property
    def main(self) -> StateReport:
        """The report without auxiliary layers. If there are no other layers, it has all."""
        layers = tuple(layer for layer in self.layers if not layer.auxiliary)
        return dataclasses.replace(self, layers=layers) if layers else self

    @property
    def labels(self) -> tuple[str, ...]:
        """The paths of the layers without their common beginning and end.

        If the report has a single layer, its label is the number in its path, or the path if there
        is no number. An auxiliary layer has the label of the layer to which it belongs, followed by
        the rest of its own path.
        """
        main = [layer.name for layer in self.main.layers]
        labels = dict(zip(main, _short_paths(main), strict=True))
        for name in (layer.name for layer in self.layers if layer.name not in labels):
            owners = [other for other in main if name.startswith((f"{other}.", f"{other} ("))]
            owner = max(owners, key=len, default="")
            labels[name] = f"{labels[owner]} {name[len(owner) :].lstrip(' .')}" if owner else name
        return tuple(labels[layer.name] for layer in self.layers)

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

        Auxiliary layers do not count.

        Args:
            over_positions: whether to take the mean over positions, too.

        Returns:
            A scalar, or (P) if `over_positions` is False.
        """
        return aggregate(self.main.ess, "average", over_positions=over_positions)

    @property
    def in_use(self) -> float | None:
        """The mean of the layers' `in_use`, or None if no layer has a usable state.

        Auxiliary layers do not count.
        """
        shares = [share for layer in self.main.layers if (share := layer.in_use) is not None]
        return sum(shares) / len(shares) if shares else None

    def total(self, *, over_positions: bool = True) -> Tensor:
        """Return the total ESS: the sum over all measured heads or channels of all layers.

        Auxiliary layers do not count.

        Args:
            over_positions: whether to take the mean over positions.

        Returns:
            A scalar, or (P) if `over_positions` is False.
        """
        return aggregate(self.main.ess, "total", over_positions=over_positions)

    def at(self, positions: Sequence[int]) -> StateReport:
        """Return the report of some of the positions, in the given order.

        Raises:
            ValueError: if a position was not measured.
        """
        column = {i: c for c, i in enumerate(self.positions)}
        missing = [i for i in positions if i not in column]
        if missing:
            raise ValueError(f"positions must be among those measured; got {missing[0]}.")
        kept = [column[i] for i in positions]
        layers = [
            dataclasses.replace(
                layer,
                ess=layer.ess[:, kept],
                tss=layer.tss[:, kept],
                error=_columns(layer.error, kept),
                mean_error=layer.mean_error if set(kept) == {*column.values()} else None,
                stable_rank=_columns(layer.stable_rank, kept),
                effective_rank=_columns(layer.effective_rank, kept),
                cap=None,
            )
            for layer in self.layers
        ]
        return dataclasses.replace(self, layers=tuple(layers), positions=tuple(positions))

    def layer_curves(self) -> Tensor:
        """Return the mean ESS over the heads or channels of each layer, (layers, P)."""
        return torch.stack([layer.ess.double().mean(0) for layer in self.layers])

    def utilization_curves(self) -> Tensor:
        """Return the share in use at each position, a mean over heads or channels, (layers, P).

        Heads and channels without a usable state are left out. If none has one, the share is NaN.
        """
        return torch.stack(
            [
                torch.where(layer.usable > 0, layer.utilization.double(), torch.nan).nanmean(0)
                for layer in self.layers
            ]
        )

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
            "in_use": self.in_use,
            "positions": list(self.positions),
            "tokens": list(self.tokens),
            "layers": [layer.to_dict() for layer in self.layers],
            "ranking": [one.to_dict() for one in self.ranking()],
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

    def to_frame(self, by: str = "position") -> DataFrame:
        """Return the report as a frame of pandas.

        Args:
            by: "position" for a row for each layer, head or channel, and position: `model`,
                `source`, `layer`, `mixer`, `kind`, `reader`, `channel`, `position`, `token`, `ess`,
                `error`, `tss`, `usable` and `in_use`. The error is NaN where ESS is exact, and the
                share in use is NaN where no state is usable. "layer" for a row for each layer, with
                means over heads or channels and positions.

        Raises:
            ImportError: if pandas is not installed.
            ValueError: if `by` is neither of these.
        """
        if by not in ("position", "layer"):
            raise ValueError(f'by must be "position" or "layer"; got {by!r}.')
        return (state_frame if by == "position" else layer_frame)([self])

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
    def from_dict(cls, values: dict[str, Any]) -> StateReport:
        """Return the report from which `to_dict` made `values`.

        Raises:
            ValueError: if `values` do not have the format of a report, or if a layer has other
                numbers of channels and positions than the report.
        """
        found = values.get("format") if isinstance(values, dict) else None
        if found not in _READABLE:
            formats = " or ".join(map(repr, _READABLE))
            raise ValueError(f"a state report of format {formats} is needed; got {found!r}.")
        layers = tuple(
            LayerState(
                name=layer["name"],
                mixer=layer["mixer"],
                kind=layer["kind"],
                channels=tuple(layer["channels"]),
                count=layer["count"],
                ess=torch.tensor(layer["ess"], dtype=torch.float32),
                tss=torch.tensor(layer["tss"], dtype=torch.float32),
                reader=layer.get("reader", ""),
                auxiliary=layer.get("auxiliary", False),
                error=_tensor(layer.get("error")),
                mean_error=layer.get("mean_error"),
                storage=Storage.from_dict(layer.get("storage")),
                stable_rank=_tensor(layer.get("stable_rank")),
                effective_rank=_tensor(layer.get("effective_rank")),
            )
            for layer in values["layers"]
        )
        positions = tuple(values["positions"])
        for layer in layers:
            for name, sizes in (("ess", layer.ess), ("tss", layer.tss)):
                wanted = (len(layer.channels), len(positions))
                if sizes.shape != wanted:
                    raise ValueError(
                        f"{layer.name}: {name} must have a number for each channel and position, "
                        f"{wanted}; got shape {tuple(sizes.shape)}."
                    )
        return cls(
            model=values["model"],
            layers=layers,
            positions=positions,
            tokens=tuple(values["tokens"]),
            measure=values["measure"],
            tol=values["tol"],
            rtol=values["rtol"],
            unread=tuple((entry["name"], entry["reason"]) for entry in values["unread"]),
            seconds=values["seconds"],
            source=values.get("source", ""),
            include=values.get("include", "core"),
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

    def ranking(self) -> LayerRanking:
        """Return the layers by the share in use, smallest first, with what to do about each."""
        return rank_layers(self)

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> Table:
        return as_table(self)


def _short_paths(names: list[str]) -> list[str]:
    """Return paths without their common beginning and end; of one path, the number in it."""
    parts = [name.split(".") for name in names]
    if len(parts) == 1:
        return [part for part in parts[0] if part.isdecimal()][:1] or names
    for end in (0, -1):
        while min(map(len, parts), default=0) > 1 and len({p[end] for p in parts}) == 1:
            parts = [p[1:] if end == 0 else p[:-1] for p in parts]
    return [".".join(p) for p in parts]


def _numbers(values: Tensor) -> list[list[float]]:
    """Return a float32 matrix as lists of numbers with nine digits.

    Nine digits determine a float32 number.
    """
    return [[float(f"{value:.9g}") for value in row] for row in values.tolist()]


def _columns(values: Tensor | None, kept: list[int]) -> Tensor | None:
    """Return some columns of a matrix; None stays None."""
    return None if values is None else values[:, kept]


def _tensor(values: list[list[float]] | None) -> Tensor | None:
    """Return a matrix of `_numbers` as float32; None stays None."""
    return None if values is None else torch.tensor(values, dtype=torch.float32)
