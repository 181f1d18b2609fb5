"""Balanced projections of recurrences with scalar gates, against loops over time in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gramian.shrinking._balancing import Gramians, changed
from gramian.shrinking._elimination import squared_errors
from gramian.shrinking._recurrence import Recurrence, gram

GROUPS, PER = 2, 3
SIZES = [(1, 1, 1), (3, 2, 5), (63, 5, 1), (257, 6, 4)]


def recurrence(length: int, n: int, width: int, epsilon: float | None = None) -> Recurrence:
    torch.manual_seed(length)
    wide = torch.randn(n, n, dtype=torch.float64)
    keys, queries = torch.randn(2, 2, GROUPS, length, n, dtype=torch.float64)
    return Recurrence(
        keys=keys @ wide,
        queries=queries @ torch.randn(n, n, dtype=torch.float64),
        values=torch.randn(2, GROUPS * PER, length, width, dtype=torch.float64),
        log_decays=-torch.rand(2, GROUPS * PER, length, 1, dtype=torch.float64),
        rates=torch.rand(2, GROUPS * PER, length, dtype=torch.float64),
        epsilon=epsilon,
    )


def loop(one: Recurrence) -> tuple[Tensor, Tensor]:
    """States (batch, heads, L, n, N) and outputs (batch, heads, L, N), step by step."""
    keys, queries = (x.repeat_interleave(PER, 1) for x in (one.keys, one.queries))
    assert one.rates is not None
    S = torch.zeros(*keys.shape[:2], keys.shape[-1], one.values.shape[-1], dtype=torch.float64)
    states, outputs = [], []
    for t in range(keys.shape[2]):
        write = one.rates[:, :, t, None] * one.values[:, :, t]
        S = (
            one.log_decays[:, :, t, :, None].exp() * S
            + keys[:, :, t, :, None] * write[..., None, :]
        )
        states.append(S)
        outputs.append((queries[:, :, t, :, None] * S).sum(-2))
    return torch.stack(states, 2), torch.stack(outputs, 2)


def gramians(one: Recurrence) -> Gramians:
    found = Gramians.of(GROUPS, one.keys.shape[-1])
    found.add(one)
    return found


@pytest.mark.parametrize("epsilon", [None, 1e-3])
@pytest.mark.parametrize(("length", "n", "width"), SIZES)
def test_gramians_are_those_of_the_loop(
    length: int, n: int, width: int, epsilon: float | None
) -> None:
    one = recurrence(length, n, width, epsilon)
    S, y = loop(one)
    size = S.square().sum((-2, -1), keepdim=True)
    weight = 1.0 if epsilon is None else 1 / (y.square().mean(-1) + epsilon)
    queries = one.queries.repeat_interleave(PER, 1)
    P = (S @ S.mT / size).unflatten(1, (GROUPS, PER)).sum((0, 2, 3))
    Q = queries[..., None] * queries[..., None, :] * (size[..., 0, 0] * weight)[..., None, None]
    found = gramians(one)
    torch.testing.assert_close(found.states, P)
    torch.testing.assert_close(found.queries, Q.unflatten(1, (GROUPS, PER)).sum((0, 2, 3)))
    assert found.count == 2 * PER * length


@pytest.mark.parametrize(("length", "n", "width"), SIZES)
def test_the_basis_is_balanced(length: int, n: int, width: int) -> None:
    found = gramians(recurrence(length, n, width))
    basis = found.balanced()
    P, Q = found.states / found.count, found.queries / found.count
    full = int((basis.singular_values > 1e-7 * basis.singular_values[:, :1]).sum(1).min())
    T_l, T_r = basis.keys[:, :full], basis.queries[:, :full].mT
    identity = torch.eye(full, dtype=torch.float64).expand(GROUPS, -1, -1)
    torch.testing.assert_close(T_l @ T_r, identity, rtol=0, atol=1e-6)
    left, right = T_l @ P @ T_l.mT, T_r.mT @ Q @ T_r
    products = left.diagonal(dim1=1, dim2=2) * right.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(products.sqrt(), basis.singular_values[:, :full])
    for matrix in (left, right):
        scale = matrix.diagonal(dim1=1, dim2=2).sqrt()
        scaled = matrix / scale[:, :, None] / scale[:, None]
        torch.testing.assert_close(scaled, identity, rtol=0, atol=1e-6)
    torch.testing.assert_close(basis.keys.norm(dim=-1), basis.queries.norm(dim=-1))
    spectrum = torch.linalg.eigvals(P @ Q).real.clamp(min=0).sqrt().sort(1, descending=True).values
    torch.testing.assert_close(basis.singular_values[:, :full], spectrum[:, :full])


@pytest.mark.each
@pytest.mark.parametrize("epsilon", [None, 1e-3])
@pytest.mark.parametrize(("length", "n", "width"), SIZES)
def test_the_error_is_exact_and_the_bound_holds(
    length: int, n: int, width: int, epsilon: float | None
) -> None:
    one = recurrence(length, n, width, epsilon)
    S, y = loop(one)
    basis = gramians(one).balanced()
    matrix = gram(changed(one, basis.keys, basis.queries))
    torch.testing.assert_close(matrix.sum(), (one.weights(y) * y).square().sum())
    for size in range(n + 1):
        generator = torch.Generator().manual_seed(size)
        drawn = [torch.randperm(n, generator=generator) for _ in range(GROUPS)]
        for order in (torch.arange(n).expand(GROUPS, n), torch.stack(drawn)):
            kept, dropped = order[:, :size], order[:, size:]
            T_l, T_r = (
                map.gather(1, kept[..., None].expand(-1, -1, n))
                for map in (basis.keys, basis.queries)
            )
            reduced = changed(one, T_l, T_r)
            states, outputs = loop(reduced)
            expected = T_l.repeat_interleave(PER, 0)[None, :, None] @ S
            torch.testing.assert_close(states, expected, rtol=1e-6, atol=1e-6)
            errors = (one.weights(y) * (y - outputs)).unflatten(1, (GROUPS, PER))
            squared = errors.square().sum((0, 2, 3, 4))
            whole = matrix.sum((1, 2)).max()
            torch.testing.assert_close(
                squared_errors(matrix, kept), squared, rtol=1e-6, atol=1e-9 * float(whole)
            )
            bound = basis.singular_values.gather(1, dropped).sum(1)
            mean = errors.norm(dim=-1).mean((0, 2, 3))
            assert (mean <= bound + 1e-6 * basis.singular_values[:, 0]).all()


def test_a_memory_without_full_rank_is_reduced_to_its_rank() -> None:
    one = recurrence(63, 6, 3)
    low = torch.randn(6, 2, dtype=torch.float64) @ torch.randn(2, 6, dtype=torch.float64)
    one = changed(one, low.expand(GROUPS, -1, -1), torch.eye(6).double().expand(GROUPS, -1, -1))
    basis = gramians(one).balanced()
    assert int((basis.keys.norm(dim=-1) > 0).sum()) == 2 * GROUPS
    assert not basis.keys.isnan().any()
    reduced = changed(one, basis.keys[:, :2], basis.queries[:, :2])
    torch.testing.assert_close(loop(reduced)[1], loop(one)[1])
    silent = Gramians.of(GROUPS, 3)
    silent.count = 1
    assert not silent.balanced().keys.any()


def test_only_one_gate_for_a_whole_state_commutes() -> None:
    from dataclasses import replace

    one = recurrence(3, 2, 2)
    assert one.scalar
    assert not replace(one, delta=True).scalar
    assert not replace(one, decay_rates=torch.ones(GROUPS * PER, 2)).scalar
    assert not replace(one, log_decays=one.log_decays.expand(-1, -1, -1, 2)).scalar
