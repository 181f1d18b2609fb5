"""Where a Gram matrix is trusted with the measure of a block."""

import pytest
import torch

from gramian import FIR, Modal, effective_state_size
from gramian.ess.dense import _TOLERANCE
from gramian.ess.measures import Measure
from gramian.systems import gated_convolution


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


def _planted(length: int, at: int, values: list[float]) -> torch.Tensor:
    """A lower triangular matrix whose block at one position has these singular values."""
    rows = torch.linalg.qr(torch.randn(length - at, len(values), dtype=torch.float64))[0]
    columns = torch.linalg.qr(torch.randn(at, len(values), dtype=torch.float64))[0]
    T = torch.zeros(length, length, dtype=torch.float64)
    T[at:, :at] = rows * torch.tensor(values, dtype=torch.float64) @ columns.mT
    return T


@pytest.mark.each
@pytest.mark.parametrize(
    ("length", "rank"),
    [(n, rank) for n in (2, 3, 12, 40, 130) for rank in (1, 2, 6, 20) if rank <= n // 2],
)
def test_counts_are_exact_down_to_rounding_errors(rank, length):
    torch.manual_seed(0)
    for decades in (0, 3, 11):
        values = [10 ** (-decades * j / max(rank - 1, 1)) for j in range(rank)]
        T = 1e-3 * _planted(length, length // 2, values)
        for rtol in (1e-2, 1e-5, 1e-7, 3e-8, 1e-8, 3e-9, 1e-10, 1e-12, 1e-13):
            if min(abs(value - rtol) for value in values) < 1e-13:
                continue
            expected = sum(value > rtol for value in values)
            for tolerance in ({"rtol": rtol}, {"tol": 1e-3 * rtol}):
                size = effective_state_size(T, length // 2, measure="tolerance", **tolerance)
                assert float(size) == expected, (decades, tolerance)


@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 3e-8, 1e-8, 1e-10, 1e-13])
def test_blocks_of_rank_one_count_one(rtol):
    ones = torch.ones(200, 200, dtype=torch.float64).tril()
    fading = 0.9 ** torch.arange(200, dtype=torch.float64)
    gate = torch.rand(1, 200, dtype=torch.float64) + 0.1
    mode = torch.tensor([[0.9 + 0j]], dtype=torch.complex128)
    modal = Modal(mode, mode, torch.zeros(1, dtype=torch.float64))
    for operator in (
        ones,
        torch.rand(200, 1, dtype=torch.float64) * ones * torch.rand(200, dtype=torch.float64),
        (fading.unsqueeze(-1) / fading).tril(),
        FIR(ones[-1]),
        FIR(0.9 ** torch.arange(400, dtype=torch.float64)),
        modal,
        gated_convolution(modal, gate, gate),
    ):
        sizes = effective_state_size(
            operator, [1, 2, 3, 99, 150, 199], horizon=200, measure="tolerance", rtol=rtol
        )
        assert bool((sizes == 1).all()), type(operator)
