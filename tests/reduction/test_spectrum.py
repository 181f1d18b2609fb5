"""Hankel spectra against dense factorisations."""

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import torch

from gramian.ops.hankel import Hankel
from gramian.reduction import hankel_singular_values
from gramian.reduction.spectrum import hankel_matrices, lanczos_spectrum, leading_spectrum


def dense_values(kernel, tail):
    taps = kernel[1:].numpy()
    if tail == "zero":
        matrix = scipy.linalg.hankel(taps)
    else:
        half = (len(taps) + 1) // 2
        matrix = scipy.linalg.hankel(taps[:half], taps[half - 1 :])
    return torch.from_numpy(scipy.linalg.svdvals(matrix))


@pytest.mark.parametrize("tail", ["zero", "free"])
@pytest.mark.parametrize("length", [2, 3, 4, 63, 258, 500, 501])
def test_leading_values_are_those_of_the_dense_matrix(smooth_kernel, tail, length):
    kernel = smooth_kernel(3, length)
    found = hankel_singular_values(kernel, 12, tail=tail)
    for mine, channel in zip(found, kernel, strict=True):
        if tail == "free" and length > 400 and length % 2:  # an even number of taps has no square
            channel = channel[:-1]
        exact = dense_values(channel, tail)[:12]
        assert len(mine) == len(exact)
        torch.testing.assert_close(mine, exact, atol=2e-3 * float(exact[-1]), rtol=1e-5)


@pytest.mark.parametrize("count", [5, 7, 21])
def test_kernels_of_low_order_end_the_iteration_early(count):
    """Six states are soon found: what is left of a vector after that is rounding, and no vector."""
    draw = np.random.default_rng(0)
    kernels = []
    for _ in range(256):
        some = draw.uniform(0.05, 0.9, 3) * np.exp(1j * np.pi * draw.random(3))
        denominator = np.poly(np.concatenate([some, some.conj()])).real
        numerator = draw.standard_normal(7)
        kernels.append(scipy.signal.lfilter(numerator, denominator, np.eye(1, 200)[0]))
    kernel = torch.from_numpy(np.stack(kernels)).float().double()
    found = hankel_singular_values(kernel, count)
    for mine, channel in zip(found, kernel, strict=True):
        exact = dense_values(channel, "zero")[:count]
        assert float((mine - exact).abs().max()) <= 3e-6 * float(exact[0])


@pytest.mark.parametrize("tail", ["zero", "free"])
def test_all_values(smooth_kernel, tail):
    kernel = smooth_kernel(2, 64)
    for mine, channel in zip(hankel_singular_values(kernel, tail=tail), kernel, strict=True):
        torch.testing.assert_close(mine, dense_values(channel, tail))


def test_values_of_any_batch_shape(smooth_kernel):
    kernel = smooth_kernel(6, 500)
    flat = hankel_singular_values(kernel, 5)
    assert hankel_singular_values(kernel[0], 5).shape == (5,)
    torch.testing.assert_close(
        hankel_singular_values(kernel.reshape(2, 3, 500), 5).reshape(6, 5), flat
    )


def test_vectors_are_orthonormal_singular_vectors(smooth_kernel):
    hankel = hankel_matrices(smooth_kernel(4, 700)[:, 1:], "zero")
    spectrum = leading_spectrum(hankel, 10)
    vectors = spectrum.vectors
    gram = vectors @ vectors.mT
    torch.testing.assert_close(gram, torch.eye(10, dtype=torch.float64).expand_as(gram))
    lengths = (hankel @ vectors).norm(dim=-1)
    torch.testing.assert_close(lengths, spectrum.values, rtol=1e-2, atol=0)


def test_lanczos_in_float64_reaches_far_down_a_steep_spectrum(random_system):
    kernel = random_system(3, 6).impulse_response(600)
    kernel = kernel + 1e-9 * torch.randn_like(kernel)
    hankel = hankel_matrices(kernel[:, 1:], "zero")
    found = leading_spectrum(hankel, 14).values
    exact = torch.linalg.svdvals(hankel.matrix())[:, :14]
    assert float(exact[:, -1].max()) < 1e-6 * float(exact[:, 0].min())
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=0)


def test_repeated_singular_values_are_found(dtype):
    # A single late tap: every singular value is 1, so each Krylov space ends after two steps.
    sequence = torch.zeros(1, 399, dtype=dtype)
    sequence[:, 199] = 1
    found = lanczos_spectrum(Hankel(sequence, 200, 200), 9).values
    torch.testing.assert_close(found, torch.ones_like(found), atol=1e-5, rtol=0)


def test_compressed_values_stay_below_the_true_ones(smooth_kernel):
    for noise in (0.0, 1e-4, 1.0):
        hankel = hankel_matrices(smooth_kernel(8, 400, noise)[:, 1:], "zero")
        ritz = leading_spectrum(hankel, 8).ritz
        exact = torch.linalg.svdvals(hankel.matrix())[:, : ritz.shape[-1]]
        assert bool((ritz <= exact + 1e-12 * exact[:, :1]).all())


def test_global_random_state_is_neither_read_nor_changed(smooth_kernel):
    kernel = smooth_kernel(2, 500)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = hankel_singular_values(kernel, 6)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(hankel_singular_values(kernel, 6), first)


def test_wrong_arguments_get_one_sentence():
    kernel = torch.randn(2, 20)
    with pytest.raises(TypeError, match="real floating point"):
        hankel_singular_values(kernel.long())
    for arguments, sentence in (
        ({"count": 0}, "count"),
        ({"tail": "auto"}, "'zero' or 'free'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            hankel_singular_values(kernel, **arguments)
    with pytest.raises(ValueError, match="at least 2 taps"):
        hankel_singular_values(kernel[:, :1])
    kernel[1, 3] = torch.nan
    with pytest.raises(ValueError, match=r"channel \(1,\) holds NaN"):
        hankel_singular_values(kernel)
