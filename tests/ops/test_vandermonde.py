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


SHAPES = [((2, 3), (2, 3)), ((1, 3), (4, 3)), ((2, 1, 3), (2, 2, 3))]


@pytest.mark.each
@pytest.mark.parametrize("length", [1, 2, 3, 11])
@pytest.mark.parametrize(("poles", "batch"), SHAPES)
def test_gradcheck_and_gradgradcheck(poles, batch, length):
    p = disc(*poles)
    p.view(-1)[0] = 0  # a derivative at zero is exact too
    p.requires_grad_()
    c = torch.randn(*batch, dtype=torch.complex128, requires_grad=True)
    u = torch.randn(*batch[:-1], length, dtype=torch.float64, requires_grad=True)
    for function, inputs in (
        (lambda p, c: vandermonde_product(p, c, length), (p, c)),
        (vandermonde_transpose_product, (p, u)),
    ):
        # Of most lengths in one random direction, in which all entries have part.
        assert torch.autograd.gradcheck(function, inputs, fast_mode=length == 11)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=length != 2)


@pytest.mark.parametrize("length", LENGTHS)
def test_single_precision_gradients_against_the_sum_in_double(length):
    """Also with poles kept in double precision, as filters make them."""
    p, c = disc(3, 1, 6), torch.randn(3, 4, 6, dtype=torch.complex128)
    g = torch.randn(3, 4, length, dtype=torch.float64)
    p, c = p.requires_grad_(), c.requires_grad_()
    powers = torch.stack([p**t for t in range(length)], dim=-1)
    expected = torch.autograd.grad((c.unsqueeze(-1) * powers).sum(-2).real, (p, c), g)
    for dtype in (torch.complex64, torch.complex128):
        inputs = (p.detach().to(dtype), c.detach().to(torch.complex64))
        inputs = tuple(value.requires_grad_() for value in inputs)
        samples = vandermonde_product(*inputs, length)
        assert samples.dtype == torch.float32
        for graph in (True, False):
            gradients = torch.autograd.grad(
                samples, inputs, g.float(), retain_graph=True, create_graph=graph
            )
            for value, exact, given in zip(gradients, expected, inputs, strict=True):
                assert value.dtype == given.dtype
                assert float((value - exact).detach().norm() / exact.norm().clamp_min(1)) < 1e-5


def test_many_blocks(monkeypatch):
    monkeypatch.setattr("gramian.ops.vandermonde._CPU_NUMBERS", 1)
    test_gradcheck_and_gradgradcheck((1, 3), (4, 3), 11)
    test_gradcheck_and_gradgradcheck((2, 1, 3), (2, 2, 3), 11)


@pytest.mark.parametrize("length", [16_384, 65_536])
def test_memory_does_not_grow_as_modes_times_length(length, largest_allocation):
    channels, modes = 4, 64
    p = disc(channels, modes).requires_grad_()
    c = torch.randn(channels, modes, dtype=torch.complex64, requires_grad=True)
    with largest_allocation() as largest:
        vandermonde_product(p, c, length).square().sum().backward()
        vandermonde_transpose_product(p, torch.randn(channels, length))
    assert channels * length <= largest.bytes / 4 < channels * modes * length / 8


def test_opcheck_and_compile():
    p = disc(2, 3).requires_grad_()
    c = torch.randn(2, 4, 3, dtype=torch.complex128, requires_grad=True)
    g = torch.randn(2, 4, 11, dtype=torch.float64, requires_grad=True)
    operators = torch.ops.gramian
    torch.library.opcheck(operators.vandermonde_product.default, (p, c, 11))
    torch.library.opcheck(operators.vandermonde_transpose_product.default, (p, g))
    arguments = tuple(value.detach() for value in (g, p, c))
    torch.library.opcheck(operators.vandermonde_product_backward.default, arguments)

    def loss(p, c):
        return vandermonde_product(p.unsqueeze(1), c, 11).square().sum()

    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(p, c)
    torch.testing.assert_close(
        torch.autograd.grad(value, (p, c)), torch.autograd.grad(loss(p, c), (p, c))
    )
