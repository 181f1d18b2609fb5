"""A few steps of training: which windows are drawn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gramian._finetuning import finetune_briefly, held_out


def test_windows_are_drawn_without_replacement() -> None:
    model, drawn = nn.Linear(1, 1), []
    windows = torch.arange(23)[:, None]

    def objective(some: Tensor) -> Tensor:
        if model.training:
            drawn.extend(some[:, 0].tolist())
        return model(some.float()).square().mean()

    groups = [{"params": list(model.parameters()), "lr": 1e-3}]
    finetune_briefly(model, windows, objective, groups, 10, batch=8, seed=0)
    trained = windows[~held_out(23), 0].tolist()
    assert len(trained) == 20 and len(drawn) == 80
    for start in range(0, 80, 20):
        assert sorted(drawn[start : start + 20]) == trained
    assert drawn[:20] != drawn[20:40]


def test_a_batch_may_be_larger_than_the_windows() -> None:
    model, sizes = nn.Linear(1, 1), []

    def objective(some: Tensor) -> Tensor:
        if model.training:
            sizes.append(some[:, 0].bincount(minlength=5).tolist())
        return model(some.float()).square().mean()

    groups = [{"params": list(model.parameters()), "lr": 1e-3}]
    finetune_briefly(model, torch.arange(5)[:, None], objective, groups, 2, batch=8, seed=0)
    assert sizes == [[2, 0, 2, 2, 2]] * 2
