"""Estimates of entropy-ESS from products against the singular values of the blocks."""

import math

import numpy as np
import pytest
import torch

from gramian.ess import (
    RowOperator,
    effective_state_size,
    estimated_state_size,
    quadrature,
)
from gramian.ess.rows import Blocks
from gramian.systems import DenseOperator

SIZES = (1, 2, 3, 63, 257, 1000)


def softmax_map(length, sharpness, sink, window=None):
    queries, keys = torch.randn(2, length, 32, dtype=torch.float64)
    scores = sharpness * queries @ keys.mT / 32**0.5
    scores[:, 0] += sink
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)
    if window is not None:
        mask |= torch.ones(length, length, dtype=torch.bool).tril(-window)
    return scores.masked_fill(mask, -math.inf).softmax(-1)


def decaying(length):
    lag = torch.arange(length, dtype=torch.float64)
    return (0.97 ** (lag[:, None] - lag)).tril() * (torch.randn(length, length) / 8).double().exp()


KINDS = {
    "flat": lambda n: torch.randn(n, n, dtype=torch.float64).tril(),
    "attention": lambda n: softmax_map(n, 2.0, 0.0),
    "attention with a sink": lambda n: softmax_map(n, 1.5, 7.0),
    "attention in a window": lambda n: softmax_map(n, 2.0, 0.0, window=50),
    "decaying": decaying,
    "one rank and noise": lambda n: torch.ones(n, n).tril().double() + 1e-3 * torch.randn(n, n),
    "one rank": lambda n: torch.ones(n, n, dtype=torch.float64).tril(),
    "banded": lambda n: torch.randn(n, n, dtype=torch.float64).tril().triu(-7),
    "near the identity": lambda n: torch.eye(n).double() + 1e-4 * torch.randn(n, n).tril(),
    "heavy tails": lambda n: torch.from_numpy(np.random.default_rng(n).standard_cauchy((n, n))),
    "falling by a power": lambda n: falling(n),
    "zero": lambda n: torch.zeros(n, n, dtype=torch.float64),
}


def falling(n):
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for _ in range(2))
    return (left * torch.arange(1, n + 1) ** -1.5) @ right


def size_by_definition(block):
    values = np.linalg.svd(np.asarray(block, dtype=np.float64), compute_uv=False)
    p = values[values > 0] / values.sum() if values.sum() > 0 else values[:0]
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0


def spread(length, count):
    return sorted({round((k + 0.5) * length / count) for k in range(count)} - {length})


