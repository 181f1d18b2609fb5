"""What a report says of a layer in one number."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from gramian.analysis import LayerState, StateReport


def layer(ess: list[list[float]], tss: list[list[float]]) -> LayerState:
    return LayerState(
        "layers.0", "GLA", "recurrence", (0,), 1, torch.tensor(ess), torch.tensor(tss)
    )


def test_the_share_in_use_is_that_of_the_table() -> None:
    one = layer([[0.0, 1.0, 3.0]], [[0.0, 4.0, 4.0]])
    assert one.utilization.tolist() == [[0.0, 0.25, 0.75]]
    assert one.in_use == pytest.approx(0.5)
    report = StateReport("m", (one,), (0, 1, 2), ("a", "b", "c"), "entropy", None, None, (), 0.1)
    assert "50.0 %" in str(report)
    assert layer([[0.0]], [[0.0]]).in_use is None
