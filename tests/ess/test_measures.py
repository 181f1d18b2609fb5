"""Where a Gram matrix is trusted with the measure of a block."""

import pytest
import torch

from gramian.ess.dense import _TOLERANCE
from gramian.ess.measures import Measure


def _spectrum(kind: str, n: int) -> torch.Tensor:
    u = torch.rand(n, dtype=torch.float64)
    decades = -2 - 8 * float(torch.rand(()))
    if kind == "spread":
        return 10 ** (decades * u)
    if kind == "graded":
        return torch.logspace(0, decades, n, dtype=torch.float64)
    if kind == "few small":
        few = max(1, n // 8)
        return torch.cat([torch.ones(n - few, dtype=torch.float64), 10 ** (decades * u[:few])])
    if kind == "one large":
        return torch.cat([torch.ones(1, dtype=torch.float64), 10 ** (decades / 2 - 0.3 * u[1:])])
    return torch.where(torch.arange(n) < 2, u, 0)


@pytest.mark.parametrize("kind", ["spread", "graded", "few small", "one large", "deficient"])
def test_an_entropy_from_a_trusted_gram_matrix_is_as_exact_as_promised(kind):
    entropy, floor = Measure(), torch.zeros(1, dtype=torch.float64)
    trusted, wrong = [], 0
    for n in [2, 3, 5, 6, 7, 31, 63, 100] * 10:
        rows = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
        columns = torch.linalg.qr(torch.randn(n + 3, n, dtype=torch.float64))[0]
        block = (rows * _spectrum(kind, n)) @ columns.mT
        eigenvalues = torch.linalg.eigvalsh(block @ block.mT)
        exact = entropy(torch.linalg.svdvals(block)[None], floor)
        error = float(entropy(eigenvalues.clamp_min(0).sqrt()[None], floor) / exact - 1)
        padded = torch.nn.functional.pad(eigenvalues, (0, 4))[None]
        if entropy.unsafe_from_gram(padded, torch.tensor([n]), _TOLERANCE):
            wrong += abs(error) > 1e-6
        else:
            trusted.append(abs(error))
    assert not trusted or max(trusted) <= 1e-6
    if kind == "deficient":
        assert wrong > 10  # so the question is not idle
    else:
        assert len(trusted) > 10


def test_small_eigenvalues_without_a_negative_one_are_trusted():
    small = torch.logspace(-20, -16, 40, dtype=torch.float64)
    values = torch.cat([small, torch.ones(2, dtype=torch.float64)])[None]
    sizes = torch.tensor([42])
    assert not Measure().unsafe_from_gram(values, sizes, _TOLERANCE)
    for least in (-1e-20, -1e-16):
        negative = torch.cat([torch.full((1, 1), least, dtype=torch.float64), values[:, 1:]], -1)
        assert Measure().unsafe_from_gram(negative, sizes, _TOLERANCE)
