"""Define the report of a check. In each dtype, it has a row for each layer and the whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gramian._json import to_json

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["MODES", "CheckReport", "CheckRow"]

MODES = {
    "parallel": "against the parallel pass of the same weights in float64",
    "recurrent": "one token at a time",
    "chunked": "in chunks of uneven length, state carried from one to the next",
    "batched": "each sequence alone instead of in its batch",
    "reloaded": "saved and loaded again",
    "distilled": "with its long filters reduced; reported, not judged",
    "stepped": "the distilled model, one token at a time against its own parallel pass",
    "padded": "with padding on the left, parallel and in chunks",
    "right": "with padding on the right, and going on from there",
    "gap": "with padding between the tokens",
    "turn": "in two turns of unequal lengths, padded, the second after the state of the first",
    "packed": "all sequences in one row",
    "generated": "the logits that `generate` writes by, against a pass without a cache",
}
"""The ways of running a model, with a description of each.

If a description names no reference for the comparison, the reference is the parallel pass in the
same precision.
"""

_TABLES = (tuple(MODES)[:7], tuple(MODES)[7:])
"""The modes in each of the two tables: ways of running the model, and positions of the tokens."""


@dataclass(frozen=True)
class CheckRow:
    """The differences of one layer's mixer, or of the whole model, in one precision.

    Attributes:
        dtype: dtype of the weights: "float32", "bfloat16", …
        layer: index of the layer, or None for the whole model.
        name: name of the class of the mixer, or of the model.
        forms: the forms in which the recurrences of the mixer's long convolutions step.
        differences: a mapping from the modes that were run, keys of `MODES`, to the largest
            difference between a number of the output and its reference. Differences are relative to
            the largest number of the same sequence, and infinite if an output is not finite. The
            outputs of the whole model are logits.
        limits: a mapping from each mode that can fail to the accepted difference.
    """

    dtype: str
    layer: int | None
    name: str
    forms: tuple[str, ...]
    differences: Mapping[str, float]
    limits: Mapping[str, float] = field(repr=False)

    @property
    def failures(self) -> tuple[str, ...]:
        """The modes whose difference is above its limit."""
        return tuple(
            mode
            for mode, difference in self.differences.items()
            if not difference <= self.limits.get(mode, math.inf)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON can hold. An infinite difference becomes None."""
        finite = {m: d if math.isfinite(d) else None for m, d in self.differences.items()}
        return {
            "dtype": self.dtype,
            "layer": self.layer,
            "name": self.name,
            "forms": list(self.forms),
            "differences": finite,
            "limits": dict(self.limits),
            "failures": list(self.failures),
        }


@dataclass(frozen=True)
class CheckReport:
    """The report that `gramian.check` returns. It prints as a table.

    Attributes:
        rows: for each precision, one row for every layer in order, and then one row for the whole
            model.
        batch: number of sequences that the model read.
        length: number of tokens of each sequence.
        distillation: summary of the distilled copy, or None if there is no distilled copy.
        seconds: duration of the check in seconds.
    """

    rows: tuple[CheckRow, ...]
    batch: int
    length: int
    distillation: str | None
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every difference that has a limit is within its limit."""
        return not any(row.failures for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON can hold."""
        return {
            "passed": self.passed,
            "batch": self.batch,
            "length": self.length,
            "distillation": self.distillation,
            "seconds": self.seconds,
            "rows": [row.to_dict() for row in self.rows],
        }

    def to_json(self) -> str:
        """Return `to_dict` as indented JSON text."""
        return to_json(self.to_dict(), indent=2)

    def __str__(self) -> str:
        lines = []
        for dtype, rows in self._by_precision():
            lines.append(dtype)
            for modes in _TABLES:
                table = [["layer", *modes], *(_cells(row, modes) for row in rows)]
                failed = (not set(modes).isdisjoint(row.failures) for row in rows)
                marks = ["", *("  FAIL" if fails else "" for fails in failed)]
                widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
                lines += [
                    " ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) + mark
                    for row, mark in zip(table, marks, strict=True)
                ]
        return "\n".join([*lines, self._summary()])

    def __rich__(self) -> Group:
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        tables = []
        for dtype, rows in self._by_precision():
            for modes in _TABLES:
                title = dtype if modes is _TABLES[0] else f"{dtype}: where the tokens stand"
                table = Table(title=title, box=SIMPLE_HEAD, padding=0, pad_edge=False)
                for column in ("layer", *modes):
                    table.add_column(column, justify="right")
                for row in rows:
                    label, *cells = _cells(row, modes)
                    shown = (
                        Text(cell, style="bold red" if mode in row.failures else "")
                        for mode, cell in zip(modes, cells, strict=True)
                    )
                    table.add_row(label, *shown)
                tables.append(table)
        return Group(*tables, self._summary())

    def _by_precision(self) -> list[tuple[str, list[CheckRow]]]:
        precisions = dict.fromkeys(row.dtype for row in self.rows)
        return [(name, [row for row in self.rows if row.dtype == name]) for name in precisions]

    def _mixers(self) -> str:
        """Return a text with the mixers of the layers. Successive equal mixers are one group."""
        runs: list[tuple[str, list[int]]] = []
        for row in self._by_precision()[0][1]:
            if row.layer is None:
                continue
            words = row.name
            if row.forms:
                words += f", stepping as {' and '.join(dict.fromkeys(row.forms))}"
            if not runs or runs[-1][0] != words:
                runs.append((words, []))
            runs[-1][1].append(row.layer)
        return "; ".join(
            f"{'layer' if len(layers) == 1 else 'layers'} {layers[0]}"
            + (f" to {layers[-1]}" if len(layers) > 1 else "")
            + f": {words}"
            for words, layers in runs
        )

    def _summary(self) -> str:
        found = sum(len(row.failures) for row in self.rows)
        judged = sum(len(row.limits.keys() & row.differences.keys()) for row in self.rows)
        verdict = (
            f"{found} of {judged} comparisons above their limits"
            if found
            else f"all {judged} comparisons within their limits"
        )
        accepted = (
            f"{limit:.1e} {'of the model' if row.layer is None else 'a layer'} in {row.dtype}"
            for row in self.rows
            if row.layer in (None, self.rows[0].layer)
            for limit in [min(row.limits.values())]
        )
        lines = [
            f"Largest relative differences over {self.batch} sequences of {self.length} tokens: "
            f"{verdict}; {self.seconds:.1f} s.",
            f"Accepted: {', '.join(accepted)}; more where a converted recurrence reports an error.",
            f"Mixers: {self._mixers()}.",
        ]
        for row in self.rows:
            for mode in row.failures:
                where = "the model" if row.layer is None else f"layer {row.layer}"
                lines.append(
                    f"{row.dtype}, {where}, {mode}: {row.differences[mode]:.1e}, accepted are "
                    f"{row.limits[mode]:.1e} ({MODES[mode]})."
                )
        if self.distillation is not None:
            lines.append(f"Distilled: {self.distillation}")
        return "\n".join(lines)


def _cells(row: CheckRow, modes: tuple[str, ...]) -> list[str]:
    """Return the cells of a row in a table: the layer, then the difference of every mode."""
    found = (row.differences.get(mode) for mode in modes)
    cells = ("–" if d is None else "0" if d == 0 else f"{d:.1e}" for d in found)
    return ["model" if row.layer is None else str(row.layer), *cells]
