"""Greedy elimination of coordinates."""

from __future__ import annotations

import itertools

import pytest
import torch

from gramian.shrinking._elimination import eliminate, squared_errors


def gram(groups: int, n: int, rank: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(groups, n, rank, dtype=torch.float64, generator=generator)
    return z @ z.mT


@pytest.mark.parametrize(("groups", "n"), [(1, 1), (2, 2), (3, 7), (1, 64)])
def test_errors_are_sums_over_what_was_dropped(groups: int, n: int) -> None:
    M = gram(groups, n, 9)
    order, errors = eliminate(M)
    assert torch.equal(order.sort(1).values, torch.arange(n).expand(groups, n))
    for k in range(n + 1):
        dropped = order[:, : n - k]
        expected = torch.stack([M[g][dropped[g]][:, dropped[g]].sum() for g in range(groups)])
        torch.testing.assert_close(errors[:, k], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(squared_errors(M, order[:, n - k :]), expected)


def test_every_step_drops_the_coordinate_that_adds_least() -> None:
    M = gram(1, 6, 8)[0]
    order = eliminate(M[None])[0][0].tolist()
    for step in range(6):

        def error(j: int, gone: list[int] = order[:step]) -> float:
            J = [*gone, j]
            return float(M[J][:, J].sum())

        assert order[step] == min(set(range(6)) - set(order[:step]), key=error)


def test_coordinates_that_cancel_are_dropped_together() -> None:
    z = torch.eye(4, dtype=torch.float64)
    z[3] = -3 * z[0]
    z[0] = 3 * z[0]  # large contributions of opposite sign
    order, errors = eliminate((z @ z.T)[None])
    assert float(errors[0, 2]) == pytest.approx(2.0)  # greedily, the two of size 1
    best = min(
        float((z @ z.T)[list(J)][:, list(J)].sum()) for J in itertools.combinations(range(4), 2)
    )
    assert best == 0.0  # the greedy choice is not always the best one
    assert order[0, :2].sort().values.tolist() == [1, 2]
