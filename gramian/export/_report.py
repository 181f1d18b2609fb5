"""Define the report of an export, which compares the exported programs with PyTorch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gramian._json import to_json

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["ExportReport"]


@dataclass(frozen=True)
class ExportReport:
    """The report that `export_model` and `export_recurrence` return. It prints as a table.

    Attributes:
        kind: "language model", "mixer" or "system".
        format: "onnx" or "torch".
        states: number of tensors of the state.
        state_bytes: bytes of the state of one sequence.
        context: number of tokens for which attention has room; None if there is no limit.
        compared: number of greedy tokens, or of samples, that were compared in each of two
            sequences.
        ties: number of these tokens for which the program and PyTorch chose different tokens, but
            their logits in PyTorch differ by no more than rounding.
        prefill_difference: largest difference between an output of `prefill` and PyTorch's output.
        step_difference: largest difference between an output of `step` and PyTorch's output.
        scale: largest absolute value of an output. Compare the differences with this value.
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
        """Return all fields as values that JSON can hold."""
        return asdict(self)

    def to_json(self) -> str:
        """Return `to_dict` as indented JSON text."""
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
