"""Exported mixers compute what their recurrences compute, and others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import gramian
from gramian.export import ExportedRecurrence, export_recurrence
from gramian.filters import build
from gramian.mixers import Block, Hyena, LongConvolution, MultiHyena, SoftmaxAttention
from tests.export.reference import WIDTH, run_both


def mixers() -> dict[str, Any]:
    def block(orders: Any) -> Block:
        filter = build({"type": "modal", "orders": orders}, channels=WIDTH, max_length=70)
        return Block(WIDTH, LongConvolution(filter), norm="batch")

    return {
        "block": block(3),
        "ragged_block": block([1, 1, 7, 7, 7, 1]),
        "hyena": Hyena(WIDTH, {"type": "s4d", "state_size": 8}, 70, order=3),
        "multi_hyena": MultiHyena(WIDTH, 3, {"type": "modal", "orders": [1, 9, 1]}, 70),
        "multi_hyena_of_one_tap": MultiHyena(WIDTH, 3, {"type": "explicit", "taps": 1}, 70),
    }


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("block", "torch"),
        # `test_models.py` and `test_generation.py` export models of a multi_hyena, with heads of
        # several orders, and of a hyena; `test_padding.py` runs the programs of one of order 3.
        pytest.param("hyena", "torch", marks=pytest.mark.slow),
        # `test_recurrences.py` exports one tap, and streams a layer, as ONNX.
        pytest.param("multi_hyena_of_one_tap", "onnx", marks=pytest.mark.slow),
        pytest.param("multi_hyena", "torch", marks=pytest.mark.slow),
        pytest.param("ragged_block", "torch", marks=pytest.mark.slow),
        pytest.param("ragged_block", "onnx", marks=pytest.mark.slow),
    ],
)
def test_mixers(tmp_path: Path, name: str, kind: str) -> None:
    torch.manual_seed(2)
    mixer = mixers()[name].eval()
    report = export_recurrence(mixer, tmp_path / "out", kind, verify=20, threads=1)
    assert report.kind == "mixer" and report.prefill_difference < 1e-4 * report.scale
    run = ExportedRecurrence(tmp_path / "out", threads=1)
    run_both(mixer, run, torch.randn(2, 150, WIDTH), 1, 2e-5)


def test_refusals(tmp_path: Path) -> None:
    out = tmp_path / "out"
    implicit = build({"type": "implicit", "hidden": 16}, channels=WIDTH, max_length=300)
    with pytest.raises(ValueError, match=r"this LongConvolution cannot be exported.*distil"):
        export_recurrence(LongConvolution(implicit), out)
    both = LongConvolution(
        build({"type": "modal", "orders": 2}, channels=WIDTH, max_length=70), bidirectional=True
    )
    with pytest.raises(ValueError, match="bidirectional"):
        export_recurrence(both, out)
    with pytest.raises(ValueError, match=r"reduce it first: gramian\.reduce"):
        export_recurrence(gramian.FIR(torch.randn(3, 300)), out)
    with pytest.raises(ValueError, match="other coefficients at every step"):
        export_recurrence(gramian.DenseOperator(torch.eye(4).expand(2, 4, 4)), out)
    with pytest.raises(ValueError, match="give context="):
        export_recurrence(SoftmaxAttention(WIDTH, 3), out)
    with pytest.raises(ValueError, match="picks the form of its recurrences itself"):
        export_recurrence(mixers()["multi_hyena"], out, form="modal")
    with pytest.raises(TypeError, match="a mixer or a system is exported; got Linear"):
        export_recurrence(torch.nn.Linear(2, 2), out)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"float32 or float64; got torch\.bfloat16"):
        export_recurrence(mixers()["multi_hyena"].bfloat16(), out)
    assert not out.exists()
