"""What a report says of the filters' memory, against singular values of the blocks."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from gramian.distillation import distill
from gramian.memory import filter_state_sizes
from gramian.memory.correlation import rank_correlation
from gramian.models import GramianConfig, GramianForCausalLM


def naive(kernel: Tensor) -> float:
    """`exp(-Σ p log p)` of the singular values of T[i:2i, :i], i the middle."""
    length = len(kernel)
    T = torch.zeros(length, length, dtype=torch.float64)
    for row in range(length):
        T[row, : row + 1] = kernel[: row + 1].flip(0)
    middle = length // 2
    values = torch.linalg.svdvals(T[middle : 2 * middle, :middle])
    p = values / values.sum()
    return float((-p * p.clamp_min(1e-300).log()).sum().exp())


@pytest.mark.parametrize("length", [2, 3, 63, 64, 257])
def test_state_sizes_are_those_of_the_blocks(length: int) -> None:
    torch.manual_seed(length)
    kernel = torch.randn(4, length, dtype=torch.float64) * torch.linspace(1, 0.01, length).double()
    expected = torch.tensor([naive(row) for row in kernel], dtype=torch.float64)
    torch.testing.assert_close(filter_state_sizes(kernel), expected, rtol=1e-9, atol=0)


def test_silence_has_no_state() -> None:
    kernel = torch.zeros(2, 40, dtype=torch.float64)
    kernel[:, 0] = 1.0  # the direct term is not memory
    assert filter_state_sizes(kernel).tolist() == [0.0, 0.0]
    assert filter_state_sizes(kernel[:, :1]).tolist() == [0.0, 0.0]


def test_estimates_of_long_filters() -> None:
    torch.manual_seed(0)
    time = torch.arange(1500)
    poles = torch.rand(4, 24, 1).double()
    modes = torch.cos(time * poles) * torch.exp(-time / (20 + 300 * poles))
    smooth = (torch.randn(4, 24, 1) * modes).sum(1)
    rough = torch.randn(4, 1500).cumsum(-1).double() * torch.exp(-time / 300)
    for kernel, error in ((smooth, 0.2), (rough, 1.0)):
        exact = torch.tensor([naive(row) for row in kernel], dtype=torch.float64)
        torch.testing.assert_close(filter_state_sizes(kernel), exact, rtol=error, atol=0)


def test_rank_correlation_is_spearmans() -> None:
    stats = pytest.importorskip("scipy.stats")
    torch.manual_seed(3)
    x = torch.randint(0, 9, (50,)).tolist()  # with ties
    y = (torch.tensor(x) + 4 * torch.randn(50)).tolist()
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert rank_correlation(x, [v**3 for v in x]) == pytest.approx(1.0)
    assert rank_correlation(x, [2.0] * 50) is None


@pytest.mark.parametrize("goal", [{"order": 4}, {"tol": 0.05}])
def test_a_report_relates_memory_to_what_distilling_costs(goal: dict[str, float]) -> None:
    torch.manual_seed(1)
    config = GramianConfig(
        hidden_size=12,
        num_hidden_layers=2,
        mixers="hyena",
        filter={"type": "implicit"},
        max_position_embeddings=63,
    )
    model = GramianForCausalLM(config).eval()
    _, report = distill(model, **goal)
    expected = []
    for block in model.base_model.layers:
        with torch.no_grad():
            kernel = block.mixer.filter(63).impulse_response(63).double()
        expected += [naive(row) for row in kernel]
    assert report.effective_state_sizes == pytest.approx(expected, rel=1e-6)
    cost = report.orders
    if "order" in goal:
        cost = tuple(e for layer in report.layers for e in layer.relative_errors)
    correlation = rank_correlation(expected, cost)
    assert report.rank_correlation == pytest.approx(correlation, abs=1e-6)
    assert "Rank correlation of ESS" in report.summary
    data = json.loads(report.to_json())
    assert data["rank_correlation"] == report.rank_correlation
    assert data["layers"][1]["effective_state_sizes"] == pytest.approx(expected[12:], rel=1e-6)


def test_few_filters_tell_no_correlation() -> None:
    torch.manual_seed(0)
    config = GramianConfig(
        hidden_size=8, num_hidden_layers=1, mixers="multi_hyena", num_heads=2,
        filter={"type": "implicit"}, max_position_embeddings=31,
    )  # fmt: skip
    _, report = distill(GramianForCausalLM(config), order=2)
    assert report.rank_correlation is None and "correlation" not in report.summary
