"""Estimates of the mean entropy-ESS against the singular values of the blocks."""

import itertools
import math

import pytest
import torch

from gramian.ess import (
    RowOperator,
    averages,
    effective_state_size,
    estimated_mean_state_size,
)
from gramian.systems import DenseOperator
from tests.ess.test_estimated_state_size import (
    KINDS,
    SIZES,
    size_by_definition,
    softmax_map,
    spread,
)


def heads(length, count):
    """Return maps of attention that differ in sharpness, with and without a sink."""
    torch.manual_seed(length)
    return torch.stack(
        [softmax_map(length, 1 + k / 2, 6.0 * (k % 2)) for k in range(count)]
    ).float()


@pytest.mark.each
@pytest.mark.parametrize("length", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_cover_the_distance_from_singular_values(kind, length):
    torch.manual_seed(length)
    T = KINDS[kind](length).float()
    at = spread(length, 4)
    if not at:
        return
    found = estimated_mean_state_size(T, at, 0.02)
    exact = torch.tensor([size_by_definition(T[i:, :i]) for i in at]).double()
    assert found.mean == pytest.approx(float(found.sizes.double().mean()), rel=1e-6)
    assert abs(found.mean - float(exact.mean())) <= 2 * found.error + 2e-4 * found.mean
    away = (found.sizes - exact).abs()
    assert bool((away <= 2 * found.errors + 2e-4 * exact).all()), (away, found.errors)


def test_the_mean_of_a_sample_has_the_error_that_it_states(monkeypatch):
    """With a sample of a few blocks, the regression carries the estimate."""
    monkeypatch.setattr(averages, "_SAMPLE", 12)
    monkeypatch.setattr(averages, "_ROUNDS", 1)
    T, at = heads(500, 3), list(range(140, 370, 20))
    exact = effective_state_size(T.double(), at)
    ratios, covered = [], []
    for seed in range(4):
        found = estimated_mean_state_size(T, at, 0.01, seed=seed)
        assert found.accurate == 12
        assert found.error > 0 and bool((found.errors > 0).all())
        ratios.append(abs(found.mean - float(exact.mean())) / found.error)
        covered.append((found.sizes - exact).abs() <= found.errors)
    assert sum(ratio <= 1 for ratio in ratios) >= 3 and max(ratios) <= 2
    assert float(torch.stack(covered).double().mean()) >= 0.9


def test_the_sample_grows_until_the_error_is_within_the_tolerance(monkeypatch):
    monkeypatch.setattr(averages, "_SAMPLE", 12)
    T, at = heads(500, 3), list(range(140, 370, 20))
    coarse, fine = (estimated_mean_state_size(T, at, tolerance) for tolerance in (0.2, 0.006))
    assert coarse.accurate == 12 < fine.accurate
    assert fine.error < coarse.error <= 0.2 * coarse.mean
    assert fine.error <= 0.006 * fine.mean


def test_the_sample_corrects_the_bias_of_rough_estimates(monkeypatch):
    """Rough estimates that are twice as large give the same mean."""
    T, at = heads(400, 2), list(range(140, 270, 10))
    monkeypatch.setattr(averages, "_SAMPLE", 10)
    before = estimated_mean_state_size(T, at, 0.05)
    rough = averages._rough

    def doubled(*arguments):
        sizes, ratios = rough(*arguments)
        return 2 * sizes, ratios

    monkeypatch.setattr(averages, "_rough", doubled)
    after = estimated_mean_state_size(T, at, 0.05)
    torch.testing.assert_close(after.sizes, before.sizes, rtol=1e-5, atol=0)
    assert after.error == pytest.approx(before.error, rel=1e-4)


def test_rows_matrices_and_operators_give_the_same_means():
    T, at = heads(600, 2).reshape(2, 1, 600, 600), [300, 10, 0, 250]
    found = estimated_mean_state_size(T, at, 0.05)
    assert found.sizes.shape == found.errors.shape == (2, 1, 4)
    assert float(found.sizes[..., 2].abs().max()) == float(found.errors[..., 2].abs().max()) == 0
    assert float(found.errors[..., 1].abs().max()) == 0  # a side of 10 is measured exactly
    assert found.mean == pytest.approx(float(found.sizes.double().mean()), rel=1e-6)
    flat = T.reshape(2, 600, 600)
    for other in (
        estimated_mean_state_size(DenseOperator(T), at, 0.05),
        estimated_mean_state_size(RowOperator(lambda c, r: flat[c, r], 600, 2), at, 0.05, memory=0),
    ):
        torch.testing.assert_close(other.sizes.reshape(2, 1, 4), found.sizes)
        torch.testing.assert_close(other.errors.reshape(2, 1, 4), found.errors)
        assert (other.mean, other.error) == pytest.approx((found.mean, found.error))
    assert not torch.equal(estimated_mean_state_size(T, at, 0.05, seed=1).sizes, found.sizes)
    assert estimated_mean_state_size(T, 300, 0.05).sizes.shape == (2, 1)


def test_rows_are_asked_for_in_order_and_let_go():
    T, asked = heads(600, 1)[0], []

    def rows(channel, where):
        asked.append((where.start, where.stop))
        return T[where]

    estimated_mean_state_size(RowOperator(rows, 600), [200, 300], 0.05)
    assert asked == [(0, 512), (512, 600)]


@pytest.mark.parametrize("factor", [1e-41, 1e-30, 1e30, 1e60])
def test_means_do_not_depend_on_the_scale_of_the_operator(factor):
    torch.manual_seed(2)
    matrix = torch.randn(400, 400, dtype=torch.float64).tril()
    found = estimated_mean_state_size(factor * matrix, [40, 190], 0.05)
    exact = [size_by_definition(matrix[i:, :i]) for i in (40, 190)]
    assert abs(found.mean - sum(exact) / 2) <= 2 * found.error + 1e-6 * found.mean


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda T: estimated_mean_state_size([1.0]), TypeError, "RowOperator"),
        (lambda T: estimated_mean_state_size(T, tolerance=0), ValueError, "tolerance must"),
        (lambda T: estimated_mean_state_size(T, memory=-1), ValueError, "memory must"),
        (lambda T: estimated_mean_state_size(T, [9]), ValueError, "positions must"),
        (lambda T: estimated_mean_state_size(T, [2, 2]), ValueError, "must not repeat"),
        (lambda T: estimated_mean_state_size(T, []), ValueError, "a channel and a position"),
        (lambda T: estimated_mean_state_size(T[None][:0]), ValueError, "a channel and a position"),
        (lambda T: estimated_mean_state_size(T / 0), ValueError, "NaN"),
        (
            lambda T: estimated_mean_state_size(RowOperator(lambda c, r: T[r] / 0, 5)),
            ValueError,
            "channel 0: an operator to be measured must be finite",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.ones(5, 5))


@pytest.mark.slow
def test_one_mean_in_twenty_is_beyond_its_error():
    within = []
    for length, count, seed in itertools.product((600, 900), (2, 5), range(8)):
        T, at = heads(length, count), list(range(140, length - 140, 16))
        exact = float(effective_state_size(T.double(), at).mean())
        found = estimated_mean_state_size(T, at, 0.01, seed=seed)
        within.append(abs(found.mean - exact) <= found.error)
        assert math.isfinite(found.error)
    assert sum(within) >= 0.9 * len(within)
