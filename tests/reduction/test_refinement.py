"""Variable projection: its pieces against sums and differences, its result against scipy's."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch

from gramian import reduce
from gramian.filters import ImplicitFilter
from gramian.reduction import Balanced
from gramian.reduction.basis import (
    Modes,
    Vandermonde,
    geometric_sum,
    geometric_sums,
    geometric_tail_sums,
)
from gramian.reduction.refinement import _by_qr, _jacobian, _point, greedy_modes, refined, relocated

RIDGE = 1e-9


@torch.no_grad()
def implicit(channels, length, **settings):
    torch.manual_seed(3)
    filter = ImplicitFilter(channels, length, **settings).double()
    filter.reset_buffers()
    return filter().kernel


def spread(channels, pairs, reals=0, highest=0.97):
    """Modes whose poles lie apart."""
    width = pairs + reals
    decay = -torch.log(0.7 + (highest - 0.7) * torch.rand(channels, width, dtype=torch.float64))
    angle = torch.zeros(channels, width, dtype=torch.float64)
    angle[:, :pairs] = math.pi * (torch.arange(pairs) + 0.5) / max(pairs, 1)
    angle[:, pairs + reals // 2 :] = math.pi
    real = torch.zeros(channels, width, dtype=torch.bool)
    real[:, pairs:] = True
    return Modes(decay, angle, real, torch.ones_like(real))


def dense_basis(modes, length):
    """(B, 2m, T) by cumulative products."""
    poles = modes.poles.unsqueeze(-1)
    powers = poles.expand(*poles.shape[:-1], length - 1).cumprod(-1)
    powers = torch.cat([torch.ones_like(poles), powers], dim=-1)
    return torch.cat([powers.real, powers.imag], dim=1)


def projected_error(taps, modes):
    """φ by a dense least-squares solution, channel by channel."""
    basis = dense_basis(modes, taps.shape[-1])
    errors = []
    for rows, channel in zip(basis, taps, strict=True):
        solution, *_ = np.linalg.lstsq(rows.numpy().T, channel.numpy(), rcond=1e-14)
        errors.append(float(((channel.numpy() - rows.numpy().T @ solution) ** 2).sum()))
    return torch.tensor(errors, dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 100, 257])
def test_geometric_sums(count):
    radius = torch.tensor([0.0, 0.3, 0.99, 1 - 1e-9, 1.0, 1.02], dtype=torch.float64)
    angle = torch.tensor([0.0, 1e-7, 1e-2, 1.0, math.pi], dtype=torch.float64)
    z = torch.polar(radius.unsqueeze(-1), angle)
    time = torch.arange(count, dtype=torch.float64)
    powers = z.unsqueeze(-1).expand(*z.shape, max(count - 1, 0)).cumprod(-1)
    powers = torch.cat([torch.ones_like(z).unsqueeze(-1), powers], dim=-1)
    for p, found in enumerate(geometric_sums(z, count)):
        # The size of the terms, not of the sum, is what rounding is relative to.
        size = (time**p * powers.abs()).sum(-1)
        assert float(
            ((found - (time**p * powers).sum(-1)).abs() / size.clamp(min=1e-300)).max()
        ) < (1e-13 * count)
    torch.testing.assert_close(geometric_sum(z, count), geometric_sums(z, count)[0])


@pytest.mark.parametrize("length", [1, 5, 64])
def test_tails_of_geometric_sums(length):
    z = torch.polar(
        torch.tensor([0.0, 0.5, 0.9, 0.99], dtype=torch.float64), torch.tensor(1.0).double()
    )
    found = geometric_tail_sums(z, geometric_sums(z, length), length)
    for p, tail in enumerate(found):
        whole = geometric_sums(z, 20_000)[p]
        exact = whole - geometric_sums(z, length)[p]
        torch.testing.assert_close(tail, exact, rtol=1e-9, atol=1e-9 * float(whole.abs().max()))


@pytest.mark.parametrize("length", [1, 2, 3, 63, 257, 1000])
def test_vandermonde_products(length):
    modes = spread(3, 3, 2)
    taps = torch.randn(3, length, dtype=torch.float64)
    basis = dense_basis(modes, length)
    time = torch.arange(length, dtype=torch.float64)
    kernels = Vandermonde(modes.poles, length)
    zeroth, first = kernels.moments(taps)
    for found, weights in ((zeroth, taps), (first, time * taps)):
        exact = (basis @ weights.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(torch.cat([found.real, found.imag], dim=-1), exact)
    residues = torch.randn(3, 5, dtype=torch.complex128)
    weights = torch.cat([residues.real, -residues.imag], dim=-1).unsqueeze(1)
    torch.testing.assert_close(kernels.combine(residues), (weights @ basis).squeeze(1))


@pytest.mark.parametrize(("pairs", "reals"), [(1, 0), (0, 1), (3, 2), (0, 2), (6, 1)])
@pytest.mark.parametrize("length", [40, 257])
def test_error_and_gradient_against_differences(pairs, reals, length):
    modes, taps = spread(4, pairs, reals), torch.randn(4, length, dtype=torch.float64)
    point = _point(taps, modes, RIDGE, False)
    torch.testing.assert_close(point.error, projected_error(taps, modes), rtol=1e-9, atol=1e-12)
    # φ falls by 2 Jᵀ target, in (log-radius, angle).
    slope = -2 * (point.jacobian.mT @ point.target.unsqueeze(-1)).squeeze(-1)
    width, step = pairs + reals, 1e-6
    for i in range(2 * width):
        change = torch.zeros(4, 2 * width, dtype=torch.float64)
        change[:, i] = step
        if i >= width and bool(modes.real[0, i - width]):
            assert float(slope[:, i].abs().max()) == 0
            continue
        ends = []
        for sign in (1, -1):
            moved = Modes(
                modes.decay - sign * change[:, :width],
                modes.angle + sign * change[:, width:],
                modes.real,
                modes.present,
            )
            ends.append(projected_error(taps, moved))
        scale = float(point.error.max())
        torch.testing.assert_close(
            slope[:, i], (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-7 * scale
        )


def test_jacobian_is_kaufmans():
    """``JᵀJ`` is that of the derivative of Φ c with the part in Φ removed."""
    modes, taps = spread(2, 3, 1), torch.randn(2, 120, dtype=torch.float64)
    point = _point(taps, modes, RIDGE, False)
    time = torch.arange(120, dtype=torch.float64)
    for b in range(2):
        basis = dense_basis(modes, 120)[b]
        keep = basis.norm(dim=-1) > 0
        q, _ = torch.linalg.qr(basis[keep].mT)
        powers = torch.complex(*basis.unflatten(0, (2, -1)))
        moved = time * powers * point.residues[b].unsqueeze(-1)
        columns = torch.cat([moved.real, -moved.imag]).mT
        columns[:, 4:][:, modes.real[b]] = 0
        columns = columns - q @ (q.mT @ columns)
        torch.testing.assert_close(
            point.jacobian[b].mT @ point.jacobian[b], columns.mT @ columns, rtol=1e-7, atol=1e-9
        )


def test_the_factor_by_qr_is_that_of_the_gram_matrix():
    modes, taps = spread(3, 4, 1), torch.randn(3, 200, dtype=torch.float64)
    poles = modes.poles
    basis = dense_basis(modes, 200)
    time = torch.arange(200, dtype=torch.float64)
    norm = torch.cat([basis, time * basis], dim=1).norm(dim=-1)
    scale = torch.where(norm > 0, 1 / norm, 0)
    error, residues, inner, target = _by_qr(taps, poles, scale, RIDGE)
    point = _point(taps, modes, RIDGE, False)
    torch.testing.assert_close(error, point.error, rtol=1e-8, atol=0)
    torch.testing.assert_close(residues, point.residues, rtol=1e-6, atol=1e-9)
    jacobian = _jacobian(inner, residues, scale, scale > 0)
    for mine, exact in (
        (jacobian.mT @ jacobian, point.jacobian.mT @ point.jacobian),
        (jacobian.mT @ target.unsqueeze(-1), point.jacobian.mT @ point.target.unsqueeze(-1)),
    ):
        torch.testing.assert_close(mine, exact, rtol=1e-6, atol=1e-8)


def test_the_infinite_horizon_is_a_long_one():
    modes, taps = spread(3, 3, 1, highest=0.9), torch.randn(3, 50, dtype=torch.float64)
    long = torch.nn.functional.pad(taps, (0, 800))
    here, there = _point(taps, modes, RIDGE, True), _point(long, modes, RIDGE, False)
    torch.testing.assert_close(here.error, there.error)
    torch.testing.assert_close(here.residues, there.residues)
    slopes = [(p.jacobian.mT @ p.target.unsqueeze(-1)).squeeze(-1) for p in (here, there)]
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-9)


def test_descends_as_far_as_scipy():
    taps = implicit(6, 300, frequency=2.0)[:, 1:]
    modes = greedy_modes(taps, torch.full((6,), 8))
    found, errors = refined(
        taps, modes, ridge=0.0, limit=1e-9, infinite=False, steps=200, tolerance=1e-12
    )
    torch.testing.assert_close(projected_error(taps, found), errors, rtol=1e-6, atol=0)
    for b in range(6):

        def residual(x, b=b):
            m = Modes(
                torch.from_numpy(x[None, :4]).clamp(min=1e-9),
                torch.from_numpy(x[None, 4:]),
                modes.real[:1],
                modes.present[:1],
            )
            basis = dense_basis(m, taps.shape[-1])[0].numpy().T
            return taps[b].numpy() - basis @ np.linalg.lstsq(basis, taps[b].numpy(), rcond=None)[0]

        start = torch.cat([modes.decay[b], modes.angle[b]]).numpy()
        theirs = scipy.optimize.least_squares(residual, start, x_scale="jac", max_nfev=200)
        assert float(errors[b]) <= 1.02 * float((theirs.fun**2).sum())


def test_poles_stay_where_they_may():
    time = torch.arange(200, dtype=torch.float64)
    growing = (1.01**time * torch.cos(0.3 * time)).unsqueeze(0)
    start = Modes.of(torch.polar(torch.tensor([[0.98]]).double(), torch.tensor([[0.29]]).double()))
    arguments = {"ridge": 0.0, "infinite": False, "steps": 50}
    held, _ = refined(growing, start, limit=1e-6, **arguments)
    assert float(held.decay.min()) >= 1e-6
    free, error = refined(growing, start, limit=None, **arguments)
    torch.testing.assert_close(free.decay, torch.tensor([[-math.log(1.01)]]).double())
    assert float(error) < 1e-6 * float(growing.square().sum())


def test_real_poles_stay_real_and_keep_their_sign():
    modes = spread(1, 1, 2)
    kernel = torch.randn(1, 90, dtype=torch.float64)
    found, _ = refined(kernel, modes, ridge=0.0, limit=1e-9, infinite=False, steps=20)
    poles = found.poles[0]
    assert poles[1:].imag.tolist() == [0, 0]
    assert float(poles[1].real) > 0 > float(poles[2].real)


@pytest.mark.parametrize("order", [1, 2, 5, 8])
def test_greedy_poles_are_found_where_they_are(order):
    time = torch.arange(400, dtype=torch.float64)
    angles = 0.3 + 0.5 * torch.arange(order // 2)
    taps = (torch.exp(-0.01 * time) * torch.cos(angles.unsqueeze(-1) * time)).sum(0)
    taps = (taps + (order % 2) * 0.5 * torch.exp(-0.1 * time)).unsqueeze(0)
    modes = greedy_modes(taps, torch.tensor([order]))
    assert int((modes.present.long() * (2 - modes.real.long())).sum()) == order
    _, error = refined(taps, modes, ridge=0.0, limit=1e-9, infinite=False, steps=60)
    assert float(error) < 1e-8 * float(taps.square().sum())


def test_a_mode_that_nothing_misses_is_moved_to_what_is_missed():
    time = torch.arange(300, dtype=torch.float64)
    taps = (0.99**time * (torch.cos(0.4 * time) + torch.cos(1.7 * time))).unsqueeze(0)
    decay = torch.full((1, 2), 0.01, dtype=torch.float64)
    angle = torch.tensor([[0.4, 2.9]], dtype=torch.float64)
    kept = torch.ones(1, 2, dtype=torch.bool)
    moved, movable = relocated(taps, Modes(decay, angle, ~kept, kept))
    assert movable.tolist() == [True]
    assert sorted(moved.angle[0].tolist()) == pytest.approx([0.4, 1.7], abs=0.02)


SETS = {
    "published": ({}, 0.9, 512),
    "frequency 1": ({"frequency": 1.0}, 0.9, 1024),
    "few features": ({"embedding_features": 5}, 0.9, 512),
    "smooth": ({"embedding_features": 5, "frequency": 1.0}, None, 1024),
}


@pytest.mark.each
@pytest.mark.parametrize("name", SETS)
def test_refined_errors_are_smaller(name, dtype):
    settings, part, length = SETS[name]
    kernel = implicit(24, length, **settings).to(dtype)
    plain, better = reduce(kernel, 16, method=Balanced(refine=False)), reduce(kernel, 16)
    if name == "smooth":  # the closed form is at the rounding error already
        close = 1e-7 if dtype == torch.float32 else 1e-10
        assert float(plain.relative_error.mean()) <= close
    else:
        assert float(better.relative_error.mean()) <= part * float(plain.relative_error.mean())
    assert bool((better.relative_error <= 1.001 * plain.relative_error).all())
    assert bool((better.order <= 16).all())


@pytest.mark.each
@pytest.mark.parametrize("tail", ["zero", "free"])
@pytest.mark.parametrize("length", [1, 2, 3, 63, 257, 1000])
@pytest.mark.parametrize("highest", [17, pytest.param(40, marks=pytest.mark.slow)])
def test_no_channel_is_worse_for_being_refined(smooth_kernel, tail, length, highest):
    kernel = torch.cat([smooth_kernel(2, length, 1e-3), torch.randn(2, length).double()])
    for order in sorted({min(n, max(1, length - 1)) for n in (1, 7, highest)}):
        plain = reduce(kernel, order, tail=tail, method=Balanced(refine=False))
        better = reduce(kernel, order, tail=tail)
        assert bool((better.relative_error <= plain.relative_error * (1 + 1e-9)).all())
        assert bool((better.order <= order).all())


def test_a_silent_tail_stays_silent(smooth_kernel):
    kernel = smooth_kernel(12, 300, 1e-2)
    plain, better = (
        reduce(kernel, 6, tail="zero", method=Balanced(refine=r)) for r in (False, True)
    )
    whole = [r.relative_error.square() + r.tail_energy for r in (plain, better)]
    assert bool((whole[1] <= whole[0] * (1 + 1e-6)).all())
    assert float(better.relative_error.mean()) < float(plain.relative_error.mean())


def test_refinement_lowers_the_order_that_a_tolerance_needs():
    kernel = implicit(8, 300, frequency=1.0)
    for tol in (0.1, 1e-2):
        plain, better = (reduce(kernel, tol=tol, method=Balanced(refine=r)) for r in (False, True))
        assert bool(better.converged.all())
        assert bool((better.relative_error <= tol).all())
        assert bool((better.order <= plain.order).all())
        assert int(better.order.sum()) < int(plain.order.sum())


def test_under_a_tolerance_the_quieter_fit_is_taken():
    kernel = implicit(16, 300, embedding_features=5, frequency=1.0)
    tol = 1e-2
    chosen = reduce(kernel, tol=tol)
    assert bool((chosen.relative_error <= tol).all())
    ringing = chosen.tail_energy > tol**2
    assert bool(ringing.any())
    for b in torch.nonzero(ringing).flatten().tolist():
        fading = reduce(kernel[b], int(chosen.order[b]), tail="zero")
        if float(fading.relative_error) <= tol:
            assert float(chosen.tail_energy[b]) <= float(fading.tail_energy) * (1 + 1e-4)
    free = reduce(kernel, tol=tol, tail="free")
    assert float(chosen.tail_energy.sum()) < float(free.tail_energy.sum())
