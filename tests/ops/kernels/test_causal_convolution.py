"""The kernels of the convolution, in Triton's interpreter, against loops of their definitions."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gramian.ops import causal_convolution
from gramian.ops import convolution as operators
from gramian.ops.kernels import causal_convolution as module
from gramian.ops.kernels.causal_convolution import fused_convolution, fused_correlation

pytest.importorskip("triton")

LENGTHS = [1, 2, 3, 63, 255, 256, 257, 600]


def convolved(u: Tensor, kernel: Tensor) -> Tensor:
    """Return Σ_j kernel_j u_{t-j}, tap by tap."""
    y = torch.zeros_like(u)
    for j in range(kernel.shape[-1]):
        y[..., j:] += kernel[..., j, None] * u[..., : u.shape[-1] - j]
    return y


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide sequences into blocks of 256 samples, so that the tests have several."""
    monkeypatch.setattr(module, "_BLOCK", 256)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("taps", [1, 2, 256, 257, 258, None])
@pytest.mark.parametrize("multiplied", [False, True])
def test_the_operators_are_those_of_the_definition(
    length: int, taps: int | None, multiplied: bool
) -> None:
    taps = length if taps is None else taps
    if taps > length:
        pytest.skip("a kernel is not longer than the input")
    u, g, kernel = normal(3, 2, length), normal(3, 2, length) + 1, normal(1, 2, taps)
    factor = normal(3, 2, length).cos() if multiplied else None
    by = 1 if factor is None else factor
    leaves = u.clone().requires_grad_(), kernel.clone().requires_grad_()
    expected = convolved(*leaves) * by
    of_u, of_kernel = torch.autograd.grad(expected, leaves, g)
    y = fused_convolution(u, kernel, u, gate=factor)
    transposed = fused_convolution(g, kernel, u, factor=factor, adjoint=True)
    correlated = fused_correlation(g, u, kernel, factor=factor)
    for found, wanted in ((y, expected), (transposed, of_u), (correlated, of_kernel)):
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        assert (found - wanted).norm() <= 1e-13 * wanted.norm()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("shape", "own"),
    [
        ((), ()),
        ((3,), (1,)),
        ((3,), (3,)),
        ((2, 3, 2), (1, 3, 1)),
        ((2, 3, 2), (2, 1, 2)),
        ((2, 3, 2), (1, 1, 1)),
        ((1, 5), (1, 5)),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "time first", "reversed axes"])
def test_shapes_and_layouts(shape: tuple[int, ...], own: tuple[int, ...], layout: str) -> None:
    length, taps = 300, 280

    def laid_out(x: Tensor) -> Tensor:
        if layout == "time first":
            return x.movedim(-1, 0).contiguous().movedim(0, -1)
        if layout == "reversed axes":
            order = [*reversed(range(len(shape))), len(shape)]
            return x.permute(order).contiguous().permute(order)
        return x

    u, g = laid_out(normal(*shape, length)), laid_out(normal(*shape, length).sin())
    kernel = normal(*own, taps)
    leaves = u.clone().requires_grad_(), kernel.clone().requires_grad_()
    expected = convolved(*leaves)
    of_u, of_kernel = torch.autograd.grad(expected, leaves, g)
    y = fused_convolution(u, kernel, u)
    transposed = fused_convolution(g, kernel, u, adjoint=True)
    for found, wanted in ((y, expected), (transposed, of_u)):
        assert found.stride() == u.stride()
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(fused_correlation(g, u, kernel), of_kernel)


