"""Submodules come back in the mode in which they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gramian._modules import in_mode


@pytest.mark.parametrize("training", [False, True])
def test_every_submodule_is_in_its_own_mode_again(training: bool) -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)))
    model[1][0].eval()
    model[1].training = False
    before = [module.training for module in model.modules()]
    with in_mode(model, training=training):
        assert {module.training for module in model.modules()} == {training}
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError), in_mode(model, training=training):
        torch.zeros(2) @ torch.zeros(3)
    assert [module.training for module in model.modules()] == before
