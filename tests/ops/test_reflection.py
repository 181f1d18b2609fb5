"""Reflection coefficients against numpy's roots, the definition, and each other."""

import numpy as np
import pytest
import torch

from gramian.ops.reflection import ladder_weights, step_down, step_up

ORDERS = [1, 2, 3, 16, 63]


def draw(order: int, channels: tuple[int, ...] = (4,)) -> torch.Tensor:
    torch.manual_seed(order)
    return torch.tanh(torch.randn(*channels, order, dtype=torch.float64) / order**0.5)


@pytest.mark.parametrize("order", ORDERS)
def test_step_up_is_the_recursion(order: int) -> None:
    k = draw(order)
    for row, a in zip(k.numpy(), step_up(k).numpy(), strict=True):
        expected = np.ones(1)
        for last in row:
            expected = np.r_[expected, 0] + last * np.r_[0, expected[::-1]]
        np.testing.assert_allclose(np.r_[1, a], expected, rtol=0, atol=1e-13)
        assert np.abs(np.roots(expected)).max() < 1


@pytest.mark.parametrize("order", ORDERS)
def test_step_down_inverts_step_up(order: int) -> None:
    k = draw(order, (2, 3))
    torch.testing.assert_close(step_down(step_up(k)), k, rtol=0, atol=1e-10)


def test_step_down_tells_stable_from_unstable() -> None:
    rng = np.random.default_rng(0)
    for radius, stable in ((0.95, True), (1.05, False)):
        poles = radius * np.exp(1j * np.pi * rng.random(3)) * np.r_[1, 0.5, 0.7]
        a = np.poly(np.r_[poles, poles.conj()]).real[1:]
        k = step_down(torch.from_numpy(a))
        assert bool((k.abs() < 1).all()) == stable


@pytest.mark.parametrize("order", ORDERS)
def test_ladder_weights_expand_the_numerator(order: int) -> None:
    k, b = draw(order), torch.randn(4, order, dtype=torch.float64)
    weights = ladder_weights(k, b)
    for c in range(4):
        total = np.zeros(order)
        for m in range(order):
            a = np.r_[1, step_up(k[c, :m]).numpy()]
            total[: m + 1] += weights[c, m].item() * a[::-1]
        np.testing.assert_allclose(total, b[c], rtol=0, atol=1e-10)
    shared = ladder_weights(k[:1], b)
    torch.testing.assert_close(shared[2], ladder_weights(k[0], b[2]))


def test_gradients() -> None:
    k = draw(5, (2,)).requires_grad_()
    assert torch.autograd.gradcheck(step_up, (k,))
    assert torch.autograd.gradgradcheck(step_up, (k,))
