"""Frames of reports hold the numbers of the reports, and files hold the frames."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("pandas")

import pandas

from gramian._frames import save_frame
from gramian.analysis import LayerState, StateReport, layer_frame, state_frame

COLUMNS = "model source layer mixer kind reader channel position token ess error tss usable in_use"
LAYER_COLUMNS = (
    "model source layer mixer kind reader channels count ess_mean ess_max ess_mean_error tss_mean "
    "usable_mean in_use"
)


def make(model: str = "m", positions: tuple[int, ...] = (5, 0, 3), horizon: int = 7) -> StateReport:
    generator = torch.Generator().manual_seed(len(model))
    layers = []
    for k, channels in enumerate(((0,), (0, 2, 4))):
        tss = torch.randint(0, 6, (len(channels), len(positions)), generator=generator).float()
        ess = tss * torch.rand(tss.shape, generator=generator)
        error = torch.rand(tss.shape, generator=generator) if k else None
        layers.append(
            LayerState(f"m.{k}", "Mix", "recurrence", channels, 5, ess, tss, "scan", error)
        )
    tokens = tuple('a,\n"é$<') + ("long token",) * (horizon - 7)
    return StateReport(
        model, tuple(layers), positions, tokens, "entropy", None, None, (), 0.1, "a text"
    )


def test_every_entry_is_a_row() -> None:
    report = make()
    frame = report.to_frame()
    assert list(frame.columns) == COLUMNS.split()
    rows = iter(frame.to_dict("records"))
    for layer in report.layers:
        for c, channel in enumerate(layer.channels):
            for p, i in enumerate(report.positions):
                row = next(rows)
                assert (row["model"], row["source"], row["layer"]) == ("m", "a text", layer.name)
                assert (row["channel"], row["position"]) == (channel, i)
                assert row["token"] == report.tokens[i]
                assert row["ess"] == float(layer.ess[c, p]) and row["tss"] == float(layer.tss[c, p])
                usable = min(float(layer.tss[c, p]), i, 7 - i)
                assert row["usable"] == usable
                if usable:
                    assert row["in_use"] == pytest.approx(row["ess"] / usable, rel=1e-6)
                else:
                    assert math.isnan(row["in_use"])
                if layer.error is None:
                    assert math.isnan(row["error"])
                else:
                    assert row["error"] == float(layer.error[c, p])
    assert next(rows, None) is None


def test_means_over_a_layer_are_those_of_the_report() -> None:
    reports = [make(), make("other", (1, 2, 6))]
    frame = state_frame(reports, ["one", "two"])
    short = layer_frame(reports, ["one", "two"])
    assert list(frame.columns) == ["text", *COLUMNS.split()]
    assert list(short.columns) == ["text", *LAYER_COLUMNS.split()]
    layers = [layer for report in reports for layer in report.layers]
    assert len(short) == len(layers)
    for (_, row), layer in zip(short.iterrows(), layers, strict=True):
        mine = frame[(frame.text == row.text) & (frame.layer == row.layer)]
        assert row.in_use == pytest.approx(layer.in_use) == pytest.approx(mine.in_use.mean())
        assert row.ess_mean == pytest.approx(float(layer.ess.mean())) and row["count"] == 5
        assert row.ess_mean == pytest.approx(mine.ess.mean())
        assert row.ess_max == float(layer.ess.max())
        assert row.usable_mean == pytest.approx(mine.usable.mean())
    assert list(make().to_frame("layer").layer) == ["m.0", "m.1"]
    with pytest.raises(ValueError, match='"position" or "layer"; got \'head\''):
        make().to_frame("head")
    with pytest.raises(ValueError, match="2 reports need as many texts; got 1"):
        state_frame(reports, ["one"])


def test_files_hold_the_frame(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    report = make(horizon=9)
    frame = report.to_frame()
    read = pandas.read_parquet(report.to_parquet(tmp_path / "states.parquet"))
    pandas.testing.assert_frame_equal(read, frame)
    read = pandas.read_csv(report.to_csv(tmp_path / "states.csv"), keep_default_na=False)
    assert list(read.token) == list(frame.token)
    numbers = pandas.to_numeric(read.in_use)
    pandas.testing.assert_series_equal(numbers, frame.in_use, check_dtype=False, rtol=1e-6)
    with pytest.raises(ValueError, match=r"must end in \.csv; got states\.parquet"):
        report.to_csv(tmp_path / "states.parquet")
    with pytest.raises(ValueError, match=r"\.csv or \.parquet; got states\.xlsx"):
        save_frame(frame, tmp_path / "states.xlsx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["states.csv", "states.parquet"]


def test_a_report_without_layers_is_an_empty_frame() -> None:
    empty = StateReport("m", (), (0,), ("a",), "entropy", None, None, (("x", "no."),), 0.1)
    assert len(empty.to_frame()) == 0 and len(empty.to_frame("layer")) == 0


@pytest.mark.parametrize(("package", "suffix"), [("pandas", ".csv"), ("pyarrow", ".parquet")])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, suffix: str
) -> None:
    assert importlib.util.find_spec("pyarrow") is not None
    report = make()
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    write = report.to_csv if suffix == ".csv" else report.to_parquet
    with pytest.raises(ImportError, match=rf'need {package}: pip install "gramian\[train\]"'):
        write(tmp_path / f"states{suffix}")
    assert not list(tmp_path.iterdir())
