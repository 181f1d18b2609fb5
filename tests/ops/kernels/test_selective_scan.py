"""The kernel of the selective scan, in Triton's interpreter, against a loop of its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gramian.mixers import S6
from gramian.ops.kernels import selective_scan as module
from gramian.ops.kernels.selective_scan import selective_scan

pytest.importorskip("triton")


def definition(
    x: Tensor, dt: Tensor, rates: Tensor, B: Tensor, C: Tensor, D: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    h, outputs = start, []
    for t in range(x.shape[1]):
        step, u = dt[:, t, :, None], x[:, t, :, None]
        h = torch.exp(-step * rates) * h + step * u * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1) + D * x[:, t])
    return torch.stack(outputs, 1), h


def draw(
    batch: int, length: int, channels: int, states: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    sizes = (batch, length)
    made = [
        normal(*sizes, channels),
        torch.nn.functional.softplus(normal(*sizes, channels) - 1),
        normal(channels, states).exp(),
        normal(*sizes, states),
        normal(*sizes, states),
        normal(channels),
        normal(batch, channels, states),
    ]
    return [one.to(dtype).requires_grad_() for one in made]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 2), (1, 5, 3)])
def test_outputs_and_gradients_are_those_of_the_definition(
    length: int, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With chunks of 4 steps, lengths fall on their ends and beside them."""
    monkeypatch.setattr(module, "_CHUNK", 4)
    batch, channels, states = shape
    compare(draw(batch, length, channels, states), 1e-10)


@pytest.mark.parametrize("shape", [(2, 65, 16), (1, 130, 5)])
def test_channels_beyond_one_program(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 2)
    batch, channels, states = shape
    compare(draw(batch, 3, channels, states), 1e-10)


@pytest.mark.parametrize("length", [63, 257, pytest.param(1000, marks=pytest.mark.slow)])
def test_long_sequences(length: int) -> None:
    compare(draw(1, length, 2, 3), 1e-9)


def test_single_precision() -> None:
    compare(draw(2, 20, 5, 16, torch.float32), 1e-4)


def compare(inputs: list[Tensor], tolerance: float) -> None:
    results = []
    for run in (selective_scan, definition):
        y, end = run(*inputs)
        loss = (y * y.detach().cos()).sum() + (end * 0.5).sum()
        results.append([y, end, *torch.autograd.grad(loss, inputs)])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert (one - other).norm() <= tolerance * other.norm()


def test_only_outputs_or_only_the_state_may_be_used() -> None:
    inputs = draw(2, 5, 3, 2)
    for chosen in (0, 1):
        found = torch.autograd.grad(
            selective_scan(*inputs)[chosen].sum(), inputs, materialize_grads=True
        )
        wanted = torch.autograd.grad(
            definition(*inputs)[chosen].sum(), inputs, allow_unused=True, materialize_grads=True
        )
        torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("triton_on")
def test_an_s6_layer_uses_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mixer = S6(6, 5).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    calls = []

    def counted(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(inputs)
        return selective_scan(*inputs)

    monkeypatch.setattr("gramian.mixers.s6.selective_scan", counted)
    weights = [x, *mixer.parameters()]
    fast = mixer(x)
    found = torch.autograd.grad(fast.square().sum(), weights)
    assert len(calls) == 1
    monkeypatch.setattr("gramian.mixers.s6.runs_in_triton", lambda x: False)
    plain = mixer(x)
    wanted = torch.autograd.grad(plain.square().sum(), weights)
    assert len(calls) == 1
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(found, wanted)


def test_derivatives_of_second_order_are_refused() -> None:
    inputs = draw(1, 3, 2, 2)
    with pytest.raises(NotImplementedError, match="has first derivatives only"):
        torch.autograd.grad(selective_scan(*inputs)[0].sum(), inputs[:1], create_graph=True)
