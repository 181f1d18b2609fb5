"""Figures hold what they were given, and files hold pictures."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.image import imread

from gramian.distillation import DistillationReport, LayerReport
from gramian.reports import (
    plot_bits_per_byte,
    plot_decoding_cost,
    plot_distillation,
    plot_hankel_spectra,
    save_figure,
)


def spectra(filters: int, values: int) -> np.ndarray:
    rng = np.random.default_rng(filters)
    return np.sort(rng.random((filters, values)), axis=-1)[:, ::-1] + 1e-3


def test_every_filter_is_a_curve_that_starts_at_one() -> None:
    figure = plot_hankel_spectra({"a": spectra(3, 20), "b": spectra(5, 7)})
    assert [len(axes.lines) for axes in figure.axes] == [3, 5]
    for axes in figure.axes:
        for line in axes.lines:
            assert np.asarray(line.get_ydata())[0] == 1


def test_a_silent_filter_has_an_empty_curve() -> None:
    values = spectra(2, 9)
    values[1] = 0
    silent = plot_hankel_spectra({"a": values}).axes[0].lines[1]
    assert np.isnan(np.asarray(silent.get_ydata(), dtype=float)).all()


def test_mean_order_is_marked() -> None:
    figure = plot_hankel_spectra({"a": spectra(2, 9)}, {"a": [3, 6]})
    assert "4.5" in figure.axes[0].texts[0].get_text()


def test_distillation_shows_every_layer_and_the_tolerance() -> None:
    layers = tuple(
        LayerReport(
            layer=name,
            mixer="Hyena",
            taps=20,
            orders=(2, 4),
            relative_errors=errors,
            lower_bounds=(1e-4, 0.0),
            l1_errors=(0.1, 0.0),
            tail_energies=(0.0, 0.0),
            hankel_singular_values=((4.0, 2.0, 1.0), (2.0, 1.0)),
            effective_state_sizes=(2.6, 1.9),
            unconverged=(),
        )
        for name, errors in (("first", (1e-3, 2e-3)), ("second", (0.0, 0.0)))
    )
    report = DistillationReport(0.01, None, layers, 20, 100, 10, 0.5)
    assert plot_distillation(report, "model to small").get_suptitle() == "model to small"
    spectra, errors, orders = plot_distillation(report).axes
    assert [list(line.get_ydata()) for line in spectra.lines] == [[1.0, 0.5, 0.25]] * 2
    assert list(np.asarray(errors.lines[0].get_ydata())) == [1.5e-3, 0.0]
    assert [line.get_ydata()[0] for line in errors.lines if line.get_label() == "tolerance"] == [
        0.01
    ]
    assert list(np.asarray(orders.lines[0].get_ydata())) == [3.0, 3.0]
    assert [label.get_text() for label in orders.get_xticklabels()] == ["first", "second"]


def test_bars_are_as_long_as_the_values() -> None:
    values = {"one": 3.25, "two": 1.5}
    (axes,) = plot_bits_per_byte(values).axes
    assert [bar.get_width() for bar in axes.patches] == [3.25, 1.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]


def test_costs_are_drawn_for_every_way_in_its_own_colour() -> None:
    times = {"a": {512: 1.0, 1024: 1.0}, "b": {512: 2.0, 1024: 4.0}}
    sizes = {"a": {512: 2**20, 1024: 2**21}, "c": {512: 2**22}}
    left, right = plot_decoding_cost(times, sizes).axes
    colours = {line.get_label(): line.get_color() for line in [*left.lines, *right.lines]}
    assert set(colours) == {"a", "b", "c"}
    assert len(set(colours.values())) == 3
    assert list(np.asarray(right.lines[0].get_ydata())) == [1.0, 2.0]  # MiB


@pytest.mark.parametrize(
    "plot",
    [
        lambda: plot_hankel_spectra({}),
        lambda: plot_bits_per_byte({}),
    ],
    ids=["spectra", "bars"],
)
def test_nothing_to_plot_is_refused(plot) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="at least one"):
        plot()


def test_saved_files_are_pictures_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = save_figure(plot_bits_per_byte({"one": 3.0}), tmp_path / "figure.png")
    picture = imread(path)
    assert picture.shape[0] > 100 and picture.shape[1] > 100
    assert picture.std() > 0
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    figure = plot_bits_per_byte({"one": 3.0})
    with pytest.raises(ValueError, match="unknown"):
        save_figure(figure, tmp_path / "figure.unknown")
    assert list(tmp_path.iterdir()) == []
