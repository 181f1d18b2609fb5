"""Hankel norms of what a reduction leaves, against dense matrices of taps to fifty digits."""

from __future__ import annotations

import itertools

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from gramian import reduce
from gramian.ops.double_double import Complex, DoubleDouble
from gramian.reduction.errors import _Cascade, hankel_error

Modes = tuple[np.ndarray, np.ndarray]


def taps_of(poles: np.ndarray, residues: np.ndarray, count: int) -> np.ndarray:
    """``Re Σ_k r_k λ_k^t`` for t < count, however much of it cancels."""
    with mpmath.workdps(50):
        factors = [mpmath.mpc(complex(pole)) for pole in poles]
        values = [mpmath.mpc(complex(residue)) for residue in residues]
        taps = []
        for _ in range(count):
            taps.append(float(mpmath.fsum(value.real for value in values)))
            values = [value * factor for value, factor in zip(values, factors, strict=True)]
    return np.array(taps)


def hankel_norm(taps: np.ndarray) -> float:
    size = (len(taps) + 1) // 2
    matrix = np.lib.stride_tricks.sliding_window_view(taps[: 2 * size - 1], size)
    return float(np.linalg.svd(matrix, compute_uv=False)[0])


def measured(taps: np.ndarray, poles: np.ndarray, residues: np.ndarray) -> float:
    tensors = (torch.from_numpy(np.atleast_2d(x)) for x in (taps, poles + 0j, residues + 0j))
    return float(hankel_error(*tensors))


def check(taps: np.ndarray, poles: np.ndarray, residues: np.ndarray, length: int = 320) -> None:
    """The accuracy that the docstring states; poles fade within half of ``length``."""
    modal = taps_of(poles, residues, max(length, 2 * len(taps)))
    error = -modal
    error[: len(taps)] += taps
    exact, actual = hankel_norm(error), measured(taps, poles, residues)
    rounding = 1e-12 + 1e-15 / (1 - np.abs(poles).max())
    rounding *= np.linalg.norm(taps) + hankel_norm(modal)
    assert exact * (1 - 1e-4) - rounding <= actual <= exact + rounding
    assert actual <= np.abs(error).sum() + rounding


def cluster(pole: complex, count: int, distance: float, draw: np.random.Generator) -> Modes:
    """Poles so far from each other around one, and the residues of ``1 / Π (z - λ_k)``."""
    turn = np.exp(2j * np.pi * (np.arange(count) + draw.uniform()) / count)
    poles = pole + distance * turn
    apart = poles[:, None] - poles
    np.fill_diagonal(apart, 1)
    return poles, 1 / apart.prod(-1)


POLES = [0.05, -0.4, 0.75, 0.75j, 0.8 * np.exp(0.4j)]
CLUSTERS = [(1, 0.0), (2, 1e-2), (2, 1e-5), (2, 1e-8), (3, 1e-2), (3, 1e-5), (4, 1e-3), (5, 1e-2)]


@pytest.mark.each
@pytest.mark.parametrize("length", [1, 21, 140])  # dense to 128, then by Lanczos
@pytest.mark.parametrize(("count", "distance"), CLUSTERS)
def test_poles_that_nearly_coincide(count: int, distance: float, length: int) -> None:
    draw = np.random.default_rng([length, count, int(-np.log10(distance or 1))])
    for k in draw.permutation(len(POLES))[:2]:
        poles, residues = cluster(POLES[k], count, distance, draw)
        own = taps_of(poles, residues, length)
        check(own, poles, residues)  # the tail alone is missed
        check(own + 1e-9 * draw.standard_normal(length), poles, residues)
        check(draw.standard_normal(length), poles, residues)


@pytest.mark.each
@pytest.mark.parametrize("modes", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 9, 140])
def test_random_systems(modes: int, length: int) -> None:
    draw = np.random.default_rng(modes)
    for real, padded in itertools.product([False, True], repeat=2):
        angle = np.pi * draw.integers(0, 2, modes) if real else draw.uniform(0, np.pi, modes)
        poles = draw.uniform(0, 0.85, modes) * np.exp(1j * angle)
        residues = draw.standard_normal((2, modes)).T @ [1, 1j]
        if padded:  # with entries that are no modes, wherever their poles are
            poles, residues = np.append(poles, 2), np.append(residues, 0)
        poles_in = np.where(residues == 0, 0, poles)
        taps = draw.standard_normal(length)
        check(taps, poles_in, residues)
        assert measured(taps, poles, residues) == measured(taps, poles_in, residues)


def test_what_fits_exactly_leaves_nothing() -> None:
    draw = np.random.default_rng(0)
    for count, distance in CLUSTERS:
        poles, residues = cluster(0.6, count, distance, draw)
        for length in (110, 300):
            taps = taps_of(poles, residues, length)
            size = np.linalg.norm(taps)
            assert measured(taps, poles, residues) <= 1e-12 * size
            assert measured(0 * taps, poles, 0 * residues) == 0


def test_a_long_kernel_and_slow_poles_that_nearly_coincide() -> None:
    poles, residues = cluster(0.95, 2, 1e-6, np.random.default_rng(0))
    for length in (1, 500):
        check(taps_of(poles, residues, length), poles, residues, length=1600)


@pytest.mark.parametrize("gap", [1e-2, 1e-5, 1e-9, 1e-13])
def test_poles_near_the_circle(gap: float) -> None:
    """``Γ_ij = λ^{i+j}`` has the one singular value ``1 / (1 - λ²)``."""
    for sign, length in itertools.product((1, -1), (1, 40, 300)):
        pole = sign * (1 - gap)
        value = measured(np.zeros(length), np.array([pole]), np.ones(1))
        assert value == pytest.approx(
            1 / ((1 - abs(pole)) * (1 + abs(pole))), rel=1e-12 + 1e-15 / gap
        )


