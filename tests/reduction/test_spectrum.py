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


def test_kernels_of_low_order_end_the_iteration_early():
    """Six states are soon found: what is left of a vector after that is rounding, and no vector."""
    draw = np.random.default_rng(0)
    kernels = []
    for _ in range(64):
        some = draw.uniform(0.05, 0.9, 3) * np.exp(1j * np.pi * draw.random(3))
        denominator = np.poly(np.concatenate([some, some.conj()])).real
        numerator = draw.standard_normal(7)
        kernels.append(scipy.signal.lfilter(numerator, denominator, np.eye(1, 200)[0]))
    kernel = torch.from_numpy(np.stack(kernels)).float().double()
    exact = torch.stack([dense_values(channel, "zero") for channel in kernel])
    for count in (5, 7, 21):
        off = (hankel_singular_values(kernel, count) - exact[:, :count]).abs().amax(-1)
        assert bool((off <= 3e-6 * exact[:, 0]).all()), count


def exact_spectrum(matrix):
    """Singular values, descending, of a stack of dense matrices."""
    return torch.from_numpy(np.linalg.svd(matrix.numpy(), compute_uv=False))


def check_spectrum(spectrum, hankel, exact):
    """Values, vectors and bounds beside those of the dense matrices, relative to each value; what
    lies below a millionth of the largest value is compared with that.
    """
    values, vectors = spectrum.values, spectrum.vectors
    count = values.shape[-1]
    size = exact[:, :count] + 1e-6 * exact[:, :1]
    assert bool(((values - exact[:, :count]).abs() <= 2e-2 * size).all())
    unit = torch.eye(count, dtype=torch.float64)
    assert float((vectors @ vectors.mT - unit).abs().max()) <= 1e-12
    # Left singular vectors: Hᵀ u has the length σ, and H Hᵀ u is σ² u as far as that was asked.
    image = vectors @ hankel.matrix()
    assert bool(((image.norm(dim=-1) - values).abs() <= 1e-2 * size).all())
    back = image @ hankel.matrix().mT - values.square().unsqueeze(-1) * vectors
    smallest = values[:, -1:] + 1e-5 * values[:, :1]
    assert bool((back.norm(dim=-1) <= 3e-2 * values[:, :1] * smallest).all())
    ritz = spectrum.ritz
    assert bool((ritz <= exact[:, : ritz.shape[-1]] + 1e-12 * exact[:, :1]).all())


def check_families(families, channels, lengths, seed):
    draw = np.random.default_rng(seed)
    total = 0
    for name, make in families.items():
        for length in lengths:
            kernel = torch.from_numpy(np.stack([make(draw, length) for _ in range(channels)]))
            kernel[channels // 2 :] = kernel[channels // 2 :].float().double()
            for tail in ("zero", "free"):
                hankel = hankel_matrices(kernel[:, 1:], tail)
                exact = exact_spectrum(hankel.matrix())
                for count in (1, 3, 9, 21):
                    try:
                        check_spectrum(leading_spectrum(hankel, count), hankel, exact)
                    except AssertionError as error:
                        where = f"{name}, {length} taps, tail {tail}, {count} values: {error}"
                        raise AssertionError(where) from error
            total += channels
    return total


def test_spectra_of_every_family(families):
    check_families(families, channels=1, lengths=[163, 200], seed=0)


@pytest.mark.slow
def test_spectra_of_ten_thousand_kernels(families):
    lengths = [163, 200, 258, 359, 402]
    assert check_families(families, channels=84, lengths=lengths, seed=1) >= 10_000


def test_a_channel_does_not_depend_on_its_batch(families):
    draw = np.random.default_rng(2)
    kernel = np.stack([make(draw, 420) for make in families.values() for _ in range(2)])
    together = leading_spectrum(hankel_matrices(torch.from_numpy(kernel)[:, 1:], "zero"), 12)
    for row in range(len(kernel)):
        hankel = hankel_matrices(torch.from_numpy(kernel)[row : row + 1, 1:], "zero")
        alone = leading_spectrum(hankel, 12)
        torch.testing.assert_close(
            alone.values[0], together.values[row], rtol=1e-5, atol=1e-6 * float(alone.values.max())
        )


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6])
def test_constants_in_noise(noise):
    generator = torch.Generator().manual_seed(0)
    kernel = 1 + noise * torch.randn(20, 200, dtype=torch.float64, generator=generator)
    exact = hankel_singular_values(kernel)
    for count in (1, 2, 8, 16, 28):
        found = hankel_singular_values(kernel, count)
        assert float((found - exact[:, :count]).abs().max()) <= 1e-5 * float(exact.max())


def test_a_comb_has_its_values_as_often_as_its_spacing():
    """Rows i and columns j of one residue of i + j modulo 10 make a matrix of their own."""
    teeth = 0.97 ** torch.arange(100, dtype=torch.float64)
    kernel = torch.zeros(1001, dtype=torch.float64)
    kernel[1::10][:100] = teeth
    first, other = (
        exact_spectrum(hankel_matrices(t.unsqueeze(0), "zero").matrix())[0]
        for t in (teeth, teeth[1:])
    )
    exact = torch.cat([first, other.repeat(9)]).sort(descending=True).values[:24]
    found = hankel_singular_values(kernel, 24)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=0)


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
