"""What was compared after exporting, and how close it was."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gramian._json import to_json

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["ExportReport"]


@dataclass(frozen=True)
class ExportReport:
    """What `export_model` and `export_recurrence` return. Printing it gives the table.

    Attributes:
        kind: "language model", "mixer" or "system".
        format: "onnx" or "torch".
        states: number of state tensors.
        state_bytes: their bytes for one sequence.
        context: tokens that attention has room for; None where nothing bounds them.
        compared: greedy tokens, or samples, of each of two sequences that were compared.
        ties: of these tokens, those where the program preferred another token that PyTorch's own
            logits tell apart by no more than rounding does.
        prefill_difference: largest difference of an output after a whole prompt or chunk.
        step_difference: the same of steps.
        scale: the largest output, which the differences compare with.
    """

    kind: str
    format: str
    states: int
    state_bytes: int
    context: int | None
    compared: int
    ties: int
    prefill_difference: float
    step_difference: float
    scale: float

    def to_dict(self) -> dict[str, Any]:
        """Everything, as what JSON can hold."""
        return asdict(self)

    def to_json(self) -> str:
        """`to_dict` as indented JSON text."""
        return to_json(self.to_dict(), indent=2)

    def _rows(self) -> list[tuple[str, str]]:
        things = "greedy tokens" if self.kind == "language model" else "samples"
        outputs = "logits" if self.kind == "language model" else "outputs"
        equal = "all equal" if not self.ties else f"{self.ties} ties, the others equal"
        compared = f"2 × {self.compared:,}"
        rows = [
            ("format", self.format),
            ("state", f"{self.states} tensors, {self.state_bytes:,} bytes a sequence"),
        ]
        if self.context is not None:
            rows.append(("context", f"{self.context:,} tokens"))
        if self.kind == "language model":
            compared = f"{compared}, {equal}"
        return [
            *rows,
            (things, compared),
            (f"largest difference of {outputs}, prefill", f"{self.prefill_difference:.1e}"),
            (f"largest difference of {outputs}, steps", f"{self.step_difference:.1e}"),
            (f"largest of {outputs}", f"{self.scale:.3g}"),
        ]

    def __str__(self) -> str:
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)

    def __rich__(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(title=f"Exported {self.kind}", box=SIMPLE_HEAD, show_header=False)
        for name, value in self._rows():
            table.add_row(name, value)
        return table
