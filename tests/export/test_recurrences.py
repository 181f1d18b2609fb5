"""Exported systems compute what their recurrences compute."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import gramian
from gramian.export import ExportedModel, ExportedRecurrence, export_recurrence
from gramian.filters import build
from gramian.systems import DPLR, StateSpace
from tests.export.reference import WIDTH, run_both

ROOT = Path(__file__).parents[2]


def modal(dtype: torch.dtype = torch.float32) -> gramian.Modal:
    angles, radii = torch.rand(3, 2, 4) * 3, 0.99 * torch.rand(3, 2, 4).sqrt()
    poles = torch.polar(radii.double(), angles.double()).to(dtype.to_complex())
    return gramian.Modal(poles, torch.randn_like(poles), torch.randn(3, 2, dtype=dtype))


def state_space() -> StateSpace:
    A = torch.randn(3, 5, 5)
    A = 0.97 * A / torch.linalg.eigvals(A).abs().amax(-1)[:, None, None]
    return StateSpace(A, torch.randn(3, 5), torch.randn(3, 5), torch.randn(3))


def transfer_function(**options: Any) -> gramian.TransferFunction:
    config = {"type": "rtf", "state_size": 6, "initialization": "montel", **options}
    return build(config, channels=3, max_length=70)()


def dplr() -> DPLR:
    return build({"type": "s4", "state_size": 8}, channels=3, max_length=70)()


def real_modes() -> gramian.Modal:
    poles = 0.95 * torch.rand(WIDTH, 4)
    return gramian.Modal(poles + 0j, torch.randn(WIDTH, 4) + 0j, torch.randn(WIDTH), real=True)


SYSTEMS = {
    "modal": modal,
    "modal_in_double": lambda: modal(torch.float64),
    "one_channel": lambda: modal()[0, 0],
    "one_channel_in_double": lambda: modal(torch.float64)[0, 0],
    "state_space": state_space,
    "companion": transfer_function,
    "dplr": dplr,
    "window": lambda: gramian.FIR(torch.randn(WIDTH, 9)),
    "window_in_two_dimensions": lambda: gramian.FIR(torch.randn(2, WIDTH, 40)),
    "window_in_double": lambda: gramian.FIR(torch.randn(WIDTH, 40, dtype=torch.float64)),
    "one_tap": lambda: gramian.FIR(torch.randn(WIDTH, 1)),
    "one_tap_in_double": lambda: gramian.FIR(torch.randn(WIDTH, 1, dtype=torch.float64)),
    "real_modes": real_modes,
    "no_modes": lambda: gramian.Modal(*torch.empty(2, WIDTH, 0) + 0j, torch.randn(WIDTH)),
    "some_without_modes": lambda: build(
        {"type": "modal", "orders": [0, 7, 7, 7, 0, 0]}, channels=WIDTH, max_length=70
    )(),
}


# What each of these has, others have too. The example streams an S4 filter, whose system is DPLR.
REPEATED = (
    "dplr",
    "modal",
    "modal_in_double",
    "one_channel",
    "window",
    "window_in_double",
    "one_tap",
    "some_without_modes",
)


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in REPEATED else n for n in SYSTEMS],
)
def test_systems(tmp_path: Path, name: str) -> None:
    torch.manual_seed(1)
    system = SYSTEMS[name]()
    # Both kinds hold the same graph, but onnxruntime does not run all graphs. Those of modes and of
    # windows are in the models of `test_models.py` and `test_command.py` too.
    onnx = ("window", "window_in_double", "one_tap_in_double", "some_without_modes")
    kind = "onnx" if name in onnx else "torch"
    report = export_recurrence(system, tmp_path / "out", kind, verify=20, threads=1)
    assert report.kind == "system" and report.compared == 20
    run = ExportedRecurrence(tmp_path / "out", threads=1)
    for batch, length in ((1, 17), (3, 257)):
        x = torch.randn(batch, *system.channel_shape, length, dtype=system.dtype)
        tolerance = 1e-11 if system.dtype == torch.float64 else 2e-5
        run_both(system, run, x, x.ndim - 1, tolerance)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("form", ["lattice", "modal"])
def test_forms_of_a_transfer_function(tmp_path: Path, form: str) -> None:
    torch.manual_seed(1)
    options = {"stability": "schur", "initialization": "schur"}
    system = transfer_function(**options)
    export_recurrence(system, tmp_path / "out", form=form, verify=20, threads=1)
    x = torch.randn(2, 3, 100)
    run = ExportedRecurrence(tmp_path / "out", threads=1)
    run_both(system.recurrence(form), run, x, 2, 2e-5)


@torch.no_grad()
def test_a_run_takes_what_was_exported(tmp_path: Path) -> None:
    system = gramian.FIR(torch.randn(3, 2, 9))
    export_recurrence(system, tmp_path / "out", "torch", verify=1)
    with pytest.raises(ValueError, match="holds a system; ExportedModel runs"):
        ExportedModel(tmp_path / "out")
    run = ExportedRecurrence(tmp_path / "out")
    with pytest.raises(ValueError, match=r"must be \(batch, 3, 2\); got \(1, 3\)"):
        run.step(np.zeros((1, 3)), run.initial_state())


@pytest.mark.slow
def test_the_example_streams(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(ROOT / "examples" / "stream.py")
    monkeypatch.setattr(sys, "argv", [file, "--samples", "50"])
    runpy.run_path(file, run_name="__main__")
    assert "50 samples" in capsys.readouterr().out
