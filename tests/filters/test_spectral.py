"""Spectral filters, against eigenvectors in 60 digits and sums over taps."""

from __future__ import annotations

import pytest
import torch

import gramian
from gramian.filters import SpectralFilter
from gramian.filters.spectral import spectral_basis
from gramian.mixers import LongConvolution
from gramian.testing import check_mixer

mpmath = pytest.importorskip("mpmath")


def eigenpairs(size: int) -> tuple[list[float], torch.Tensor]:
    """Eigenvalues and eigenvectors (size, size) of Z in 60 digits, the largest first."""
    with mpmath.workdps(60):
        matrix = mpmath.matrix(size, size)
        for i in range(1, size + 1):
            for j in range(1, size + 1):
                matrix[i - 1, j - 1] = mpmath.mpf(2) / ((i + j) ** 3 - (i + j))
        values, columns = mpmath.eigsy(matrix)
        order = sorted(range(size), key=lambda k: -values[k])
        rows = [[float(columns[i, k]) for i in range(size)] for k in order]
    vectors = torch.tensor(rows, dtype=torch.float64)
    return [float(values[k]) for k in order], vectors * vectors[:, :1].sign()


@pytest.mark.parametrize("size", [1, 2, 3, 30])
def test_eigenvectors_are_those_of_the_hankel_matrix(size: int) -> None:
    values, vectors = eigenpairs(size)
    found, basis = spectral_basis(size, min(size, 24))
    for k in range(len(found)):
        accuracy = 1e-14 + 4e-16 * (values[0] / values[k]) ** 0.5
        if accuracy < 1e-3:  # σ_k ≥ 1e-25 σ_1
            assert float(found[k]) == pytest.approx(values[k], rel=4 * accuracy)
            assert float((basis[k] - vectors[k]).norm()) < accuracy


def test_eigenvectors_of_a_long_filter_satisfy_their_equation() -> None:
    size = 700
    values, vectors = spectral_basis(size, 24)
    total = torch.arange(1, size + 1, dtype=torch.float64)
    total = total + total.unsqueeze(-1)
    image = vectors @ (2 / (total**3 - total))
    torch.testing.assert_close(image, values.unsqueeze(-1) * vectors, rtol=0, atol=1e-15)
    gram = vectors @ vectors.mT
    torch.testing.assert_close(gram, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.each
@pytest.mark.parametrize("length", [1, 2, 3, 30])
@pytest.mark.parametrize("alternating", [True, False])
def test_taps_are_the_published_sum(length: int, alternating: bool) -> None:
    filter = SpectralFilter(3, 30, filters=5, alternating=alternating).double()
    values, vectors = eigenpairs(30)
    expected = torch.zeros(3, length, dtype=torch.float64)
    for channel in range(3):
        for t in range(length):
            for k in range(5):
                factor = filter.positive[channel, k].item()
                if filter.negative is not None:
                    factor += (-1) ** t * filter.negative[channel, k].item()
                expected[channel, t] += values[k] ** 0.25 * vectors[k, t] * factor
    expected[:, 0] += filter.bias.detach()
    taps = filter(length).impulse_response(length).detach()
    torch.testing.assert_close(taps, expected, rtol=0, atol=2e-7)


def test_alternating_filters_reach_what_others_do_not() -> None:
    alternating, plain = SpectralFilter(1, 64), SpectralFilter(1, 64, alternating=False)
    target = (-0.9) ** torch.arange(64.0)
    errors = []
    for filter in (alternating, plain):
        basis = filter.basis.double()
        if filter.negative is not None:
            basis = torch.cat([basis, basis * (-1) ** torch.arange(64)])
        fit = torch.linalg.lstsq(basis.mT, target.double().unsqueeze(-1)).solution
        errors.append(float((basis.mT @ fit - target.unsqueeze(-1)).norm() / target.norm()))
    assert errors[0] < 1e-5 < 0.1 < errors[1]


def test_a_layer_with_spectral_filters_is_distilled_by_reduce() -> None:
    torch.manual_seed(0)
    layer = LongConvolution({"type": "spectral"}, width=4, max_length=256)
    kernel = layer.filter(256).impulse_response(256).detach()
    reduction = gramian.reduce(kernel, tol=1e-3)
    fitted = reduction.system.impulse_response(256)
    errors = (fitted - kernel).norm(dim=-1) / kernel.norm(dim=-1)
    assert float(errors.max()) < 1.01e-3 and int(reduction.order.max()) < 60


def test_a_layer_with_spectral_filters_keeps_the_contract_of_mixers() -> None:
    check_mixer(LongConvolution({"type": "spectral", "filters": 4}, width=4, max_length=40))


def test_sizes_that_do_not_fit_are_cut_or_refused() -> None:
    assert SpectralFilter(2, 8, filters=9).filters == 8
    with pytest.raises(ValueError, match="filters"):
        SpectralFilter(2, 8, filters=0)
    with pytest.raises(ValueError, match="lr must be"):
        SpectralFilter(2, 8, lr=-1.0)