def test_poles_at_the_last_double_before_the_circle() -> None:
    poles = np.array([np.nextafter(1, 0), np.nextafter(np.nextafter(1, 0), 0)])
    value = measured(np.ones(3), poles, np.array([1.0, -1.0]) * 1e8)
    assert np.isfinite(value)


def test_unstable_systems_are_infinitely_far() -> None:
    taps = np.array([1.0, 0.5])
    assert measured(taps, np.array([1.0]), np.ones(1)) == np.inf
    assert measured(taps, np.array([0.5, 1.2j]), np.ones(2)) == np.inf


def test_a_channel_does_not_depend_on_the_others() -> None:
    draw = np.random.default_rng(0)
    systems = [cluster(pole, 3, distance, draw) for pole in POLES for distance in (0.05, 1e-4)]
    taps = draw.standard_normal((len(systems), 200))
    poles, residues = (torch.from_numpy(np.array(x)) for x in zip(*systems, strict=True))
    together = hankel_error(torch.from_numpy(taps), poles, residues)
    for k, (own_poles, own_residues) in enumerate(systems):
        alone = measured(taps[k], own_poles, own_residues)
        assert float(together[k]) == pytest.approx(alone, rel=1e-9)


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pole", [0.3, 0.8])
@pytest.mark.parametrize("multiplicity", [2, 3])
def test_reductions_of_multiple_poles(multiplicity: int, pole: float, dtype: torch.dtype) -> None:
    """``h_t = C(t + m - 2, m - 1) λ^{t-1}``, which order m reaches with poles that all but meet."""
    t = torch.arange(60, dtype=torch.float64)
    kernel = torch.ones(60, dtype=torch.float64)
    for i in range(1, multiplicity):
        kernel = kernel * (t - 1 + i) / i
    kernel = (kernel * pole ** (t - 1)).to(dtype)
    for order in (multiplicity, multiplicity + 1):
        reduction = reduce(kernel, order)
        system = reduction.system
        modal = taps_of(system.poles.numpy(), system.residues.numpy(), 600)
        error = -modal
        error[:59] += kernel[1:].double().numpy()
        rounding = 1e-11 * float(kernel.double().norm())  # and that of the dtype
        resolution = rounding if dtype == torch.float64 else 1e-7 * hankel_norm(error)
        assert float(reduction.hankel_error) <= np.abs(error).sum() + rounding + resolution
        assert float(reduction.hankel_error) >= 0.9998 * hankel_norm(error) - rounding


def test_sections_are_orthogonal() -> None:
    torch.manual_seed(0)
    for radius in (0.0, 0.5, 0.999, 1 - 1e-12):
        angle = 3 * torch.rand(3, 5, dtype=torch.float64)
        poles = torch.polar(torch.full_like(angle, radius), angle)
        poles[0] = poles[0, :1]  # all of them the same
        cascade = _Cascade(poles)
        joint = torch.cat([cascade.A, cascade.b.unsqueeze(-1)], dim=-1)
        unit = torch.eye(10, dtype=torch.float64).expand(3, -1, -1)
        torch.testing.assert_close(joint @ joint.mT, unit, rtol=0, atol=1e-14)


def exactly(value: DoubleDouble) -> list[mpmath.mpf]:
    return [
        mpmath.mpf(float(high)) + mpmath.mpf(float(low))
        for high, low in zip(value.high, value.low, strict=True)
    ]


def test_arithmetic_of_double_doubles() -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(2, 50, dtype=torch.float64) * 10.0 ** torch.randint(-9, 9, (50,)))[:]
    c = a * (1 + 1e-12 * b / b.abs())
    with mpmath.workdps(60):
        x, y = DoubleDouble.of(a) / DoubleDouble.of(b), DoubleDouble.of(c) * DoubleDouble.of(b)
        p, q = exactly(x), exactly(y)
        exact = [
            (x + y, [u + v for u, v in zip(p, q, strict=True)], 1e-31),
            (x * y, [u * v for u, v in zip(p, q, strict=True)], 1e-30),
            (x / y, [u / v for u, v in zip(p, q, strict=True)], 1e-30),
            (
                DoubleDouble.of(c) - DoubleDouble.of(a),
                [mpmath.mpf(float(u)) - mpmath.mpf(float(v)) for u, v in zip(c, a, strict=True)],
                0,
            ),
        ]
        for actual, expected, tolerance in exact:
            for one, other in zip(exactly(actual), expected, strict=True):
                assert abs(one - other) <= tolerance * abs(other)
        (one,) = exactly(DoubleDouble(x.high[None], x.low[None]).sum(1))
        assert abs(one - mpmath.fsum(p)) <= 1e-29 * mpmath.fsum(map(abs, p))


def test_arithmetic_of_complex_double_doubles() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 20, dtype=torch.complex128)
    x, y = Complex.of(a), Complex.of(b)
    with mpmath.workdps(60):
        quotient = (x - y) * x.conj() / (x + y)
        pairs = zip(exactly(quotient.real), exactly(quotient.imag), a, b, strict=True)
        for real, imag, u, v in pairs:
            u, v = mpmath.mpc(complex(u)), mpmath.mpc(complex(v))
            expected = (u - v) * mpmath.conj(u) / (u + v)
            assert abs(mpmath.mpc(real, imag) - expected) <= 1e-29 * abs(expected)


def test_no_gradient_is_recorded() -> None:
    kernel: Tensor = torch.randn(30, requires_grad=True)
    assert not reduce(kernel, 3).hankel_error.requires_grad