@pytest.mark.each
@pytest.mark.parametrize("length", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_covers_the_distance_from_singular_values(kind, length):
    torch.manual_seed(length)
    T = KINDS[kind](length).float()
    at = spread(length, 4)
    estimate, error = estimated_state_size(T, at, 0.02)
    for i, found, stated in zip(at, estimate.tolist(), error.tolist(), strict=True):
        exact = size_by_definition(T[i:, :i])
        # Two standard errors are exceeded once in twenty, by less than the same again.
        assert abs(found - exact) <= 2 * stated + 2e-4 * exact, (i, found, exact, stated)
        assert stated <= 0.02 * found


@pytest.mark.slow
def test_one_estimate_in_twenty_is_beyond_its_error():
    torch.manual_seed(0)
    beyond, count = 0, 0
    for kind in ("attention", "attention with a sink", "falling by a power", "decaying"):
        T = KINDS[kind](1000).float()
        at = [400, 500, 640]
        exact = effective_state_size(T, at)
        for seed in range(20):
            estimate, error = estimated_state_size(T, at, 0.01, seed=seed)
            beyond += int(((estimate - exact).abs() > error).sum())
            count += len(at)
    assert beyond <= 0.1 * count


@pytest.mark.parametrize("memory", [0, 2**30])
@pytest.mark.parametrize("positions", [[1], [5, 63, 64, 300], [512, 513, 699], [699]])
def test_products_are_those_of_the_blocks(memory, positions):
    T, length = torch.randn(700, 700).tril(), 700
    asked = []

    def rows(where):
        asked.append(where)
        return T[where]

    blocks = Blocks(rows, length, positions, T.device, memory)
    energies, total = blocks.energies()
    assert float(total) == pytest.approx(float(T.double().square().sum()))
    Z = torch.randn(len(positions), 3, length)
    on_small, on_large = Z.clone(), Z.clone()
    for p in range(len(positions)):
        on_small[p, :, blocks.large(p)] = 0
        on_large[p, :, blocks.small(p)] = 0
    large, back = blocks.to_large(on_small), blocks.to_small(on_large)
    for p, i in enumerate(positions):
        block = T[i:, :i]
        assert float(energies[p]) == pytest.approx(float(block.double().square().sum()))
        assert blocks.matrix(p).shape == (max(i, length - i), min(i, length - i))
        down, up = (large, back) if i <= length - i else (back, large)
        expected = torch.zeros(2, 3, length)
        expected[0, :, i:] = Z[p, :, :i] @ block.mT
        expected[1, :, :i] = Z[p, :, i:] @ block
        torch.testing.assert_close(down[p], expected[0], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(up[p], expected[1], rtol=1e-4, atol=1e-3)
    if memory:
        assert len(asked) == 2


def test_rows_matrices_and_operators_give_the_same_estimates():
    T = softmax_map(800, 2.0, 0.0).float().expand(2, 3, 800, 800).clone()
    T[1, 2] = softmax_map(800, 1.0, 5.0).float()
    at = [400, 10, 0, 500]
    estimate, error = estimated_state_size(T, at, 0.05)
    assert estimate.shape == error.shape == (2, 3, 4)
    assert float(estimate[..., 2].abs().max()) == float(error[..., 2].abs().max()) == 0
    again = estimated_state_size(DenseOperator(T), at, 0.05)
    flat = T.reshape(6, 800, 800)
    by_rows = estimated_state_size(RowOperator(lambda c, r: flat[c, r], 800, 6), at, 0.05, memory=0)
    for other in (again, by_rows):
        torch.testing.assert_close(other[0].reshape(2, 3, 4), estimate)
        torch.testing.assert_close(other[1].reshape(2, 3, 4), error)
    assert estimated_state_size(T, 400, 0.05)[0].shape == (2, 3)
    other, _ = estimated_state_size(T, at, 0.05, seed=1)
    assert not torch.equal(other, estimate)


def test_blocks_that_are_small_enough_are_exact():
    T = softmax_map(600, 2.0, 3.0)
    estimate, error = estimated_state_size(T, [20, 300, 320, 580], 0.1, horizon=590)
    exact = effective_state_size(T, [20, 300, 320, 580], horizon=590)
    torch.testing.assert_close(estimate, exact, rtol=1e-6, atol=0)
    assert float(error.abs().max()) == 0


def test_a_smaller_tolerance_gives_a_smaller_error():
    T = softmax_map(900, 2.0, 0.0).float()
    errors = [float(estimated_state_size(T, 450, tolerance)[1]) for tolerance in (0.2, 0.02, 0.005)]
    assert errors[0] > errors[1] > errors[2] > 0


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda T: estimated_state_size([1.0]), TypeError, "RowOperator"),
        (lambda T: estimated_state_size(T, tolerance=0), ValueError, "tolerance must"),
        (lambda T: estimated_state_size(T, tolerance=1.0), ValueError, "tolerance must"),
        (lambda T: estimated_state_size(T, memory=-1), ValueError, "memory must"),
        (lambda T: estimated_state_size(T, [9]), ValueError, "positions must"),
        (lambda T: estimated_state_size(T / 0), ValueError, "NaN"),
        (lambda T: RowOperator(lambda c, r: T[r], 0), ValueError, "length and channels"),
        (
            lambda T: estimated_state_size(RowOperator(lambda c, r: T[r] / 0, 5)),
            ValueError,
            "channel 0: an operator to be measured must be finite",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.ones(5, 5))


def test_noise_of_rounding_is_not_deflated(monkeypatch):
    """A Krylov space that is larger than the rank holds nothing but the range."""
    monkeypatch.setattr(quadrature, "_EXACT", 10)
    T = (torch.randn(500, 3) @ torch.randn(3, 500)).tril()
    estimate, error = estimated_state_size(T, [250], 0.01)
    exact = effective_state_size(T, [250])
    assert abs(float(estimate - exact)) <= float(error) + 1e-3 * float(exact)


@pytest.mark.parametrize("factor", [1e-41, 1e-30, 1e30, 1e60])
def test_sizes_do_not_depend_on_the_scale_of_the_operator(factor):
    torch.manual_seed(2)
    matrix = torch.randn(700, 700, dtype=torch.float64).tril()
    size, error = estimated_state_size(factor * matrix, [0, 40, 345], 0.05)
    for k, i in enumerate((0, 40, 345)):
        true = size_by_definition(matrix[i:, :i]) if i else 0.0
        assert abs(float(size[k]) - true) <= 3 * float(error[k]) + 1e-6 * true


def test_large_values_that_are_not_finite_are_refused():
    matrix = torch.full((700, 700), 1e30, dtype=torch.float64)
    matrix[600, 3] = math.inf
    with pytest.raises(ValueError, match="must be finite"):
        estimated_state_size(RowOperator(lambda channel, rows: matrix[rows], 700), [350])


def test_the_error_holds_for_singular_values_that_are_spread_evenly():
    estimates, n = [], 400
    for seed in range(8):
        values = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        matrix = torch.zeros(2 * n, 2 * n, dtype=torch.float64)
        matrix[n:, :n] = values.diag()
        size, error = estimated_state_size(matrix, [n], 0.01, seed=seed)
        true = size_by_definition(matrix[n:, :n])
        estimates.append(abs(float(size[0]) - true) / float(error[0]))
    assert sum(estimate <= 1 for estimate in estimates) >= 7
    assert max(estimates) <= 1.5
