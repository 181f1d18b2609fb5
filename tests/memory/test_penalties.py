"""Losses on memory, against formulas on matrices and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gramian import FIR, DenseOperator, TimeVarying
from gramian.memory import ess_penalty, gate_regularizer
from tests.ess.conftest import attention, entropy_by_definition, make


def transitions(system: TimeVarying) -> torch.Tensor:
    """(*C, L, n, n)."""
    if system.A.ndim > system.B.ndim:
        return system.A
    dense = torch.diag_embed(system.A)
    if system.p is not None and system.q is not None:
        dense = dense + system.p.unsqueeze(-1) * system.q.unsqueeze(-2)
    return dense


@pytest.mark.parametrize("length", [1, 2, 3, 63])
@pytest.mark.parametrize("kind", ["diagonal", "delta", "dense"])
def test_gate_regularizer_is_the_distance_from_the_identity(kind: str, length: int) -> None:
    systems = [make(kind, length, (2, 3), order) for order in (1, 5)]
    expected = []
    for system in systems:
        total = torch.zeros((), dtype=torch.float64)
        for A in transitions(system).flatten(0, 2):
            total += torch.linalg.matrix_norm(A - torch.eye(len(A))).square() / len(A)
        expected.append((total / (6 * length)).sqrt())
    torch.testing.assert_close(gate_regularizer(systems), sum(expected) / 2)
    torch.testing.assert_close(gate_regularizer(systems[1]), expected[1])


@pytest.mark.parametrize("kind", ["diagonal", "delta", "dense"])
def test_without_normalization_it_is_the_frobenius_norm(kind: str) -> None:
    systems = [make(kind, 7, (2, 3), order) for order in (1, 5)]
    expected = [
        torch.linalg.vector_norm(transitions(system) - torch.eye(system.order))
        for system in systems
    ]
    found = gate_regularizer(systems, normalize=False)
    torch.testing.assert_close(found, (expected[0] + expected[1]) / 2)
    scaled = (6 * 7 * 5) ** 0.5 * gate_regularizer(systems[1])
    torch.testing.assert_close(gate_regularizer(systems[1], normalize=False), scaled)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["diagonal", "delta", "dense"])
def test_gradient_of_the_gate_regularizer(kind: str, normalize: bool) -> None:
    system = make(kind, 5, (2,), 3)
    fields = [x.detach().requires_grad_() for x in (system.A, system.p, system.q) if x is not None]

    def loss(A: torch.Tensor, *pq: torch.Tensor) -> torch.Tensor:
        system_ = TimeVarying(A, system.B, system.C, system.D, *pq)
        return gate_regularizer(system_, normalize=normalize)

    assert torch.autograd.gradcheck(loss, fields)


def test_gates_of_one_have_neither_distance_nor_slope() -> None:
    system = make("diagonal", 4)
    A = torch.ones_like(system.A).requires_grad_()
    loss = gate_regularizer(TimeVarying(A, system.B, system.C, system.D))
    loss.backward()
    assert loss.item() == 0 and bool((A.grad == 0).all())


@pytest.mark.parametrize("kind", ["diagonal", "delta", "dense"])
def test_steps_of_padding_do_not_count(kind: str) -> None:
    system = make(kind, 9, (2,), 3)
    real = torch.tensor([False, True, True, True, False, True, False, False, True])
    at = real.reshape(-1, *(1,) * (system.A.ndim - system.D.ndim))
    nothing = torch.eye(3).to(system.A) if kind == "dense" else torch.ones(3).to(system.A)
    padded = TimeVarying(
        torch.where(at, system.A, nothing),
        system.B * real[:, None],
        system.C,
        system.D,
        None if system.p is None else system.p * real[:, None],
        system.q,
    )
    pq = [None if x is None else x[..., real, :] for x in (system.p, system.q)]
    A = system.A[:, real]
    alone = TimeVarying(A, system.B[:, real], system.C[:, real], system.D[:, real], *pq)
    torch.testing.assert_close(gate_regularizer(padded), gate_regularizer(alone))


def test_operators_without_gates_are_passed_over() -> None:
    gated = make("delta", 6)
    other = DenseOperator(attention(2, length=6))
    torch.testing.assert_close(gate_regularizer([other, gated]), gate_regularizer(gated))
    with pytest.raises(ValueError, match="TimeVarying"):
        gate_regularizer([other])
    with pytest.raises(TypeError, match="Tensor"):
        gate_regularizer([other.entries])  # type: ignore[list-item]


@pytest.mark.parametrize("kind", ["diagonal", "delta", "operator"])
def test_penalty_is_the_distance_of_state_sizes(kind: str) -> None:
    system, at = make(kind, 24), [6, 12, 18]
    sizes = torch.stack([torch.tensor(entropy_by_definition(T, at)) for T in system.matrix()])
    expected = (sizes / 3 - 1).square().mean()
    torch.testing.assert_close(ess_penalty(system, 3.0), expected)
    there = torch.tensor([6.0, 12.0, 18.0]) if kind == "operator" else torch.full((3,), 6.0)
    expected = (sizes / there - 0.5).square().mean()
    torch.testing.assert_close(ess_penalty(system, share=0.5), expected)
    expected = (sizes[:, 1] / 2 - 1).square().mean()
    torch.testing.assert_close(ess_penalty([system, system], 2.0, at=[12]), expected)


@pytest.mark.parametrize("kind", ["diagonal", "delta", "dense", "operator"])
def test_gradient_of_the_penalty(kind: str) -> None:
    system: Any = make(kind, 7, (2,), 2)
    names = ["matrix"] if kind == "operator" else ["A", "B", "C", "D", "p", "q"]
    if kind == "operator":
        entries = system.entries.detach().requires_grad_()
        assert torch.autograd.gradcheck(lambda T: ess_penalty(DenseOperator(T), 2.0), [entries])
        return
    fields = [getattr(system, n) for n in names if getattr(system, n) is not None]
    fields = [field.detach().clone().requires_grad_() for field in fields]  # B is q
    fast = kind != "diagonal"  # in one random direction, in which all fields have part
    assert torch.autograd.gradcheck(
        lambda *f: ess_penalty(TimeVarying(*f), share=0.9), fields, fast_mode=fast
    )


def test_descending_the_penalty_reaches_the_target() -> None:
    system = make("diagonal", 32, (1,), 8)
    logits = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)

    def loss() -> torch.Tensor:
        A = logits.sigmoid().expand_as(system.A)
        return ess_penalty(TimeVarying(A, system.B, A * system.C, system.D), 4.0, at=[16])

    first = loss().item()
    for _ in range(100):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    assert loss().item() < 1e-3 < first


def test_what_is_refused() -> None:
    system = make("diagonal", 8)
    with pytest.raises(ValueError, match="one of the two"):
        ess_penalty(system)
    with pytest.raises(ValueError, match="one of the two"):
        ess_penalty(system, 3.0, share=0.5)
    for target in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive state-size"):
            ess_penalty(system, target)
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="share must lie"):
            ess_penalty(system, share=share)
    with pytest.raises(ValueError, match="no channels and positions"):
        ess_penalty([], 2.0)
    with pytest.raises(ValueError, match="has no end"):
        ess_penalty(FIR(torch.randn(2, 9)), 2.0)
