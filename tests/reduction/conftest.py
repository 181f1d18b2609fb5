"""Kernels to reduce: sums of few modes, long smooth ones, noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.signal
import torch
from torch import Tensor

from gramian import Modal


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def random_system() -> Callable[..., Modal]:
    """Stable systems of well separated modes, float64."""

    def make(channels: int, pairs: int, reals: int = 0, highest: float = 0.95) -> Modal:
        radius = 0.5 + (highest - 0.5) * torch.rand(channels, pairs + reals, dtype=torch.float64)
        angle = torch.zeros(pairs + reals, dtype=torch.float64)
        angle[:pairs] = math.pi * (torch.arange(pairs) + 0.5) / max(pairs, 1)
        poles = torch.polar(radius, angle.expand(channels, -1))
        real = 0.9 * torch.linspace(-1, 1, reals + 2, dtype=torch.float64)[1:-1] + 0.01
        poles[:, pairs:] = real.to(poles.dtype)
        residues = 0.5 + torch.rand(channels, pairs + reals, dtype=torch.complex128)
        residues[:, pairs:] = residues[:, pairs:].real.to(poles.dtype)
        return Modal(poles, residues, torch.randn(channels, dtype=torch.float64))

    return make


@pytest.fixture
def smooth_kernel() -> Callable[..., Tensor]:
    """Forty decaying cosines a channel under a little noise, float64."""

    def make(channels: int, length: int, noise: float = 1e-4) -> Tensor:
        time = torch.linspace(0, 1, length, dtype=torch.float64)
        rate, phase, decay = torch.rand(3, channels, 40, 1, dtype=torch.float64)
        waves = torch.cos(120 * rate * time + 7 * phase) * torch.exp(-9 * decay * time)
        return waves.mean(1) + noise * torch.randn(channels, length, dtype=torch.float64)

    return make


def _noise(draw, n):
    return draw.standard_normal(n)


def _constant(draw, n):
    return np.full(n, draw.uniform(0.5, 2))


def _constant_in_noise(draw, n):
    return 1 + 10 ** draw.uniform(-6, -1) * draw.standard_normal(n)


def _delay(draw, n):
    return np.eye(1, n, draw.integers(1, n))[0] if n > 1 else np.ones(1)


def _comb(draw, n):
    spacing = draw.integers(2, max(3, n // 5))
    return np.where(
        np.arange(n) % spacing == 1, draw.uniform(0.8, 1) ** (np.arange(n) // spacing), 0
    )


def _box(draw, n):
    return (np.arange(n) <= draw.integers(1, max(2, n))).astype(float)


def _chirp(draw, n):
    time = np.linspace(0, 1, n)
    return scipy.signal.chirp(time, 0, 1, draw.uniform(2, max(3, n / 3))) * np.exp(
        -draw.uniform(0, 4) * time
    )


def _all_pass(draw, n):
    poles = draw.uniform(0.3, 0.98, 3) * np.exp(1j * np.pi * draw.random(3))
    a = np.poly(np.concatenate([poles, poles.conj()])).real
    return scipy.signal.lfilter(a[::-1], a, np.eye(1, n)[0])


def _scales(draw, n):
    rate = 10 ** -np.linspace(0.3, draw.uniform(2, 5), draw.integers(3, 9))
    return (np.exp(-rate[:, None] * np.arange(n)) * draw.standard_normal((len(rate), 1))).sum(0)


def _low_rank(draw, n):
    modes = draw.integers(1, 6)
    poles = draw.uniform(0.2, 1, modes) * np.exp(1j * np.pi * draw.random(modes))
    return (draw.standard_normal((modes, 1)) * poles[:, None] ** np.arange(n)).real.sum(0)


def _sparse(draw, n):
    return np.where(draw.random(n) < 0.05, draw.standard_normal(n), 0)


def _echoes(draw, n):
    spacing, gain = draw.integers(2, max(3, n // 3)), draw.uniform(-0.95, 0.95)
    a = np.zeros(spacing + 1)
    a[0], a[-1] = 1, -gain
    return scipy.signal.lfilter([0, 1, draw.uniform(-1, 1)], a, np.eye(1, n)[0])


def _windowed_sinc(draw, n):
    window = ["hamming", "blackman", "boxcar", ("kaiser", 8.0)][draw.integers(4)]
    return scipy.signal.firwin(n - 1 + n % 2, draw.uniform(0.02, 0.9), window=window)


def _equiripple(draw, n):
    cutoff, taps = draw.uniform(0.05, 0.4), min(n, 61)
    try:
        taps = scipy.signal.remez(taps, [0, cutoff, cutoff + 0.05, 0.5], [1, 0])
    except ValueError:  # too few taps for that band
        taps = scipy.signal.firwin(taps, 2 * cutoff)
    return np.pad(taps, (0, n - len(taps)))


def _hilbert(draw, n):
    place = np.arange(n) - n // 2
    odd = place % 2 != 0
    return np.where(odd, 2 / np.pi / np.where(odd, place, 1), 0) * np.hamming(n)


def _classic(draw, n):
    order, cutoff = draw.integers(1, 21), 10 ** draw.uniform(-2, -0.05)
    kind = draw.integers(5)
    if kind == 0:
        sos = scipy.signal.butter(order, cutoff, output="sos")
    elif kind == 1:
        sos = scipy.signal.cheby1(order, 1, cutoff, output="sos")
    elif kind == 2:
        sos = scipy.signal.cheby2(order, 40, cutoff, output="sos")
    elif kind == 3:
        sos = scipy.signal.ellip(order, 1, 60, cutoff, output="sos")
    else:
        sos = scipy.signal.bessel(order, cutoff, output="sos")
    return scipy.signal.sosfilt(sos, np.eye(1, n)[0])


def _spline(draw, n):
    box = np.ones(draw.integers(2, max(3, n // 5)))
    kernel = box
    for _ in range(draw.integers(1, 4)):
        kernel = np.convolve(kernel, box) / len(box)
    return np.pad(kernel, (1, max(0, n - 1 - len(kernel))))[:n]


def _room(draw, n):
    time = np.arange(n)
    kernel = draw.standard_normal(n) * np.exp(-draw.uniform(3, 9) * time / n)
    early = draw.integers(0, n, 5)
    kernel[early] += 3 * draw.standard_normal(5)
    return kernel


def _speech(draw, n):
    formants = np.array([500, 1500, 2500, 3500]) * draw.uniform(0.8, 1.2, 4) / 8000
    poles = np.exp(-np.pi * draw.uniform(50, 200, 4) / 8000 + 2j * np.pi * formants / 2)
    a = np.poly(np.concatenate([poles, poles.conj()])).real
    pulses = np.where(np.arange(n) % 80 == 1, 1.0, 0.0)
    return scipy.signal.lfilter([1.0], a, pulses)


def _smooth(draw, n):
    time = np.linspace(0, 1, n)
    waves = np.cos(draw.uniform(0, 40, (6, 1)) * time + draw.uniform(0, 7, (6, 1)))
    return (waves * np.exp(-draw.uniform(0, 5, (6, 1)) * time)).sum(0)


def _rational(draw, n):
    poles = draw.uniform(0.2, 0.999, 3) * np.exp(1j * np.pi * draw.random(3))
    a = np.poly(np.concatenate([poles, poles.conj()])).real
    return scipy.signal.lfilter(draw.standard_normal(7), a, np.eye(1, n)[0])


def _growing(draw, n):
    time = np.arange(n)
    radius = 1 + draw.uniform(0, 4) / n
    return radius**time * np.cos(np.pi * draw.random() * time) + 1e-3 * draw.standard_normal(n)


def _confluent(draw, n):
    time = np.arange(n)
    return time ** draw.integers(1, 4) * draw.uniform(0.5, 1) ** time


def _silence(draw, n):
    return np.eye(1, n)[0] * draw.integers(0, 2)


_FAMILIES = {
    function.__name__[1:]: function
    for function in (
        _noise,
        _constant,
        _constant_in_noise,
        _delay,
        _comb,
        _box,
        _chirp,
        _all_pass,
        _scales,
        _low_rank,
        _sparse,
        _echoes,
        _windowed_sinc,
        _equiripple,
        _hilbert,
        _classic,
        _spline,
        _room,
        _speech,
        _smooth,
        _rational,
        _growing,
        _confluent,
        _silence,
    )
}


@pytest.fixture
def families() -> dict[str, Callable[[np.random.Generator, int], np.ndarray]]:
    """Kernels of a length by the name of their family: ``families[name](draw, length)``."""

    def of_length(function):
        def make(draw, length):
            kernel = np.zeros(length)
            taps = function(draw, length)[:length]
            kernel[: len(taps)] = taps
            return kernel

        return make

    return {name: of_length(function) for name, function in _FAMILIES.items()}
