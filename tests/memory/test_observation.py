"""Operators of the last forward pass, with a graph to the parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gramian.memory import Observer, ess_penalty, gate_regularizer
from gramian.mixers import (
    GLAS6,
    S6,
    Block,
    GatedDeltaNet,
    GatedLinearAttention,
    Hyena,
    LinearRecurrence,
    Segments,
    WeightedLinearAttention,
)
from gramian.systems import TimeVarying

WIDTH = 8


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        GatedLinearAttention(WIDTH, 2),
        Block(WIDTH, WeightedLinearAttention(WIDTH, 2)),
        S6(WIDTH, 3),
        GLAS6(WIDTH, 2),
        GatedDeltaNet(WIDTH, 2),
        Hyena(WIDTH, filter={"type": "rtf", "state_size": 4}, max_length=16),
    )


def test_operators_are_those_of_what_was_read() -> None:
    net = model()
    with Observer(net) as observer:
        x = torch.randn(2, 12, WIDTH)
        net(x)
        found = observer.operators()
        assert list(observer.mixers) == ["0", "1.mixer", "2", "3", "4", "5"]
        torch.testing.assert_close(found[0].matrix(12), net[0].operator(x).matrix(12))
        later = net[:3](x)
        net(x)
        torch.testing.assert_close(found[3].matrix(12), net[3].operator(later).matrix(12))
    net(x)
    with pytest.raises(RuntimeError, match="no mixer has run"):
        observer.operators()


def test_losses_reach_the_gates_of_every_linear_recurrence() -> None:
    net = model()
    observer = Observer(net, LinearRecurrence)
    out = net(torch.randn(2, 12, WIDTH))
    systems = observer.operators()
    assert len(systems) == 5 and all(isinstance(s, TimeVarying) for s in systems)
    (out.square().mean() + gate_regularizer(systems) + ess_penalty(systems, 2.0)).backward()
    for mixer in observer.mixers.values():
        for parameter in mixer.dynamics.parameters():
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all())
    before = gate_regularizer(observer.operators()).item()
    with torch.no_grad():
        for parameter in net[0].dynamics.parameters():
            parameter.add_(2.0)  # gates nearer to 1
    net(torch.randn(2, 12, WIDTH))
    assert gate_regularizer(observer.operators()).item() < before


def test_a_few_channels_and_sequences() -> None:
    net = model()
    observer = Observer(net)
    net(torch.randn(3, 12, WIDTH))
    for system in observer.operators(sequences=2, channels=2):
        assert system.channel_shape[0] == 2 and 1 <= system.channel_shape[1] <= 2
    with pytest.raises(ValueError, match="at least 1 or None"):
        observer.operators(channels=0)


def test_layers_are_chosen_by_their_numbers() -> None:
    hyena = Hyena(WIDTH, filter={"type": "rtf", "state_size": 4}, max_length=16)
    mixers = nn.Sequential(hyena, *(GatedLinearAttention(WIDTH, 2) for _ in range(3)))
    every = Observer(mixers, GatedLinearAttention)
    some = Observer(mixers, GatedLinearAttention, layers=[3, 1])
    mixers(torch.randn(1, 5, WIDTH))
    first, _, last = every.operators()
    found = some.operators()
    for system, expected in zip(found, (first, last), strict=True):
        assert torch.equal(system.A, expected.A)
    for layers in ([0], [4], [-1], []):
        with pytest.raises(ValueError, match=r"GatedLinearAttention, of which .* has 1, 2, 3"):
            Observer(mixers, GatedLinearAttention, layers=layers)


def test_masks_are_those_of_the_pass() -> None:
    mixer = GatedLinearAttention(WIDTH, 2)
    observer = Observer(mixer)
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    mixer(torch.randn(1, 5, WIDTH), mask=mask)
    (system,) = observer.operators()
    assert bool((system.A[:, :, :2] == 1).all()) and bool((system.A[:, :, 2:] < 1).all())


@pytest.mark.parametrize("packed", [False, True])
def test_sequences_are_those_alone(packed: bool) -> None:
    mixer = model()[0]
    x = torch.randn(3, 12, WIDTH)
    real = torch.tensor([[1, 1, 0, 1] * 3, [0] * 5 + [1] * 7, [1] * 9 + [0] * 3]).bool()
    numbers = torch.arange(12).gt(6).long().expand(3, 12)
    tokens = []
    for row in range(3):
        parts = [real[row] & (numbers[row] == n) for n in (0, 1)] if packed else [real[row]]
        tokens += [x[row, part] for part in parts]
    observer = Observer(mixer)
    mixer(x, mask=Segments(real, numbers if packed else None))
    for first in (2, len(tokens)):
        found = observer.sequences(sequences=first)
        assert sum(count for *_, count in found) == first
        for system, length, count in found:
            alone = [mixer.operator(one[None]).matrix() for one in tokens[:first]]
            alone = [matrix for matrix in alone if matrix.shape[-1] == length]
            assert len(alone) == count
            torch.testing.assert_close(system.matrix(), torch.cat(alone))


def test_the_next_pass_replaces_the_last() -> None:
    mixer = GatedLinearAttention(WIDTH, 2)
    observer = Observer(mixer)
    for length in (5, 7):
        mixer(torch.randn(1, length, WIDTH))
        assert observer.operators()[0].length == length
        assert list(observer.inputs()) == [""]


def test_a_model_without_mixers() -> None:
    with pytest.raises(ValueError, match="Linear has no LinearRecurrence"):
        Observer(nn.Linear(2, 2), LinearRecurrence)
