"""What checking a model found: one row for each layer, the whole model and each precision."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["MODES", "CheckReport", "CheckRow"]

MODES = {
    "parallel": "against the parallel pass of the same weights in float64",
    "recurrent": "one token at a time",
    "chunked": "in chunks of uneven length, state carried from one to the next",
    "padded": "with padding on the left, parallel and in chunks",
    "batched": "each sequence alone instead of in its batch",
    "reloaded": "saved and loaded again",
    "distilled": "with its long filters reduced; reported, not judged",
    "distilled, stepped": "the distilled model, one token at a time against its own parallel pass",
}
"""Ways of running a model, and what each is compared with: but for the first and the last, the
parallel pass in the same precision."""


@dataclass(frozen=True)
class CheckRow:
    """One layer's mixer, or the whole model, in one precision.

    Attributes:
        dtype: of the weights: "float32", "bfloat16", …
        layer: index of the layer, or None for the whole model, whose output are the logits.
        name: class of the mixer, or of the model.
        forms: forms that the recurrences of the mixer's long convolutions take.
        differences: for each of :data:`MODES` the largest difference of any number of the output,
            relative to the largest number of the same sequence; infinite where an output is not
            finite. A mode that does not apply is left out.
        limits: for each mode that is judged, the difference that is accepted.
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
        """Everything, as what JSON can hold; an infinite difference is None."""
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

    def _cells(self) -> list[str]:
        layer = "model" if self.layer is None else str(self.layer)
        mixer = self.name + (f" ({', '.join(dict.fromkeys(self.forms))})" if self.forms else "")
        found = (self.differences.get(mode) for mode in MODES)
        return [layer, self.dtype, mixer, *("–" if d is None else f"{d:.1e}" for d in found)]


@dataclass(frozen=True)
class CheckReport:
    """What :func:`gramian.check` found. Printing it gives the table.

    Attributes:
        rows: precision by precision, the layers in order and then the whole model.
        batch: number of sequences that were run.
        length: tokens of each.
        distillation: what the distilled copy reached, in words, or None where there was none.
        seconds: how long it took.
    """

    rows: tuple[CheckRow, ...]
    batch: int
    length: int
    distillation: str | None
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every difference that is judged is within its limit."""
        return not any(row.failures for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as what JSON can hold."""
        return {
            "passed": self.passed,
            "batch": self.batch,
            "length": self.length,
            "distillation": self.distillation,
            "seconds": self.seconds,
            "rows": [row.to_dict() for row in self.rows],
        }

    def to_json(self) -> str:
        """`to_dict` as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        rows = [["layer", "dtype", "mixer", *MODES], *(row._cells() for row in self.rows)]
        marks = ["", *("  FAIL" if row.failures else "" for row in self.rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() + mark
            for row, mark in zip(rows, marks, strict=True)
        ]
        return "\n".join([*lines, self._summary()])

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(caption=self._summary(), caption_justify="left", caption_style="")
        for column in ("layer", "dtype", "mixer"):
            table.add_column(column, overflow="fold")
        for mode in MODES:
            table.add_column(mode, justify="right")
        for before, row in zip((None, *self.rows), self.rows, strict=False):
            if before is not None and before.dtype != row.dtype:
                table.add_section()
            labels, cells = row._cells()[:3], row._cells()[3:]
            shown = (
                Text(cell, style="bold red" if mode in row.failures else "")
                for mode, cell in zip(MODES, cells, strict=True)
            )
            table.add_row(*labels, *shown)
        return table

    def _summary(self) -> str:
        found = sum(len(row.failures) for row in self.rows)
        judged = sum(len(row.limits.keys() & row.differences.keys()) for row in self.rows)
        verdict = (
            f"{found} of {judged} comparisons above their limits"
            if found
            else f"all {judged} comparisons within their limits"
        )
        lines = [
            f"Largest relative differences over {self.batch} sequences of {self.length} tokens: "
            f"{verdict}; {self.seconds:.1f} s."
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
