"""Diagonal recurrences against a loop of their definition, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gramian.ops import diagonal_scan as module
from gramian.ops.diagonal_scan import apply_diagonal, diagonal_scan


def definition(a: Tensor, w: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    states, x = [], start
    for t in range(w.shape[-2]):
        states.append(x)
        x = a[..., t, :] * x + w[..., t, :]
    return torch.stack(states, dim=-2), x


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def system(length: int, seed: int = 0, channels: tuple[int, ...] = (2, 3)) -> list[Tensor]:
    """Gates of both signs, some of them zero and one."""
    a = torch.tanh(draw(*channels, length, 5, seed=seed))
    a[..., ::7, 0] = 0
    a[..., 1::5, 1] = 1
    return [a, draw(*channels, length, 5, seed=seed + 1), draw(*channels, 5, seed=seed + 2)]


@pytest.mark.pairs
@pytest.mark.parametrize("length", [1, 2, 3, 63, 257, 1000])
@pytest.mark.parametrize("step", [1, 300, 2**20])
@pytest.mark.parametrize("reverse", [False, True])
def test_states_are_those_of_the_definition(
    length: int, step: int, reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step after the other, a few stretches side by side, and as many as can be."""
    monkeypatch.setattr(module, "_CPU_STEP", step)
    a, w, start = system(length)
    states, end = module._scan(a, w, start, reverse)
    if reverse:
        a, w, states = (tensor.flip(-2) for tensor in (a, w, states))
    expected, last = definition(a, w, start)
    torch.testing.assert_close(states, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end, last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 40])
@pytest.mark.parametrize("step", [1, 300])
def test_gradients_of_any_order(length: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CPU_STEP", step)
    inputs = [tensor.requires_grad_() for tensor in system(length, channels=(2,))]
    got = [tensor.sin().sum() for tensor in diagonal_scan(*inputs)]
    wanted = [tensor.sin().sum() for tensor in definition(*inputs)]
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(
            torch.autograd.grad(
                one, inputs, retain_graph=True, allow_unused=True, materialize_grads=True
            ),
            torch.autograd.grad(
                other, inputs, retain_graph=True, allow_unused=True, materialize_grads=True
            ),
        )
    if length <= 2:
        assert torch.autograd.gradcheck(diagonal_scan, inputs)
        assert torch.autograd.gradgradcheck(diagonal_scan, inputs)


def test_memory_layouts_empty_sequences_and_single_precision() -> None:
    a, w, start = system(63)
    expected, last = definition(a, w, start)
    time_first = [tensor.movedim(-2, 0).contiguous().movedim(0, -2) for tensor in (a, w)]
    states, end = diagonal_scan(*time_first, start)
    assert states.stride() == time_first[1].stride()
    torch.testing.assert_close((states, end), (expected, last))
    shared = a[:, :1].expand_as(a)  # rows at a stride of zero
    torch.testing.assert_close(diagonal_scan(shared, w, start)[0], definition(shared, w, start)[0])
    single, _ = diagonal_scan(a.float(), w.float(), start.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-4)
    nothing, end = diagonal_scan(a[..., :0, :], w[..., :0, :], start)
    assert nothing.shape == (2, 3, 0, 5) and torch.equal(end, start)
    none, end = diagonal_scan(a[:0], w[:0], start[:0])
    assert none.shape == (0, 3, 63, 5) and end.shape == (0, 3, 5)


def test_outputs_of_a_system() -> None:
    a, B, start = system(63)
    C, D, u = draw(2, 3, 63, 5, seed=7), draw(2, 3, 63, seed=8), draw(2, 3, 63, seed=9)
    y, end = apply_diagonal(a, B, C, D, u, start)
    states, last = definition(a, B * u[..., None], start)
    torch.testing.assert_close(y, (C * states).sum(-1) + D * u)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_operator_keeps_pytorchs_rules(reverse: bool) -> None:
    inputs = [tensor.requires_grad_() for tensor in system(9)]
    torch.library.opcheck(module._scan, (*inputs, reverse))


def test_vmap_and_one_graph() -> None:
    a, w, start = system(20)
    for mapped in ((0, 0, 0), (None, 0, None), (1, 1, 1)):
        tensors = [
            tensor[0] if axis is None else tensor
            for tensor, axis in zip((a, w, start), mapped, strict=True)
        ]
        states, end = torch.func.vmap(diagonal_scan, mapped)(*tensors)
        for i in range(states.shape[0]):
            one = [
                tensor if axis is None else tensor.select(axis, i)
                for tensor, axis in zip(tensors, mapped, strict=True)
            ]
            torch.testing.assert_close((states[i], end[i]), diagonal_scan(*one))

    def loss(a: Tensor, w: Tensor, start: Tensor) -> Tensor:
        states, end = diagonal_scan(a, w, start)
        return states.square().sum() + end.sum()

    inputs = [tensor.requires_grad_() for tensor in (a, w, start)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs)
    )
