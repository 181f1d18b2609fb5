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


@pytest.mark.parametrize("length", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_covers_the_distance_from_singular_values(kind, length):
    torch.manual_seed(length)
    T = KINDS[kind](length).float()
    at = spread(length, 9)
    estimate, error = estimated_state_size(T, at, 0.02)
    for i, found, stated in zip(at, estimate.tolist(), error.tolist(), strict=True):
        exact = size_by_definition(T[i:, :i])
        # Two standard errors are exceeded once in twenty, by less than the same again.
        assert abs(found - exact) <= 2 * stated + 2e-4 * exact, (i, found, exact, stated)
        assert stated <= 0.02 * found
