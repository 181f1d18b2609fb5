"""Reductions beside Kung's method from a dense singular value decomposition, with numpy alone."""

import itertools

import numpy as np
import pytest
import torch

from gramian import reduce
from gramian.reduction import Balanced
from gramian.reduction.residues import fit_residues
from tests.reduction.test_inequalities import kernels

ROUNDING = 64 * np.finfo(float).eps


def dense_svd(kernel, tail):
    """Left singular vectors and singular values of the Hankel matrix of the taps."""
    taps = kernel[1:]
    if tail == "zero":
        padded, width = np.concatenate([taps, np.zeros(len(taps) - 1)]), len(taps)
    else:
        padded, width = taps, len(taps) // 2 + 1
    hankel = np.lib.stride_tricks.sliding_window_view(padded, width)
    return np.linalg.svd(hankel, full_matrices=False)[:2]


def dense_kung(kernel, left, values, order, dtype):
    """Kung's method from a dense SVD: ‖h - ĥ‖₂ over the taps, poles and residues rounded to
    ``dtype``, with what rounding makes of it; and whether the truncation is unique, so that two
    SVDs agree on it.
    """
    taps = kernel[1:]
    rank = int((values > len(values) * np.finfo(float).eps * values[0]).sum())
    if rank == 0:
        return np.linalg.norm(taps), True
    order = min(order, rank, left.shape[0] - 1)
    unique = order == rank or values[order] < 0.98 * values[order - 1]
    span = left[:, :order]
    poles = np.linalg.eigvals(np.linalg.lstsq(span[:-1], span[1:], rcond=None)[0])
    radius = np.maximum(np.abs(poles), 1e-300)
    poles = np.where(radius > 1, poles / np.maximum(radius, 1) ** 2, poles)
    largest = 1 - max(1.5 * np.finfo(dtype).eps, 1e-9)
    poles = poles * np.minimum(1, largest / np.maximum(np.abs(poles), 1e-300))
    poles = poles.astype(np.result_type(dtype, np.complex64)).astype(complex)
    poles = poles[poles.imag >= 0]
    powers = poles[:, None] ** np.arange(len(taps))
    basis = np.concatenate([powers.real, powers[poles.imag > 0].imag]).T
    basis = basis / np.maximum(np.linalg.norm(basis, axis=0), 1e-300)
    weights = np.linalg.lstsq(basis, taps, rcond=8 * np.finfo(dtype).eps)[0]
    error = np.linalg.norm(taps - basis @ weights.astype(dtype).astype(float))
    rounding = max(ROUNDING, 4 * np.finfo(dtype).eps) * np.linalg.norm(weights)
    return error + rounding, unique


def check_against_dense_kung(families, length, dtype, count, orders, refine):
    """The error is at most 1.01 of that of Kung's method, beside what rounding makes of it."""
    draw = np.random.default_rng(6)
    kernel = torch.cat([kernels(make, count, length, draw) for make in families.values()]).to(dtype)
    rounding = 1e-8 if dtype == torch.float64 else 1e-6
    compared = 0
    rows = kernel.double().numpy()
    spectra = {tail: [dense_svd(each, tail) for each in rows] for tail in ("zero", "free")}
    for tail, order in itertools.product(spectra, orders):
        error = reduce(kernel, order, tail=tail, method=Balanced(refine=refine)).relative_error
        for k, each in enumerate(rows):
            numpy_dtype = torch.empty(0, dtype=dtype).numpy().dtype
            dense, unique = dense_kung(each, *spectra[tail][k], order, numpy_dtype)
            if unique:
                compared += 1
                assert float(error[k]) * np.linalg.norm(each) <= 1.01 * dense + rounding * (
                    np.linalg.norm(each)
                ), (tail, order, list(families)[k // count])
    assert compared > len(kernel) * len(orders)


@pytest.mark.each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("length", "orders"), [(21, (1, 3, 6, 9)), (200, (2, 5, 8, 16))])
def test_closed_forms_are_as_close_as_dense_ones(families, length, orders, dtype):
    check_against_dense_kung(families, length, dtype, 1, orders, refine=False)


@pytest.mark.slow
@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("length", [63, 400])
def test_reductions_are_as_close_as_dense_ones(families, length, dtype, refine):
    check_against_dense_kung(families, length, dtype, 2, (1, 2, 3, 4, 6, 9, 12, 16, 24, 32), refine)


@pytest.mark.parametrize("length", [20, 63, 400])
def test_residues_of_poles_that_nearly_coincide_are_the_best(length):
    """Normal equations of such poles have a smallest eigenvalue far below their pivots."""
    draw = np.random.default_rng(7)
    time = np.arange(length)
    for case in range(60):
        pairs, radius = 1 + case % 3, draw.uniform(0.5, 0.97)
        kernel = time ** draw.integers(1, 4) * radius**time
        kernel = kernel / np.linalg.norm(kernel)
        spread = 10 ** draw.uniform(-4, -2) * np.exp(1j * np.pi * draw.random(pairs))
        poles = np.concatenate([radius + spread, 0.7 * np.exp(1j * draw.uniform(0, 3, 2))])
        both = torch.from_numpy(np.concatenate([poles, poles.conj()]))
        powers = poles[:, None] ** time
        basis = np.concatenate([powers.real, powers.imag]).T
        basis = basis / np.linalg.norm(basis, axis=0)
        weights = np.linalg.lstsq(basis, kernel, rcond=1e-13)[0]
        least = np.linalg.norm(kernel - basis @ weights)
        fit = fit_residues(torch.from_numpy(kernel)[None], both[None], torch.float64)
        rounding = 1e-8 + 16 * ROUNDING * np.linalg.norm(weights)
        assert float(fit.l2_error) <= 1.1 * least + rounding


@pytest.mark.each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("length", [20, 63, 400])
def test_double_poles_are_reached(length, dtype):
    """A conjugate pair close to the real axis holds `(a + b t) λ^t` without cancellation."""
    time = torch.arange(length, dtype=torch.float64)
    radius = torch.tensor([-0.9, -0.3, 0.2, 0.5, 0.77, 0.93]).double().unsqueeze(-1)
    kernel = ((1 + 0.3 * time) * radius**time).to(dtype)
    found = reduce(kernel, 2, method=Balanced(refine=False))
    assert float(found.relative_error.max()) <= (2e-6 if dtype == torch.float32 else 1e-10)
