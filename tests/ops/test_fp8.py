"""Maps in 8-bit floating point: derivatives in every way, devices and scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gramian.ops.fp8 import FP8Linear, quantize_fp8


def test_functional_derivatives_are_those_of_backward() -> None:
    torch.manual_seed(0)
    layer = FP8Linear(8, 5, (300.0, 3.0))  # the scale clamps some inputs
    x = torch.randn(2, 8, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert (x.grad == 0).any() and (x.grad != 0).any()
    functional = torch.func.grad(lambda u: layer(u).square().sum())(x.detach())
    torch.testing.assert_close(functional, x.grad)
    rows = torch.vmap(torch.func.grad(lambda u: layer(u).square().sum()))(x.detach())
    torch.testing.assert_close(rows, x.grad)
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x))
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), layer(x))


def test_forward_mode_is_refused_rather_than_rounded() -> None:
    layer = FP8Linear(8, 5, (2.0, 3.0)).requires_grad_(False)
    x = torch.randn(2, 8)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(layer, (x,), (x,))


def test_shapes_are_inferred_without_memory() -> None:
    layer = FP8Linear(8, 5, (2.0, 3.0)).to("meta")
    assert layer(torch.empty(2, 8, device="meta")).shape == (2, 5)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e300, 1e-320, True, "1"])
def test_scales_that_float32_cannot_multiply_by_are_refused(scale: Any) -> None:
    with pytest.raises(ValueError, match="scale must be a positive normal number of float32; got"):
        quantize_fp8(torch.zeros(2), scale)
    with pytest.raises(ValueError, match="two positive normal numbers of float32"):
        FP8Linear(2, 2, (1.0, scale))
