"""On a trained model, coordinates chosen by the error are better than random ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gramian
from gramian.models import GramianConfig, GramianForCausalLM
from gramian.shrinking._family import find_layers
from gramian.shrinking._folding import fold
from gramian.shrinking._passes import measure_importance, window_scores
from gramian.shrinking._texts import Windows

KEYS, PAIRS = 8, 4


def recall(count: int, generator: torch.Generator) -> Tensor:
    """Pairs of a key and a value, and then the same pairs in another order."""
    keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :PAIRS]
    values = KEYS + torch.randint(0, KEYS, (count, PAIRS), generator=generator)
    pairs = torch.stack([keys, values], dim=-1)  # (count, pairs, 2)
    order = torch.rand(count, PAIRS, generator=generator).argsort(1)
    again = pairs.gather(1, order.unsqueeze(-1).expand(-1, -1, 2))
    return torch.cat([pairs, again], dim=1).flatten(1)


def trained(mixer: str, generator: torch.Generator, **options: Any) -> GramianForCausalLM:
    torch.manual_seed(0)
    model = GramianForCausalLM(
        GramianConfig(
            vocab_size=2 * KEYS,
            hidden_size=32,
            num_hidden_layers=2,
            num_heads=2,
            mixers=mixer,
            linear_recurrence={"state_size": 16, **options},
            initializer_range=0.1,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(500):
        ids = recall(64, generator)
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
def test_projections_are_better_than_coordinates() -> None:
    generator = torch.Generator().manual_seed(1)
    model = trained("gated_linear_attention", generator, head_gates=True)
    text, held_out = recall(96, generator), recall(512, generator)
    for size in (4, 8, 12):
        losses, errors = [], []
        for projection in (True, False):
            small, report = gramian.shrink(model, text, keep=size, projection=projection)
            losses.append(float(window_scores(small, Windows.of(held_out)).losses.mean()))
            errors.append([layer.measured_error for layer in report.layers])
        assert losses[0] <= losses[1]
        assert all(one <= two for one, two in zip(*errors, strict=True))


@pytest.mark.slow
def test_the_chosen_coordinates_are_better_than_random_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    model = trained("gated_linear_attention", generator)
    text, held_out = recall(96, generator), recall(512, generator)
    layers = list(find_layers(model))
    importance = measure_importance(model, layers, Windows.of(text))

    def loss(small: GramianForCausalLM) -> float:
        return float(window_scores(small, Windows.of(held_out)).losses.mean())

    for size in (4, 8):
        chosen, _ = gramian.shrink(model, text, keep=size)
        random = []
        for _ in range(5):
            orders = {x.path: torch.rand(2, 16).argsort(1) for x in layers}
            kept = {path: order[:, :size].sort(1).values for path, order in orders.items()}
            random.append(loss(fold(model, layers, kept, importance)[0]))
        assert loss(chosen) < min(random)
