"""Kernels to reduce: sums of few modes, long smooth ones, noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
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
