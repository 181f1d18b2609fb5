"""Rational kernels against numpy and scipy in float64."""

import numpy as np
import pytest
import torch
from scipy import signal
from torch import Tensor

from gramian.ops import (
    evaluate_on_roots_of_unity,
    polynomial,
    rational_impulse_response,
    rational_kernel,
)

SHARED = [(6,), (1,), (), (2, 1), (3,), (1, 3), (2, 3)]  # shapes of a's channels


def coefficients(
    order: int, shared: tuple[int, ...], seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """b and d for six channels, and denominators with poles well inside the unit disc."""
    generator = torch.Generator().manual_seed(seed)
    channels = (6,) if shared in ((6,), (1,), ()) else (2, 3)
    b = torch.randn(*channels, order, generator=generator, dtype=torch.float64)
    a = torch.rand(*shared, order, generator=generator, dtype=torch.float64) - 0.5
    a = a * 0.9 ** torch.arange(1, order + 1) / order**0.5
    return b, a, torch.randn(channels, generator=generator, dtype=torch.float64)


def spectrum_kernel(b: Tensor, a: Tensor, d: Tensor, grid: int) -> np.ndarray:
    """The definition, on all roots of unity."""
    z = np.exp(2j * np.pi * np.arange(grid) / grid)
    powers = z[:, None] ** -np.arange(1, b.shape[-1] + 1)
    b, a, d = (t.detach().numpy() for t in (b, a, d))
    ratio = (b @ powers.T) / (1 + a @ powers.T) + d[..., None]
    return (ratio @ (z[:, None] ** np.arange(grid)) / grid).real


@pytest.mark.pairs
@pytest.mark.parametrize(("order", "grid"), [(1, 2), (1, 3), (2, 3), (3, 63), (5, 64), (17, 257)])
@pytest.mark.parametrize("shared", SHARED)
def test_kernel_is_the_inverse_transform_of_the_ratio(
    order: int, grid: int, shared: tuple[int, ...]
) -> None:
    b, a, d = coefficients(order, shared)
    kernel = rational_kernel(b, a, d, grid).numpy()
    np.testing.assert_allclose(kernel, spectrum_kernel(b, a, d, grid), atol=1e-12)


@pytest.mark.parametrize("order", [1, 4, 64])
@pytest.mark.parametrize(("length", "grid"), [(300, 1000), (63, 257)])
def test_kernel_is_the_impulse_response_where_nothing_aliases(
    order: int, length: int, grid: int
) -> None:
    b, a, d = coefficients(order, (6,))
    kernel = rational_kernel(b, a, d, grid, length=length).numpy()
    impulse = np.eye(1, length)[0]
    for row, b_i, a_i, d_i in zip(kernel, b.numpy(), a.numpy(), d.numpy(), strict=True):
        expected = signal.lfilter(np.r_[d_i, b_i + d_i * a_i], np.r_[1, a_i], impulse)
        np.testing.assert_allclose(row, expected, atol=1e-8)


@pytest.mark.parametrize("length", [1, 2, 3, 63, 257, 1000])
@pytest.mark.parametrize("radius", [0.5, 0.999, 1.0])
def test_impulse_response_of_slowly_decaying_systems(radius: float, length: int) -> None:
    """No aliasing, not even with poles on the unit circle."""
    angles = np.pi * np.array([0.1, 0.37, 0.8])
    poles = radius * np.exp(1j * np.r_[angles, -angles])
    a = torch.from_numpy(np.poly(poles).real[1:].copy())
    b, d = torch.randn(2, 6, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    taps = rational_impulse_response(b, a, d, length).numpy()
    impulse = np.eye(1, length)[0]
    for row, b_i, d_i in zip(taps, b.numpy(), d.numpy(), strict=True):
        expected = signal.lfilter(np.r_[d_i, b_i + d_i * a.numpy()], np.r_[1, a], impulse)
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-8 * np.abs(expected).max())


@pytest.mark.pairs
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("options", [{}, {"length": 8}])
@pytest.mark.parametrize("grid", [9, 10])
def test_gradcheck_and_gradgradcheck(
    shared: tuple[int, ...], options: dict[str, int], grid: int
) -> None:
    inputs = [t.requires_grad_() for t in coefficients(3, shared)]

    def kernel(b: Tensor, a: Tensor, d: Tensor) -> Tensor:
        return rational_kernel(b, a, d, grid, **options)

    assert torch.autograd.gradcheck(kernel, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(kernel, inputs, fast_mode=True)


@pytest.mark.parametrize("most_kept", [0, 2**21])
@pytest.mark.parametrize("denominators", [1, 3, 33])
def test_many_blocks(denominators: int, most_kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids that are cut into several blocks of channels, and denominators shared across them; with
    spectra kept for the backward pass, and computed again.
    """
    monkeypatch.setattr(polynomial, "_MOST_KEPT", most_kept)
    monkeypatch.setattr(polynomial, "_CPU_BLOCK", 2**13)  # of so short a grid too
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(denominators, 99 // denominators, 5, generator=generator).double()
    a = (torch.rand(denominators, 1, 5, generator=generator).double() - 0.5) / 5
    d = torch.randn(denominators, 99 // denominators, generator=generator).double()
    inputs = [t.requires_grad_() for t in (b, a, d)]
    kernel = rational_kernel(b, a, d, 1025)
    numerator = torch.nn.functional.pad(b, (1, 0))
    denominator = torch.nn.functional.pad(a, (1, 0), value=1.0)
    ratio = torch.fft.rfft(numerator, n=1025) / torch.fft.rfft(denominator, n=1025)
    expected = torch.fft.irfft(ratio + d[..., None], n=1025)
    torch.testing.assert_close(kernel, expected)
    g = torch.randn(kernel.shape, generator=generator).double()
    torch.testing.assert_close(
        torch.autograd.grad(kernel, inputs, g), torch.autograd.grad(expected, inputs, g)
    )


def test_numerator_and_denominator_may_differ_in_order() -> None:
    b, a, d = coefficients(5, (6,))
    padded = torch.nn.functional.pad(a[..., :2], (0, 3))
    torch.testing.assert_close(
        rational_kernel(b, a[..., :2], d, 64), rational_kernel(b, padded, d, 64)
    )


def test_dtype_is_that_of_the_coefficients() -> None:
    b, a, d = coefficients(4, (6,))
    single = rational_kernel(b.float(), a.float(), d.float(), 64)
    assert single.dtype == torch.float32
    assert rational_kernel(b, a.float(), d.float(), 64).dtype == torch.float64
    torch.testing.assert_close(single, rational_kernel(b, a, d, 64).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shared", [(6,), (2, 1)])
def test_double_taps_of_single_coefficients(shared: tuple[int, ...]) -> None:
    """Taps are those of the same numbers in float64; gradients agree to single precision."""
    generator = torch.Generator().manual_seed(1)
    single = [t.float() for t in coefficients(24, shared)]
    double = [t.double().requires_grad_() for t in single]
    single = [t.requires_grad_() for t in single]
    mixed = rational_kernel(*single, 257, dtype=torch.float64)
    expected = rational_kernel(*double, 257)
    assert mixed.dtype == torch.float64
    torch.testing.assert_close(mixed, expected)
    g = torch.randn(mixed.shape, generator=generator, dtype=torch.float64)
    for graph in (False, True):
        gradients = torch.autograd.grad(mixed, single, g, retain_graph=True, create_graph=graph)
        exact = torch.autograd.grad(expected, double, g, retain_graph=True)
        for value, reference in zip(gradients, exact, strict=True):
            assert value.dtype == torch.float32
            error = torch.linalg.vector_norm(value - reference)
            assert error < 1e-5 * torch.linalg.vector_norm(reference)
    taken = rational_kernel(*single, 257, dtype=torch.float32).dtype
    assert taken == torch.float32


def test_opcheck_and_compile() -> None:
    b, a, d = (t.requires_grad_() for t in coefficients(4, (2, 1)))
    operators = torch.ops.gramian
    g = torch.ones(2, 3, 60, dtype=torch.float64)
    for keep in (True, False):
        forward = (b, a, d, 63, 60, torch.float64, keep)
        torch.library.opcheck(operators.rational_kernel.default, forward)
        _, *spectra = operators.rational_kernel(*forward)
        backward = tuple(t.detach() for t in (g, b, a, *spectra))
        torch.library.opcheck(operators.rational_kernel_backward.default, (*backward, 63))

    def loss(b: Tensor, a: Tensor, d: Tensor) -> Tensor:
        return rational_kernel(b, a, d, 64).square().sum()

    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(b, a, d)
    torch.testing.assert_close(
        torch.autograd.grad(value, (b, a, d)), torch.autograd.grad(loss(b, a, d), (b, a, d))
    )


@pytest.mark.parametrize(("count", "points"), [(1, 1), (1, 8), (3, 3), (5, 64), (63, 257)])
def test_evaluation_on_roots_of_unity(count: int, points: int) -> None:
    c = torch.randn(4, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = np.exp(2j * np.pi * np.arange(points // 2 + 1) / points)
    expected = np.stack([np.polynomial.polynomial.polyval(1 / z, row) for row in c.numpy()])
    values = evaluate_on_roots_of_unity(c, points)
    assert values.dtype == torch.complex128
    np.testing.assert_allclose(values.numpy(), expected, atol=1e-11)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grid": 4}, ValueError, "grid of 4"),
        ({"b": torch.zeros(6, 0)}, ValueError, "b has shape"),
        ({"a": torch.zeros(5, 4)}, ValueError, "do not broadcast"),
        ({"d": torch.zeros(7)}, ValueError, "do not broadcast"),
        ({"length": 0}, ValueError, "length=0"),
        ({"length": 65}, ValueError, "length=65"),
        ({"dtype": torch.complex64}, TypeError, "complex"),
        (dict.fromkeys("ba", torch.ones(4).half()) | {"d": torch.ones(()).half()}, TypeError, "16"),
        ({"a": torch.zeros(6, 4, dtype=torch.complex64)}, TypeError, "a must be real"),
        ({"b": torch.zeros(6, 4, dtype=torch.long)}, TypeError, "b must be real"),
    ],
)
def test_bad_input_is_one_clear_sentence(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    b, a, d = coefficients(4, (6,))
    arguments = {"b": b, "a": a, "d": d, "grid": 64, **change}
    with pytest.raises(error, match=message) as caught:
        rational_kernel(**arguments)
    assert "\n" not in str(caught.value)


def test_too_many_coefficients_for_the_points() -> None:
    with pytest.raises(ValueError, match="3 points"):
        evaluate_on_roots_of_unity(torch.zeros(4), 3)
    with pytest.raises(TypeError, match="real"):
        evaluate_on_roots_of_unity(torch.zeros(4, dtype=torch.complex64), 8)