@pytest.mark.parametrize(
    ("length", "block"), [(3000, 2048), pytest.param(9000, 2048, marks=pytest.mark.slow)]
)
def test_single_precision_with_the_blocks_of_a_gpu(length: int, block: int) -> None:
    assert block == module._BLOCK
    u, kernel = normal(3, 1, length, dtype=torch.float32), normal(1, 1, length, dtype=torch.float32)
    points = 2 * length
    spectrum = torch.fft.rfft(u.double(), n=points) * torch.fft.rfft(kernel.double(), n=points)
    expected = torch.fft.irfft(spectrum, n=points)[..., :length]
    found = fused_convolution(u, kernel, u)
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_activations_in_half_precision() -> None:
    u, gate = normal(2, 3, 40, dtype=torch.bfloat16), normal(2, 3, 40).cos().bfloat16()
    kernel = normal(1, 3, 40, dtype=torch.float32)
    found = fused_convolution(u, kernel, u, gate=gate)
    expected = convolved(u.float(), kernel) * gate
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.bfloat16(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("length", [40, 600])
def test_other_rows_are_left_alone(value: float, length: int) -> None:
    u, kernel = normal(5, 2, length, dtype=torch.float32), normal(1, 2, length, dtype=torch.float32)
    expected = fused_convolution(u, kernel, u)
    u[2, 1, 7] = value
    found = fused_convolution(u, kernel, u)
    alone = torch.ones(5, 2, dtype=torch.bool)
    alone[2, 1] = False
    assert torch.equal(found[alone], expected[alone])
    assert not torch.equal(found[2, 1], expected[2, 1])


@pytest.mark.parametrize(("batch", "channels"), [(140_000, 1), (1, 70_000)])
def test_grids_are_those_that_a_gpu_has(
    batch: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Program:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *_, **__: None

    grids: list[tuple[int, ...]] = []
    programs = importlib.import_module("gramian.ops.kernels._causal_convolution")
    monkeypatch.setattr(programs, "convolve", Program())
    monkeypatch.setattr(programs, "correlate", Program())
    u, kernel = torch.zeros(1).expand(batch, channels, 1), torch.zeros(1).expand(1, channels, 1)
    monkeypatch.setattr(module, "_BLOCK", 4)  # little memory, for the programs do not run
    monkeypatch.setattr(module, "_LEAST", 4)
    fused_convolution(u, kernel, u)
    fused_correlation(u, u, kernel)
    assert grids and all(size <= 65_535 for grid in grids for size in grid[1:])


@pytest.mark.usefixtures("triton_on", "small_blocks")
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("gated", [False, True])
def test_the_operator_uses_the_kernels(
    dim: int, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs, gradients and gradients of gradients are those without the kernels."""
    monkeypatch.setattr(operators, "has_few_taps", lambda *_: False)
    calls = []

    def counted(*inputs: Tensor, **options: Tensor) -> Tensor:
        calls.append(inputs)
        return fused_convolution(*inputs, **options)

    monkeypatch.setattr(operators, "fused_convolution", counted)
    shape = (2, 3, 270) if dim == -1 else (2, 270, 3)
    u, gate = (normal(*shape, dtype=torch.float32).requires_grad_() for _ in range(2))
    kernel = (normal(3, 270, dtype=torch.float32) / 16).requires_grad_()
    leaves = [u, kernel, gate] if gated else [u, kernel]
    results = []
    for on in (True, False):
        monkeypatch.setattr(operators, "runs_in_triton", lambda _, on=on: on)
        before = len(calls)
        y = causal_convolution(u, kernel, gate=gate if gated else None, dim=dim)
        first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(one.square().sum() for one in first), leaves)
        results.append([y, *first, *second])
        assert (len(calls) > before) is on
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).norm() <= 2e-6 * wanted.norm()


@pytest.mark.usefixtures("triton_on")
def test_what_the_kernels_do_not_cover_is_computed_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: object, **__: object) -> Tensor:
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(operators, "has_few_taps", lambda *_: False)
    monkeypatch.setattr(operators, "fused_convolution", refused)
    u, kernel = normal(2, 3, 50), normal(3, 50)
    torch.testing.assert_close(causal_convolution(u, kernel), convolved(u, kernel))
    assert causal_convolution(u[:0], kernel).shape == (0, 3, 50)
    single = causal_convolution(u.float(), kernel.float(), save_spectra=True)
    torch.testing.assert_close(single, convolved(u, kernel).float())
    long = torch.ones(1, 2**15 + 1)
    assert causal_convolution(long, long[0, :4]).shape == long.shape
