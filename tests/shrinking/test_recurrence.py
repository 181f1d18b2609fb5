"""The Gram matrix of contributions, against a loop over time in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gramian.shrinking._elimination import eliminate, squared_errors
from gramian.shrinking._recurrence import Recurrence, gram

LENGTHS = (1, 2, 31, 32, 33, 63, 257)
KINDS = ("scalar", "vector", "channels", "delta", "constant", "normalized", "normalized delta")


def recurrence(kind: str, length: int, seed: int = 0) -> Recurrence:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    batch, groups, heads, n, width = 2, 2, 4, 5, 3
    if kind == "channels":
        groups, width = 1, 1
    keys, queries = draw(batch, groups, length, n), draw(batch, groups, length, n)
    values = draw(batch, heads, length, width)
    logs, rates, factors = -draw(batch, heads, length, 1).exp() / 4, None, None
    if kind in ("vector", "constant"):
        shape = (batch, heads, length, n) if kind == "vector" else (1, heads, 1, n)
        logs = -draw(*shape).exp() / 4
    if kind == "channels" or "delta" in kind:
        rates = draw(batch, heads, length).sigmoid()
    if kind == "channels":
        factors = draw(heads, n).exp()
    if "delta" in kind:
        keys = keys / keys.norm(dim=-1, keepdim=True)
    epsilon = 0.1 if "normalized" in kind else None
    return Recurrence(keys, queries, values, logs, factors, rates, "delta" in kind, epsilon)


def contributions(r: Recurrence) -> Tensor:
    """z (batch, heads, L, n, N), divided by the root mean square of a token's outputs."""
    z = parts(r)
    if r.epsilon is None:
        return z
    return z / (z.sum(-2, keepdim=True).square().mean(-1, keepdim=True) + r.epsilon).sqrt()


def parts(r: Recurrence, kept: Tensor | None = None) -> Tensor:
    """z (batch, heads, L, n, N), by a loop; coordinates that are not kept are zero."""
    batch, heads, length, width = r.values.shape
    per, n = heads // r.keys.shape[1], r.keys.shape[-1]
    keys, queries = (x.repeat_interleave(per, 1) for x in (r.keys, r.queries))
    if kept is not None:
        held = torch.zeros(r.keys.shape[1], n, dtype=torch.float64).scatter_(1, kept, 1.0)
        held = held.repeat_interleave(per, 0)[:, None]
        keys, queries = keys * held, queries * held
    logs = r.log_decays.expand(batch, heads, length, r.log_decays.shape[-1])
    logs = logs if r.decay_rates is None else logs * r.decay_rates[:, None]
    rates = torch.ones(batch, heads, length, dtype=torch.float64) if r.rates is None else r.rates
    state = torch.zeros(batch, heads, n, width, dtype=torch.float64)
    found = []
    for t in range(length):
        k, q, u = keys[:, :, t], queries[:, :, t], r.values[:, :, t]
        state = logs[:, :, t].exp().unsqueeze(-1) * state
        if r.delta:
            u = u - (k.unsqueeze(-1) * state).sum(-2)
        state = state + k.unsqueeze(-1) * (rates[:, :, t, None] * u).unsqueeze(-2)
        found.append(q.unsqueeze(-1) * state)
    return torch.stack(found, dim=2)


@pytest.mark.each
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gram_matrix_is_that_of_a_loop_over_time(kind: str, length: int) -> None:
    r = recurrence(kind, length)
    z = contributions(r).unflatten(1, (r.keys.shape[1], -1))
    expected = torch.einsum("bghlid,bghljd->gij", z, z)
    torch.testing.assert_close(gram(r), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "delta" not in kind])
def test_the_predicted_error_is_the_change_of_the_outputs(kind: str) -> None:
    r = recurrence(kind, 130, seed=1)
    order, errors = eliminate(gram(r))
    whole = parts(r).sum(-2)
    sizes = torch.ones(())
    if r.epsilon is not None:
        sizes = (whole.square().mean(-1, keepdim=True) + r.epsilon).sqrt()
    for k in range(r.keys.shape[-1] + 1):
        kept = order[:, r.keys.shape[-1] - k :]
        change = ((whole - parts(r, kept).sum(-2)) / sizes).square().sum()
        torch.testing.assert_close(errors[:, k].sum(), change, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            squared_errors(gram(r), kept).sum(), change, rtol=1e-9, atol=1e-12
        )


def test_gates_that_forget_everything_at_once_are_no_division_by_zero() -> None:
    r = recurrence("scalar", 70)
    logs = r.log_decays.clone()
    logs[:, :, ::7] = -1e4
    r = Recurrence(r.keys, r.queries, r.values, logs)
    z = contributions(r).unflatten(1, (2, -1))
    expected = torch.einsum("bghlid,bghljd->gij", z, z)
    torch.testing.assert_close(gram(r), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_is_near_double_precision(kind: str) -> None:
    r = recurrence(kind, 257)
    tensors = (r.keys, r.queries, r.values, r.log_decays, r.decay_rates, r.rates)
    singles = (x if x is None else x.float() for x in tensors)
    single = Recurrence(*singles, delta=r.delta, epsilon=r.epsilon)
    expected = gram(r)
    assert float((gram(single) - expected).norm() / expected.norm()) < 1e-5
