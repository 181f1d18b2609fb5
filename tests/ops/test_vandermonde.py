"""Vandermonde products against the sums that define them."""

import pytest
import torch

from gramian.ops.vandermonde import (
    geometric_powers,
    integer_power,
    vandermonde_product,
    vandermonde_transpose_product,
)

LENGTHS = [1, 2, 3, 63, 257, 1000]


def disc(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    radius = torch.rand(*shape, generator=generator, dtype=torch.float64).sqrt()
    angle = torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 * torch.pi
    return torch.polar(radius, angle)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("poles", "coefficients"),
    [((5,), (5,)), ((3, 5), (3, 5)), ((3, 1, 5), (2, 3, 4, 5)), ((3, 4, 0), (3, 4, 0))],
)
def test_product_is_the_sum(poles, coefficients, length):
    p, c = disc(*poles), torch.randn(*coefficients, dtype=torch.complex128)
    t = torch.arange(length)
    expected = (c.unsqueeze(-1) * p.unsqueeze(-1) ** t).sum(-2).real
    actual = vandermonde_product(p, c, length)
    assert actual.shape == (*coefficients[:-1], length)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("poles", "signal"), [((5,), ()), ((3, 5), (3,)), ((3, 5), (2, 3)), ((3, 1, 5), (2, 3, 4))]
)
def test_transpose_product_is_the_recurrence(poles, signal, length):
    p, u = disc(*poles, seed=1), torch.randn(*signal, length, dtype=torch.float64)
    state = torch.zeros(*signal, poles[-1], dtype=torch.complex128)
    for t in range(length):
        state = p * state + u[..., t, None]
    actual = vandermonde_transpose_product(p, u)
    torch.testing.assert_close(actual, state, rtol=1e-11, atol=1e-12)


def test_powers_are_exact_at_zero_and_one():
    base = torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=torch.float64)
    for count in (1, 2, 5, 8):
        expected = base.unsqueeze(-1) ** torch.arange(count)
        assert torch.equal(geometric_powers(base, count), expected)
        assert torch.equal(integer_power(base, count - 1), expected[:, -1])


def test_negative_real_pole_keeps_its_phase_in_single_precision():
    pole = torch.tensor([-0.9999], dtype=torch.complex64)
    h = vandermonde_product(pole, torch.ones_like(pole), 10_000)
    exact = pole.real.double() ** torch.arange(10_000)
    assert float((h - exact).abs().max()) < 1e-6


def test_gradients():
    p = (0.9 * disc(2, 3)).requires_grad_()
    c = torch.randn(2, 3, dtype=torch.complex128, requires_grad=True)
    u = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, c: vandermonde_product(p, c, 11), (p, c))
    assert torch.autograd.gradcheck(vandermonde_transpose_product, (p, u))
