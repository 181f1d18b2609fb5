"""Figures of training hold what they were given."""

from __future__ import annotations

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from gramian.training import plot_training


def test_training_curves_hold_every_line_that_has_a_value() -> None:
    lines = [
        {"step": 2, "loss": 3.0},
        {"step": 4, "loss": 2.0},
        {"step": 4, "eval_loss": 2.5, "eval_accuracy": 0.25},
    ]
    losses, accuracy = plot_training(lines).axes
    training, held_out = losses.lines
    assert list(training.get_xdata()) == [2, 4] and list(training.get_ydata()) == [3.0, 2.0]
    assert list(held_out.get_xdata()) == [4] and list(held_out.get_ydata()) == [2.5]
    assert list(accuracy.lines[0].get_ydata()) == [0.25]
    assert len(plot_training(lines[:2]).axes) == 1
    assert plot_training(lines).get_suptitle() == ""
    assert plot_training(lines, title="runs/a").get_suptitle() == "runs/a"
    long = plot_training(lines, title="x" * 199 + "/run").get_suptitle()
    assert "".join(long.split()) == "x" * 199 + "/run" and "\n" in long


def test_the_metric_of_a_kind_from_outside_is_drawn() -> None:
    lines = [{"step": 2, "loss": 3.0, "eval_loss": 2.5, "eval_tags_right": 0.75}]
    assert len(plot_training(lines).axes) == 1
    (panel,) = plot_training(lines, "tags_right").axes[1:]
    assert list(panel.lines[0].get_ydata()) == [0.75] and "tags right" in panel.get_title("left")
    assert len(plot_training(lines, "loss").axes) == 1


def test_no_line_with_a_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        plot_training([{"step": 1}])
