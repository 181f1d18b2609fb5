"""The smallest recurrence of a matrix: what it computes, how large it is, how far it is off."""

import math

import pytest
import torch

from gramian import DenseOperator, TimeVarying, realize
from gramian.ess import hankel_singular_values, realization_errors
from gramian.ess._realize import _realized
from tests.ess.conftest import attention, make

MATRICES = ["attention", "sharp", "random", "smooth", "low_rank", "diagonal", "zero"]


def matrix(name: str, length: int) -> torch.Tensor:
    """(2, L, L)."""
    time = torch.arange(length, dtype=torch.float64)
    return {
        "attention": lambda: attention(2, length=length),
        "sharp": lambda: attention(2, length=length, sharpness=4.0),
        "random": lambda: torch.randn(2, length, length, dtype=torch.float64).tril(),
        "smooth": lambda: (1 / (1 + (time[:, None] - time).abs())).tril().expand(2, -1, -1),
        "low_rank": lambda: make("diagonal", length, order=3).matrix(),
        "diagonal": lambda: torch.eye(length, dtype=torch.float64).expand(2, -1, -1),
        "zero": lambda: torch.zeros(2, length, length, dtype=torch.float64),
    }[name]()


def norm(T: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_norm(T)


@pytest.mark.each
@pytest.mark.parametrize("length", [1, 2, 3, 63, 100])
@pytest.mark.parametrize("tol", [0.0, 1e-9, 1e-6, 1e-5, 1e-3, 0.1, 0.5])
@pytest.mark.parametrize("name", MATRICES)
def test_the_error_is_within_the_tolerance(name, tol, length):
    T = matrix(name, length)
    system = realize(T, tol)
    assert isinstance(system, TimeVarying) and system.channel_shape == (2,)
    assert system.dtype == torch.float64
    error = norm(system.matrix() - T)
    assert bool((error <= (tol * (1 + 1e-9) + 1e-13) * norm(T)).all())


@pytest.mark.each
@pytest.mark.parametrize("tol", [1e-8, 1e-3, 0.1, 0.4])
@pytest.mark.parametrize("name", ["attention", "sharp", "random", "smooth"])
def test_the_error_is_the_energy_that_was_dropped(name, tol):
    """‖T - T̂‖_F² = Σ_i Σ_dropped σ²: from the truncated blocks, recomputed from the recurrence."""
    T, length = matrix(name, 50)[0], 50
    A, B, C = _realized(T, tol)
    dropped, observe = 0.0, torch.zeros(length, 0, dtype=torch.float64)
    for i in range(length - 1):
        extended = torch.cat([observe[1:], T[i + 1 :, i : i + 1]], -1)
        old = observe.shape[-1]
        kept = torch.cat([A[i, :, :old], B[i].unsqueeze(-1)], -1)
        kept = kept[kept.norm(dim=-1) > 0.5]  # orthonormal rows, or rows of zeros
        torch.testing.assert_close(
            kept @ kept.mT, torch.eye(len(kept), dtype=torch.float64), rtol=0, atol=1e-12
        )
        observe = extended @ kept.mT
        dropped += float(extended.square().sum() - observe.square().sum())
    system = TimeVarying(A, B, C, T.diagonal())
    error = float(norm(system.matrix() - T)) ** 2
    scale = float(norm(T)) ** 2
    assert abs(error - dropped) <= 1e-12 * scale
    assert dropped <= (tol**2 * (1 + 1e-9) + 1e-12) * scale


@pytest.mark.parametrize("name", ["attention", "random", "low_rank"])
def test_without_truncation_the_state_is_minimal(name):
    T = matrix(name, 40)
    system = realize(T, 0.0)
    values = hankel_singular_values(T)
    ranks = (values > 1e-12 * values.amax()).sum(-1)
    used = torch.cat([system.A, system.B.unsqueeze(-1)], -1).norm(dim=-1) > 0.5  # (2, L, n)
    assert torch.equal(used.sum(-1)[:, :-1], ranks[:, 1:])  # step i makes the state before i + 1
    assert system.order == int(ranks.max())
    if name == "low_rank":
        assert system.order == 3


@pytest.mark.parametrize("name", MATRICES)
def test_errors_of_orders_are_those_of_the_recurrences(name):
    T = matrix(name, 40)
    orders = [0, 1, 2, 5, 13, 40]
    errors = realization_errors(T, orders)
    assert errors.shape == (2, len(orders)) and errors.dtype == torch.float64
    for column, order in enumerate(orders):
        system = realize(T, order=order)
        assert system.order <= order
        found = norm(system.matrix() - T) / norm(T).clamp_min(1e-300)
        torch.testing.assert_close(errors[:, column], found, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("name", ["attention", "sharp", "random", "smooth"])
def test_no_recurrence_of_an_order_is_better_than_the_hankel_blocks_allow(name):
    """A block of a recurrence of n states has rank n at most, so it misses what is beyond."""
    T = matrix(name, 30)
    for order in (1, 3, 8):
        tails = torch.stack(
            [torch.linalg.svdvals(T[:, i:, :i])[:, order:].norm(dim=-1) for i in range(1, 30)]
        )
        errors = realization_errors(T, [order])[:, 0] * norm(T)
        rounding = 1e-7 * norm(T)
        assert bool((errors >= tails.amax(0) - rounding).all())
        assert bool((errors <= tails.norm(dim=0) + rounding).all())


def test_the_recurrence_steps_and_contracts():
    T = matrix("attention", 64)
    system = realize(T, 0.05)
    assert system.order < 32
    u = torch.randn(2, 64, dtype=torch.float64)
    recurrence = system.recurrence()
    state, outputs = recurrence.initial_state((2,)), []
    for sample in u.unbind(-1):
        y, state = recurrence.step(sample, state)
        outputs.append(y)
    error = torch.stack(outputs, -1) - (T @ u.unsqueeze(-1)).squeeze(-1)
    assert bool((error.norm(dim=-1) <= 0.05 * norm(T) * u.norm(dim=-1)).all())
    together = torch.cat([system.A, system.B.unsqueeze(-1)], -1)
    assert float(torch.linalg.matrix_norm(together, ord=2).max()) <= 1 + 1e-12


def test_channels_shapes_and_precisions():
    T = attention(2, 3, length=20)
    for dtype, result in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        system = realize(T.to(dtype), 1e-2)
        assert system.dtype == result and system.channel_shape == (2, 3)
        given = T.to(dtype).double()
        assert bool((norm(system.matrix().double() - given) <= 0.0101 * norm(given)).all())
    assert realize(T[0, 0], 0.1).channel_shape == ()
    assert realize(T[:0], 0.1).channel_shape == (0, 3)
    same = realize(DenseOperator(T + torch.ones(20, 20).triu(1)), 0.1)
    torch.testing.assert_close(same.matrix(), realize(T, 0.1).matrix())
    assert realization_errors(T, [1, 2]).shape == (2, 3, 2)
    assert realization_errors(T[0, 0], []).shape == (0,)
    recurrent = make("delta", 20)
    smaller = realize(recurrent, 1e-9)
    torch.testing.assert_close(smaller.matrix(), recurrent.matrix(), rtol=0, atol=1e-7)


def test_bad_input_gets_one_sentence():
    spoiled = attention(3, length=5)
    spoiled[1, 3, 2] = math.nan
    for call, error, match in (
        (lambda: realize(spoiled, 0.1), ValueError, "channel 1 has NaN"),
        (lambda: realize(torch.eye(3), -1), ValueError, "tol must be at least 0"),
        (lambda: realize(torch.eye(3), math.nan), ValueError, "tol must be at least 0"),
        (lambda: realize(make("modal", 3), 0.1), TypeError, "realize takes matrices"),
        (lambda: realize(torch.ones(2, 3), 0.1), ValueError, "L, L"),
        (lambda: realize(torch.eye(3), order=-1), ValueError, "order must be at least 0"),
        (lambda: realization_errors(torch.eye(3), [2, -1]), ValueError, "at least 0; got -1"),
        (lambda: realization_errors([[1.0]], [1]), TypeError, "realization_errors takes matrices"),
    ):
        with pytest.raises(error, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)
