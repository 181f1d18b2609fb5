"""Closed loops against the triangular systems that define them."""

import pytest
import torch

from gramian.ops.feedback import feedback_kernel

LENGTHS = [1, 2, 3, 63, 257, 1000]


def open_loop(*channels: int, length: int) -> torch.Tensor:
    """Decaying kernels whose loop ``1 + K_vv`` has no zeros outside of the circle."""
    generator = torch.Generator().manual_seed(0)
    taps = torch.randn(*channels, 4, length, generator=generator, dtype=torch.float64)
    taps = taps * 0.9 ** torch.arange(length)
    taps[..., 3, :] *= 0.9 / taps[..., 3, :].abs().sum(-1, keepdim=True)
    return taps


def toeplitz(taps: torch.Tensor) -> torch.Tensor:
    """The matrices (…, L + 1, L + 1) of kernels given from lag 1 on."""
    length = taps.shape[-1] + 1
    return torch.nn.functional.pad(taps, (length, 0)).unfold(-1, length, 1).flip(-1)


def by_definition(taps: torch.Tensor) -> torch.Tensor:
    yu, yv, vu, vv = toeplitz(taps).unbind(-3)
    loop = torch.linalg.solve(torch.eye(taps.shape[-1] + 1, dtype=taps.dtype) + vv, vu[..., :1])
    return (yu[..., :1] - yv @ loop).squeeze(-1)[..., 1:]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("channels", [(), (3,), (2, 3)])
def test_is_the_solution_of_the_loop(channels, length):
    taps = open_loop(*channels, length=length)
    expected = by_definition(taps)
    scale = float(expected.abs().max())
    torch.testing.assert_close(feedback_kernel(taps), expected, rtol=0, atol=1e-10 * scale)
    single = feedback_kernel(taps, torch.float32)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=2e-7 * scale)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_gradcheck_and_gradgradcheck(length):
    taps = open_loop(2, length=length).requires_grad_()
    assert torch.autograd.gradcheck(feedback_kernel, (taps,))
    assert torch.autograd.gradgradcheck(feedback_kernel, (taps,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_long_kernels(dtype, monkeypatch):
    monkeypatch.setattr("gramian.ops.feedback._CPU_NUMBERS", 1)  # many blocks
    taps = open_loop(3, length=300).requires_grad_()
    g = torch.randn(3, 300, dtype=torch.float64)
    (expected,) = torch.autograd.grad(by_definition(taps), taps, g)
    for graph in (False, True):
        kernel = feedback_kernel(taps, dtype)
        (actual,) = torch.autograd.grad(kernel, taps, g.to(dtype), create_graph=graph)
        tolerance = 1e-9 if dtype == torch.float64 else 1e-6
        assert float((actual - expected).norm().detach() / expected.norm()) < tolerance


def test_opcheck_and_compile():
    taps = open_loop(2, length=9).requires_grad_()
    operators = torch.ops.gramian
    torch.library.opcheck(operators.feedback_kernel.default, (taps, True))
    g = torch.ones(2, 9, dtype=torch.float64)
    torch.library.opcheck(operators.feedback_kernel_backward.default, (g, taps.detach(), False))

    def loss(taps):
        return feedback_kernel(taps).square().sum()

    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(taps)
    torch.testing.assert_close(
        torch.autograd.grad(value, taps), torch.autograd.grad(loss(taps), taps)
    )
