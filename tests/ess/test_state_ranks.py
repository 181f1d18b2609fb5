"""Ranks of states are those of matrices that a plain loop computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gramian.ess import state_ranks
from gramian.mixers import GatedDeltaNet, GatedLinearAttention
from gramian.systems import DenseOperator, TimeVarying

KINDS = ("diagonal", "rank one", "dense")


def system(kind: str, channels: tuple[int, ...], length: int, order: int) -> TimeVarying:
    g = torch.Generator().manual_seed(length + order)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*channels, length, *shape, generator=g, dtype=torch.float64)

    A = draw(order, order) / (2 * order) if kind == "dense" else torch.sigmoid(draw(order) + 1)
    low = {"p": -draw(order) / order, "q": draw(order) / 2} if kind == "rank one" else {}
    return TimeVarying(A, draw(order), draw(order), draw(), **low)


def states(one: TimeVarying, u: np.ndarray, start: np.ndarray) -> list[np.ndarray]:
    """The state before every input of a single channel, by numpy."""
    A, B = one.A.numpy(), one.B.numpy()
    found, S = [], start
    for i in range(one.length):
        found.append(S)
        M = np.diag(A[i]) if A.ndim == 2 else A[i]
        if one.p is not None and one.q is not None:
            M = M + np.outer(one.p[i].numpy(), one.q[i].numpy())
        S = M @ S + np.outer(B[i], u[:, i])
    return found


def ranks(S: np.ndarray) -> tuple[float, float]:
    s = np.linalg.svd(S, compute_uv=False)
    if s[0] == 0:
        return 0.0, 0.0
    p = s[s > 0] / s.sum()
    norm = np.linalg.norm(S, "fro") ** 2 / np.linalg.norm(S, 2) ** 2
    return float(norm), float(np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("length", "order", "columns"), [(1, 1, 1), (2, 3, 1), (3, 2, 5), (63, 8, 6), (257, 3, 16)]
)
def test_ranks_are_those_of_a_plain_loop(kind: str, length: int, order: int, columns: int) -> None:
    one = system(kind, (2, 3), length, order)
    g = torch.Generator().manual_seed(7)
    u = torch.randn(2, 3, columns, length, generator=g, dtype=torch.float64)
    start = torch.randn(2, 3, order, columns, generator=g, dtype=torch.float64)
    for initial in (None, start):
        found = state_ranks(one, u, initial=initial)
        assert found.stable.shape == found.effective.shape == (2, 3, length)
        for c in np.ndindex(2, 3):
            first = torch.zeros(order, columns).double() if initial is None else initial[c]
            expected = [ranks(S) for S in states(one[c], u[c].numpy(), first.numpy())]
            actual = torch.stack([found.stable[c], found.effective[c]], -1).numpy()
            np.testing.assert_allclose(actual, np.array(expected), rtol=1e-8, atol=1e-8)


def test_positions_come_in_the_order_that_was_asked_for() -> None:
    one = system("diagonal", (), 20, 4)
    u = torch.randn(3, 20, dtype=torch.float64)
    every = state_ranks(one, u)
    some = state_ranks(one, u, [11, 0, 4])
    assert torch.equal(some.stable, every.stable[[11, 0, 4]])
    single = state_ranks(one, u, 11)
    assert single.effective.shape == () and single.effective == every.effective[11]
    assert every.stable[0] == every.effective[0] == 0
    assert float(every.effective[1]) == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1.0, 1e30, 1e150])
def test_ranks_do_not_depend_on_the_size_of_the_state(scale: float) -> None:
    one = system("rank one", (2,), 15, 4)
    u = torch.randn(2, 3, 15, dtype=torch.float64)
    for plain, scaled in zip(state_ranks(one, u), state_ranks(one, u * scale), strict=True):
        torch.testing.assert_close(scaled, plain)


@pytest.mark.parametrize("cls", [GatedLinearAttention, GatedDeltaNet])
def test_the_states_are_those_of_a_mixer_that_generates(cls: Any) -> None:
    torch.manual_seed(0)
    mixer = cls(16, 2).double().eval()
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    steps, values, *_ = mixer.features(x, None, None)
    with torch.no_grad():
        found = state_ranks(TimeVarying(*steps.coefficients()), values.mT, [7, 11])
        recurrence = mixer.recurrence()
        for column, i in enumerate((7, 11)):
            state = recurrence.initial_state(1)
            for t in range(i):
                _, state = recurrence.step(x[:, t], state)
            for head in range(2):
                expected = ranks(state.memory[0, head].double().numpy())
                assert float(found.stable[0, head, column]) == pytest.approx(expected[0], rel=1e-4)
                assert float(found.effective[0, head, column]) == pytest.approx(
                    expected[1], rel=1e-4
                )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"system": DenseOperator(torch.ones(3, 3).tril())}, TypeError, "got DenseOperator"),
        ({"u": torch.randn(3, 4)}, ValueError, r"L = 5; got \(3, 4\)"),
        ({"u": torch.randn(2, 3, 5)}, ValueError, "inputs must be"),
        ({"u": torch.randn(3, 5) + 0j}, TypeError, "real"),
        ({"at": 5}, ValueError, "0 … 4"),
        ({"at": []}, ValueError, "at least one position"),
        ({"initial": torch.zeros(3, 2)}, ValueError, r"must be \(2, 3\)"),
        ({"u": torch.full((3, 5), torch.inf)}, ValueError, "position 1 is not finite"),
    ],
)
def test_what_does_not_fit_says_so(change: Any, error: Any, message: str) -> None:
    arguments = {"system": system("diagonal", (), 5, 2), "u": torch.randn(3, 5)} | change
    with pytest.raises(error, match=message):
        state_ranks(**arguments)
