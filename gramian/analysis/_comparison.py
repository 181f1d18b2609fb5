"""Compare reports of models of different depths, over relative depth.

Layer l of n, counted from 0, covers the relative depths from l / n to (l + 1) / n. A value at an
interval of depths is the mean over the layers that it meets, weighted by how much of the interval
each of them covers. So the mean over all intervals is the mean over the layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rich.table import Table

    from gramian.analysis._report import StateReport

__all__ = ["StateComparison", "check_comparable", "compare_reports"]


@dataclass(frozen=True, eq=False)
class StateComparison:
    """The average ESS and the share in use of M models, over depth. It prints as a table.

    Differences are those from the first model. A layer is a block of the model, such as a decoder
    layer. If a block has several mixers, its numbers are means over them. They are NaN in a block
    of which nothing was measured.

    Attributes:
        names: names of the models.
        ess: average ESS of each layer, a tensor (layers), float64, for each model.
        in_use: share of the usable state in use of each layer, in the same form.
        averages: average ESS of each model, (M), float64.
        shares: share in use of each model, (M), float64.
        positions: compared positions, at which all models were measured.
        horizon: number of tokens that each model read.
        measure: "entropy" or "tolerance".
        notes: sentences about what differs between the reports.
    """

    names: tuple[str, ...]
    ess: tuple[Tensor, ...]
    in_use: tuple[Tensor, ...]
    averages: Tensor
    shares: Tensor
    positions: tuple[int, ...]
    horizon: int
    measure: str
    notes: tuple[str, ...]

    @property
    def depths(self) -> tuple[tuple[float, float], ...]:
        """The intervals of relative depth, as many as the shallowest model has layers."""
        count = min(len(values) for values in self.ess)
        return tuple((k / count, (k + 1) / count) for k in range(count))

    def by_depth(self, values: Sequence[Tensor]) -> Tensor:
        """Return the means of layers' values in the intervals `depths`, (M, intervals).

        Args:
            values: For each model, a number for each layer: `ess` or `in_use`.
        """
        return torch.stack([_resampled(one, len(self.depths)) for one in values])

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers in the intervals of depth as values that JSON can hold."""
        ess, shares = self.by_depth(self.ess), self.by_depth(self.in_use)
        return {
            "models": list(self.names),
            "measure": self.measure,
            "horizon": self.horizon,
            "positions": list(self.positions),
            "depths": [list(interval) for interval in self.depths],
            "average_ess": ess.tolist(),
            "average_ess_difference": (ess - ess[0]).tolist(),
            "in_use": shares.tolist(),
            "in_use_difference": (shares - shares[0]).tolist(),
            "models_average_ess": self.averages.tolist(),
            "models_in_use": self.shares.tolist(),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = ["\t".join(self._heading()), *("\t".join(row) for row in self._rows())]
        return "\n".join([*lines, self._caption()])

    def __rich__(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(
            title="Average ESS and share in use, over relative depth",
            caption=self._caption(),
            caption_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        for index, name in enumerate(self._heading()):
            table.add_column(name, justify="right" if index else "left", overflow="fold")
        *rows, last = self._rows()
        for row in rows:
            table.add_row(*row)
        table.add_section()
        table.add_row(*last)
        return table

    def _heading(self) -> list[str]:
        numbers = range(1, len(self.names) + 1)
        return ["depth", *(f"{what} {k}" for k in numbers for what in ("ESS", "in use"))]

    def _rows(self) -> list[list[str]]:
        """Return a row for each interval of depth, and one for the whole models."""
        rows = [
            (f"{100 * low:.0f}–{100 * high:.0f} %", ess, shares)
            for (low, high), ess, shares in zip(
                self.depths,
                self.by_depth(self.ess).T.tolist(),
                self.by_depth(self.in_use).T.tolist(),
                strict=True,
            )
        ]
        rows.append(("all", self.averages.tolist(), self.shares.tolist()))
        return [
            [depth, *(cell for k in range(len(ess)) for cell in (_size(ess, k), _part(shares, k)))]
            for depth, ess, shares in rows
        ]

    def _caption(self) -> str:
        lines = [f"{k}: {name}" for k, name in enumerate(self.names, 1)]
        lines.append(
            f"{self.measure} ESS at {len(self.positions):,} positions of {self.horizon:,} tokens; "
            "in brackets, the difference from model 1"
        )
        return "\n".join([*lines, *self.notes])


def compare_reports(
    reports: Sequence[StateReport], names: Sequence[str] | None = None
) -> StateComparison:
    """Compare the average ESS and the share in use of models over relative depth.

    Only positions at which all models were measured are compared.

    Args:
        reports: At least two reports of the same measure and the same number of tokens.
        names: A name for each model; by default, the names in the reports.

    Raises:
        ValueError: if there are fewer than two reports or another number of names, if a report has
            no measured layer, if the reports have different measures, numbers of tokens or
            `include`, or if they have no position in common.
    """
    if len(reports) < 2:
        raise ValueError(f"a comparison needs at least two reports; got {len(reports)}.")
    if names is not None and len(names) != len(reports):
        raise ValueError(f"{len(reports)} reports need as many names; got {len(names)}.")
    check_comparable(reports)
    common = set.intersection(*({*report.positions} for report in reports))
    positions = tuple(sorted(common))
    narrowed = [report.at(positions) for report in reports]
    blocks = [_by_block(report) for report in narrowed]
    return StateComparison(
        names=tuple(names or (report.model for report in reports)),
        ess=tuple(ess for ess, _ in blocks),
        in_use=tuple(share for _, share in blocks),
        averages=torch.stack([report.average().double() for report in narrowed]),
        shares=torch.tensor(
            [math.nan if report.in_use is None else report.in_use for report in narrowed],
            dtype=torch.float64,
        ),
        positions=positions,
        horizon=reports[0].horizon,
        measure=reports[0].measure,
        notes=tuple(_notes(reports, positions)),
    )


def check_comparable(reports: Sequence[StateReport]) -> None:
    """Raise a `ValueError` if reports cannot be compared, as `compare_reports` does."""
    for report in reports:
        if not report.layers:
            raise ValueError(
                f"no layer of {report.model} was read, so there is nothing to compare."
            )
    for what, of in (
        ("measure", lambda report: (report.measure, report.tol, report.rtol)),
        ("number of tokens", lambda report: report.horizon),
        ("include", lambda report: report.include),
    ):
        found = list(dict.fromkeys(_said(of(report)) for report in reports))
        if len(found) > 1:
            raise ValueError(
                f"reports to compare must have the same {what}; got {' and '.join(found)}."
            )
    if len(reports) > 1 and not set.intersection(*({*report.positions} for report in reports)):
        raise ValueError(
            "reports to compare must have a measured position in common; got "
            + " and ".join(_said(report.positions[:3]) + "…" for report in reports)
            + "."
        )


def _said(value: Any) -> str:
    """Return a setting of a report in words."""
    if isinstance(value, tuple) and value and isinstance(value[0], str):
        name, tol, rtol = value
        given = [f"{key}={one:g}" for key, one in (("tol", tol), ("rtol", rtol)) if one is not None]
        return " ".join([name, *given])
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _notes(reports: Sequence[StateReport], positions: tuple[int, ...]) -> list[str]:
    notes = []
    if any({*report.positions} != {*positions} for report in reports):
        notes.append("The models were measured at different positions; only common ones count.")
    if len({report.source for report in reports}) > 1:
        sources = ", ".join(
            dict.fromkeys(report.source or "an unnamed input" for report in reports)
        )
        notes.append(f"The models read different inputs: {sources}.")
    elif len({report.tokens for report in reports}) > 1:
        notes.append("The models' tokens differ, so a position is not the same place of the text.")
    unread = [report.model for report in reports if report.unread]
    if unread:
        notes.append(f"Some layers were not read: of {', '.join(dict.fromkeys(unread))}.")
    return notes


def _by_block(report: StateReport) -> tuple[Tensor, Tensor]:
    """Return the average ESS and the share in use of every block of a model, (blocks), float64."""
    report = report.main
    index, count = _blocks(report)
    ess = torch.full((count, len(index)), math.nan, dtype=torch.float64)
    shares = ess.clone()
    for column, (block, layer) in enumerate(zip(index, report.layers, strict=True)):
        ess[block, column] = layer.ess.double().mean()
        share = layer.in_use
        shares[block, column] = math.nan if share is None else share
    return ess.nanmean(1), shares.nanmean(1)


def _blocks(report: StateReport) -> tuple[list[int], int]:
    """Return the block of each layer, and the number of blocks.

    The block is the first number in the path that is not the same in all paths. If paths have no
    such number, or do not count upwards, every layer is a block of its own.
    """
    paths = [layer.name for layer in report.layers]
    others = [name for name, _ in report.unread]
    found = [re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path) for path in [*paths, *others]]
    depth = min(map(len, found))
    for place in range(depth):
        numbers = [int(digits[place]) for digits in found]
        index = numbers[: len(paths)]
        if len({*numbers}) > 1 and index == sorted(index):
            return index, max(numbers) + 1
    return list(range(len(paths))), len(paths)


def _resampled(values: Tensor, count: int) -> Tensor:
    """Return the means of values (layers) in `count` equal intervals of relative depth."""
    layers = len(values)
    edges = torch.arange(layers + 1, dtype=torch.float64) / layers
    bounds = torch.arange(count + 1, dtype=torch.float64) / count
    low = torch.maximum(edges[:-1], bounds[:-1, None])  # (intervals, layers)
    high = torch.minimum(edges[1:], bounds[1:, None])
    weights = (high - low).clamp_min(0)
    weights = torch.where(weights > 1e-12, weights, 0) * ~values.isnan()
    return (weights @ values.nan_to_num()) / weights.sum(1)  # 0 / 0 where nothing was measured


def _size(values: list[float], k: int) -> str:
    shown = "–" if math.isnan(values[k]) else f"{values[k]:.2f}"
    return shown if k == 0 else f"{shown} ({_signed(values[k] - values[0], '.2f')})"


def _part(values: list[float], k: int) -> str:
    shown = "–" if math.isnan(values[k]) else f"{100 * values[k]:.1f} %"
    return shown if k == 0 else f"{shown} ({_signed(100 * (values[k] - values[0]), '.1f')})"


def _signed(value: float, form: str) -> str:
    return "–" if math.isnan(value) else f"{value:+{form}}"
