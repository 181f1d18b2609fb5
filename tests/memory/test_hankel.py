"""The loss on Hankel singular values, against numpy's SVD and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gramian import FIR, DenseOperator, Modal, TransferFunction
from gramian.filters import build
from gramian.memory import hankel_penalty


def ratio(taps: Tensor, count: int | None = None) -> float:
    """`Σ σ_i / σ_1` of the taps h_1 … h_{2n-1} by numpy's SVD."""
    g = taps.detach().double().numpy()
    side = (len(g) + 1) // 2
    values = np.linalg.svd(g[np.add.outer(range(side), range(side))], compute_uv=False)
    return float(values[:count].sum() / values[0])


def fir(taps: Tensor) -> FIR:
    """A filter whose taps after the first are `taps`."""
    return FIR(torch.nn.functional.pad(taps, (1, 0)))


def slope(taps: Tensor, direction: Tensor, step: float = 1e-6) -> float:
    return (ratio(taps + step * direction) - ratio(taps - step * direction)) / (2 * step)


@pytest.mark.parametrize("length", [2, 3, 4, 7, 63, 257])
def test_values_are_those_of_the_singular_values(length: int) -> None:
    kernel = torch.randn(3, 2, length + 2, dtype=torch.float64)
    used = kernel[..., 1 : 2 * (length // 2)].flatten(0, 1)
    expected = sum(map(ratio, used)) / 6
    assert hankel_penalty(FIR(kernel), length).item() == pytest.approx(expected, rel=1e-12)
    few = sum(ratio(taps, 2) for taps in used) / 6
    assert hankel_penalty(FIR(kernel), length, count=2).item() == pytest.approx(few, rel=1e-12)


def test_systems_count_equally_and_scale_does_not_matter() -> None:
    one, two = torch.randn(1, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    alone = [hankel_penalty(FIR(kernel), 8).item() for kernel in (one, two)]
    both = hankel_penalty([FIR(1e-9 * one), FIR(1e9 * two)], 8).item()
    assert both == pytest.approx(sum(alone) / 2, rel=1e-12)


@pytest.mark.parametrize("side", [1, 2, 3, 16])
def test_slopes_equal_finite_differences(side: int) -> None:
    taps = torch.randn(2 * side - 1, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(taps)
    (gradient,) = torch.autograd.grad(hankel_penalty(fir(taps), 2 * side), taps)
    wanted = slope(taps.detach(), direction)
    assert float(gradient @ direction) == pytest.approx(wanted, rel=1e-5, abs=1e-7)


def test_slopes_are_right_where_singular_values_repeat() -> None:
    taps = torch.tensor([3.0, 0, 0, 0, 1.25, 0, 0], dtype=torch.float64, requires_grad=True)
    index = torch.arange(4)
    values = torch.linalg.svdvals(taps.detach()[index + index[:, None]])
    assert values.tolist() == pytest.approx([3, 1.25, 1.25, 1.25])
    (gradient,) = torch.autograd.grad(hankel_penalty(fir(taps), 8), taps)
    for direction in (*torch.eye(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)):
        wanted = slope(taps.detach(), direction)
        assert float(gradient @ direction) == pytest.approx(wanted, abs=1e-6)


def test_slopes_are_right_where_the_largest_singular_value_repeats() -> None:
    # With taps of even index zero, H consists of two equal blocks: every value occurs twice.
    free = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def loss(free: Tensor) -> Tensor:
        taps = torch.stack([torch.zeros_like(free), free], -1).flatten()
        return hankel_penalty(fir(torch.nn.functional.pad(taps, (0, 1))), 12)

    assert torch.autograd.gradcheck(loss, free)


def test_a_delay_has_the_greatest_loss_and_no_slope() -> None:
    taps = torch.zeros(1, 9, dtype=torch.float64)
    taps[0, 4] = -0.3
    taps.requires_grad_()
    penalty = hankel_penalty(fir(taps), 10)  # all five singular values are 0.3
    (gradient,) = torch.autograd.grad(penalty, taps)
    assert penalty.item() == pytest.approx(5)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("length", [24, 257])
def test_slopes_are_right_where_the_matrix_lacks_rank(length: int) -> None:
    radius = torch.tensor([[0.9, 0.7], [0.8, 0.95]], dtype=torch.float64, requires_grad=True)
    angle = torch.tensor([[0.3, 2.0], [1.1, 0.2]], dtype=torch.float64, requires_grad=True)
    residues = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)

    def loss(radius: Tensor, angle: Tensor, residues: Tensor) -> Tensor:
        system = Modal(
            torch.polar(radius, angle), torch.view_as_complex(residues), radius.new_zeros(2)
        )
        return hankel_penalty(system, length)

    assert loss(radius, angle, residues).item() <= 4
    assert torch.autograd.gradcheck(loss, (radius, angle, residues))


def test_slopes_through_a_transfer_function() -> None:
    b = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    a = (0.2 * torch.randn(2, 3, dtype=torch.float64)).requires_grad_()

    def loss(b: Tensor, a: Tensor) -> Tensor:
        return hankel_penalty(TransferFunction(b, a, b[:, 0]), 20)

    assert torch.autograd.gradcheck(loss, (b, a))


def test_long_kernels_equal_the_dense_computation() -> None:
    side, count = 600, 12
    t = torch.arange(1, 2 * side, dtype=torch.float64)
    decaying = (-t / 90).exp() * (0.11 * t).cos() + 0.3 * (-t / 400).exp()
    rough = torch.randn(2 * side - 1, dtype=torch.float64) * (-t / 200).exp()
    kernels = torch.stack([decaying, rough]).requires_grad_()
    penalty = hankel_penalty(fir(kernels), 2 * side, count=count)
    expected = (ratio(kernels[0]) + ratio(kernels[1], count)) / 2
    assert penalty.item() == pytest.approx(expected, rel=1e-8)
    (gradient,) = torch.autograd.grad(penalty, kernels)
    index = torch.arange(side)
    for taps, found in zip(kernels.detach(), gradient, strict=True):
        u, values, vh = torch.linalg.svd(taps[index + index[:, None]])
        kept = [k for k in range(count) if values[k] > 1e-12 * values[0]]
        nuclear = values[kept].sum() / values[0]
        outer = (u[:, kept] @ vh[kept] - nuclear * u[:, :1] @ vh[:1]) / values[0] / 2
        flipped = outer.flip(-1)
        wanted = torch.stack([flipped.diagonal(side - 1 - s).sum() for s in range(2 * side - 1)])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_noise_of_single_precision_counts_as_zero() -> None:
    poles, residues = torch.tensor([[0.999 + 0j]]), torch.tensor([[1.0 + 0j]])
    system = Modal(poles, residues, torch.zeros(1))
    assert hankel_penalty(system, 512).item() == pytest.approx(1, abs=1e-6)


def test_filters_without_memory_have_neither_loss_nor_slope() -> None:
    taps = torch.zeros(2, 9, requires_grad=True)
    penalty = hankel_penalty(fir(taps), 10)
    penalty.backward()
    assert penalty.item() == 0 and bool((taps.grad == 0).all())


def test_taps_that_are_not_finite_give_nan() -> None:
    taps = torch.randn(2, 9)
    taps[1, 3] = torch.inf
    assert math.isnan(hankel_penalty(fir(taps), 10).item())


@pytest.mark.parametrize("kind", ["rtf", "s4d", "s4", "implicit", "modal", "explicit"])
def test_every_filter_becomes_smaller_by_descent(kind: str) -> None:
    torch.manual_seed(1)
    extra = {"modal": {"orders": 4}, "rtf": {"state_size": 8, "initialization": "xavier"}}
    extra["s4d"] = extra["s4"] = {"state_size": 8}
    filter = build({"type": kind, **extra.get(kind, {})}, channels=3, max_length=48)
    before = hankel_penalty(filter(48), 48)
    before.backward()
    slopes = [p.grad for p in filter.parameters() if p.grad is not None]
    size = torch.stack([g.square().sum() for g in slopes]).sum()
    assert float(size) > 0
    with torch.no_grad():
        for parameter in filter.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad / size.sqrt()
    after = hankel_penalty(filter(48), 48)
    assert (before - after).item() == pytest.approx(1e-3 * float(size.sqrt()), rel=0.2)


def test_bad_arguments_are_refused() -> None:
    system = FIR(torch.randn(2, 4))
    with pytest.raises(ValueError, match="length of at least 2 taps; got 1"):
        hankel_penalty(system, 1)
    with pytest.raises(ValueError, match="count must be at least 1 or None; got 0"):
        hankel_penalty(system, 4, count=0)
    with pytest.raises(TypeError, match=r"time-invariant systems, .*; got a DenseOperator"):
        hankel_penalty(DenseOperator(torch.eye(3)), 4)
    with pytest.raises(ValueError, match="no channels"):
        hankel_penalty([], 4)
