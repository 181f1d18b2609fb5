"""Gates initialised for a state-size, measured again by singular values of blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gramian.memory import initialize_gates
from gramian.mixers import (
    GLAS6,
    S6,
    GatedDeltaNet,
    GatedLinearAttention,
    Hyena,
    LinearAttention,
    LinearRecurrence,
    WeightedLinearAttention,
)

WIDTH = 16
KINDS: dict[str, Any] = {
    "gated": lambda: GatedLinearAttention(WIDTH, 2),
    "weighted": lambda: WeightedLinearAttention(WIDTH, 2),
    "s6": lambda: S6(WIDTH, 8, expand=1),
    "gla_s6": lambda: GLAS6(WIDTH, 2),
    "gated_delta_net": lambda: GatedDeltaNet(WIDTH, 2),
}


def sizes(mixer: LinearRecurrence, x: Tensor, at: int) -> Tensor:
    """Entropy-ESS of every sequence and head by definition, (batch, heads)."""
    blocks = mixer.operator(x).to(dtype=torch.float64).matrix()[..., at:, :at]
    p = torch.linalg.svdvals(blocks)
    p = p / p.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1).exp()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_reached(kind: str) -> None:
    torch.manual_seed(0)
    mixer, x = KINDS[kind](), torch.randn(2, 48, WIDTH)
    before = float(sizes(mixer, x, 24).mean())
    report = initialize_gates(mixer, x, target=3.0)
    after = float(sizes(mixer, x, 24).mean())
    (entry,) = report.gates
    assert entry.before == pytest.approx(before, rel=1e-3)
    assert entry.reached == pytest.approx(after, rel=1e-3)
    assert after == pytest.approx(3.0, rel=0.02) and report.converged


@torch.no_grad()
def test_every_head_on_its_own() -> None:
    torch.manual_seed(1)
    mixer, x = GatedLinearAttention(WIDTH, 4), torch.randn(2, 40, WIDTH)
    report = initialize_gates(mixer, x, share=0.6, per_head=True, at=16)
    assert [entry.head for entry in report.gates] == [0, 1, 2, 3]
    reached = sizes(mixer, x, 16).mean(0)
    torch.testing.assert_close(reached, torch.full_like(reached, 0.6 * 4), rtol=0.02, atol=0)
    assert len({entry.shift for entry in report.gates}) == 4


@torch.no_grad()
def test_layers_one_after_the_other() -> None:
    torch.manual_seed(2)
    norms = [nn.RMSNorm(WIDTH) for _ in range(2)]
    mixers = [KINDS[kind]() for kind in ("gated", "weighted", "s6")]
    net = nn.Sequential(mixers[0], norms[0], mixers[1], norms[1], mixers[2])
    x = torch.randn(2, 40, WIDTH)
    report = initialize_gates(net, x, target=2.5)
    assert [entry.name for entry in report.gates] == ["0", "2", "4"] and report.converged
    for index, layer in enumerate(net):
        if index % 2 == 0:
            assert float(sizes(layer, x, 20).mean()) == pytest.approx(2.5, rel=0.02)
        x = layer(x)


@torch.no_grad()
def test_targets_out_of_reach_are_told() -> None:
    torch.manual_seed(0)
    mixer, x = GatedLinearAttention(WIDTH, 2), torch.randn(2, 48, WIDTH)
    report = initialize_gates(mixer, x, target=7.99)
    (entry,) = report.gates
    assert not report.converged and entry.reached < 7.9
    assert entry.shift < 12  # no further than what there is to gain
    assert "cannot be reached" in str(report) and "below" in str(report)
    assert float(sizes(mixer, x, 24).mean()) == pytest.approx(entry.reached, rel=1e-3)


@torch.no_grad()
def test_a_language_model_and_recurrences_without_gates() -> None:
    pytest.importorskip("transformers")
    from gramian.models import GramianConfig, GramianForCausalLM

    torch.manual_seed(0)
    config = GramianConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_heads=2,
        mixers=["gated_linear_attention", "linear_attention"],
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    model = GramianForCausalLM(config)
    model.train()
    report = initialize_gates(model, torch.randint(0, 256, (2, 32)), share=0.4)
    assert model.training
    assert len(report.gates) == 1 and len(report.without) == 1
    assert report.gates[0].converged and "it has no gates" in str(report)


def test_what_is_refused() -> None:
    x = torch.randn(1, 8, WIDTH)
    gated = GatedLinearAttention(WIDTH, 2)
    with pytest.raises(ValueError, match="one of the two"):
        initialize_gates(gated, x)
    with pytest.raises(ValueError, match="positive state-size"):
        initialize_gates(gated, x, target=0)
    with pytest.raises(ValueError, match="share must lie"):
        initialize_gates(gated, x, share=1.5)
    with pytest.raises(ValueError, match=r"lie in 1 … 7 for 8 tokens"):
        initialize_gates(gated, x, target=2.0, at=8)
    with pytest.raises(ValueError, match="no LinearRecurrence"):
        initialize_gates(Hyena(WIDTH, {"type": "rtf", "state_size": 4}, max_length=8), x, 2.0)
    assert initialize_gates(LinearAttention(WIDTH, 2), x, target=2.0).without == ("",)
