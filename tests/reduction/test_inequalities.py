"""Every inequality that a `Reduction` states, on thousands of random reductions, none violated.

Figures are recomputed here with numpy in float64, from the returned poles and residues.
"""

import numpy as np
import pytest
import scipy.signal
import torch

from gramian import reduce
from gramian.reduction import Balanced, Gradient


def mixed_kernels(families, count, length, draw):
    makers = list(families.values())
    rows = [makers[k % len(makers)](draw, length) for k in range(count)]
    return torch.from_numpy(np.stack(rows))


def kernels(make, count, length, draw):
    return torch.from_numpy(np.stack([make(draw, length) for _ in range(count)]))


METHODS = [
    {"method": "balanced"},
    {"method": Balanced(refine=False)},
    {"method": "modal"},
    {"method": Gradient(steps=5)},
]
LENGTHS = [2, 3, 4, 9, 16, 33, 64, 101, 200]
SLACK = 1e-9


def taps_of(reduction, length):
    """Taps of the returned system, and the l1 norm of what rounding may make of their sums."""
    system = reduction.system
    poles, residues = (x.to(torch.complex128).numpy() for x in (system.poles, system.residues))
    powers = np.ones((*poles.shape, max(length - 1, 1)), dtype=complex)
    powers[..., 1:] = poles[..., None]
    terms = residues[..., None] * np.cumprod(powers, axis=-1)
    taps = np.concatenate([system.d.double().numpy()[..., None], terms.real.sum(-2)], axis=-1)
    return taps[..., :length], 1e-13 * np.abs(terms).sum((-2, -1))


def check(reduction, kernel, asked, stable, draw):
    kernel = kernel.double().numpy()
    length = kernel.shape[-1]
    norm = np.linalg.norm(kernel, axis=-1)
    taps, noise = taps_of(reduction, length)
    error = kernel - taps
    size = np.maximum(norm, 1e-300)
    figures = {
        name: getattr(reduction, name).double().numpy()
        for name in ("relative_error", "lower_bound", "l1_error", "hankel_error", "tail_energy")
    }
    assert all(not np.isnan(figure).any() for figure in figures.values())

    # What is measured.
    relative = np.where(norm > 0, np.linalg.norm(error, axis=-1) / size, 0)
    off = np.abs(figures["relative_error"] - relative)
    assert (off <= 1e-6 * relative + noise / size + 1e-12).all()
    l1 = np.abs(error).sum(-1)
    assert (np.abs(figures["l1_error"] - l1) <= 1e-6 * l1 + noise + 1e-12 * norm).all()
    orders = reduction.order.numpy()
    poles = np.where(
        reduction.system.residues.numpy() != 0, reduction.system.poles.abs().numpy(), 0
    )
    radius = poles.max(-1, initial=0)
    assert (orders <= asked).all()
    assert (radius < 1).all() or not stable
    fading = radius < 0.9  # the tail has died out within the horizon
    tail, roundoff = taps_of(reduction, length + 400)
    energy = np.linalg.norm(tail[:, length:], axis=-1) / size
    roundoff = roundoff / size + 1e-5 * energy
    assert (
        np.abs(np.sqrt(figures["tail_energy"]) - energy)[fading] <= 1e-9 + roundoff[fading]
    ).all()
    assert np.isinf(figures["tail_energy"][(radius >= 1) & (norm > 0)]).all()

    # What is bounded.
    assert (figures["lower_bound"] <= figures["relative_error"] * (1 + SLACK) + 1e-15).all()
    values = reduction.hankel_singular_values.numpy()
    for k in range(len(kernel)):
        if orders[k] < values.shape[-1] and not np.isnan(values[k, orders[k]]):
            missed = values[k, orders[k]]
            # The norm is accurate to 1e-4, where the iteration finds it.
            assert missed <= figures["hankel_error"][k] * (1 + 1e-3) + 1e-12 * values[k, 0]
    worst = np.sign(error)[:, ::-1]
    for u in (worst, draw.standard_normal(kernel.shape)):
        output = np.stack([np.convolve(e, x)[:length] for e, x in zip(error, u, strict=True)])
        gain = np.abs(output).max(-1)
        limit = figures["l1_error"] * np.abs(u).max(-1)
        assert (gain <= limit * (1 + 1e-6) + noise * np.abs(u).max(-1) + 1e-12 * size).all()


@np.errstate(over="ignore", invalid="ignore")  # of systems that grow
def draw_and_check(families, total, seed, count=60, mixed=False):
    draw = np.random.default_rng(seed)
    done = case = 0
    while done < total:
        name, length = list(families)[case % len(families)], LENGTHS[case % len(LENGTHS)]
        arguments = dict(METHODS[case // 2 % len(METHODS)])
        arguments["tail"] = ["auto", "zero", "free"][draw.integers(3)]
        arguments["stable"] = stable = bool(draw.random() < 0.7)
        some = count if length <= 101 else count // 2
        scale = 10.0 ** draw.integers(-6, 7)
        if mixed:
            name, kernel = "a mixture", mixed_kernels(families, some, length, draw) * scale
        else:
            kernel = kernels(families[name], some, length, draw) * scale
        if draw.random() < 0.3:
            kernel = kernel.float()
        asked = draw.integers(1, min(length - 1, 20), some, endpoint=True)
        try:
            check(reduce(kernel, torch.from_numpy(asked), **arguments), kernel, asked, stable, draw)
        except AssertionError as error:
            raise AssertionError(f"{name}, {length} taps, {arguments}: {error}") from error
        done, case = done + some, case + 1
    return case


def test_no_inequality_is_violated(families):
    """One kernel of every family in each reduction, by every method and of every length."""
    cases = draw_and_check(families, 9 * len(families), 0, count=len(families), mixed=True)
    assert cases >= len(LENGTHS)


@pytest.mark.slow
def test_no_inequality_is_violated_by_ten_thousand(families):
    assert draw_and_check(families, 10_000, seed=1) > len(families) * len(METHODS)


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize(
    ("count", "length"), [(1, 40), pytest.param(3, 60, marks=pytest.mark.slow)]
)
def test_tolerances_that_are_said_to_be_met_are_met(families, count, length, refine):
    draw = np.random.default_rng(2)
    kernel = torch.cat([kernels(make, count, length, draw) for make in families.values()])
    reduction = reduce(kernel, tol=0.2, max_order=12, method=Balanced(refine=refine))
    check(reduction, kernel, np.full(len(kernel), 12), True, draw)
    assert torch.equal(reduction.converged, reduction.relative_error <= 0.2)


def test_hankel_errors_of_exact_reductions_are_rounding_errors(families):
    draw = np.random.default_rng(3)
    kernel = kernels(families["rational"], 40, 200, draw)
    reduction = reduce(kernel, 12)
    ended = reduction.tail_energy < 1e-18  # what goes on past the taps is an error
    assert int(ended.sum()) > 10
    assert bool((reduction.hankel_error <= 1e-8 * kernel.norm(dim=-1))[ended].all())


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64],
    ids=["float32", "float64"],
)
@pytest.mark.parametrize(
    ("length", "last"),
    [
        (76, 31),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((100, 31), (130, 31), (200, 37), (400, 71))
        ),
    ],
)
def test_a_fir_kernel_needs_no_more_states_than_taps(dtype, length, last):
    """Its only pole is a multiple one at zero, which modes near a circle stand for."""
    kernel = torch.zeros(4, length, dtype=dtype)
    kernel[0, last] = kernel[1, 20] = 1
    kernel[2, 1:31] = 1
    kernel[3, 1:3] = torch.tensor([1, 0.5])
    close = 5e-4 if dtype == torch.float32 else 2e-6
    for order in (last, last + 40):
        assert float(reduce(kernel, order).relative_error.max()) <= close
    assert bool((reduce(kernel, tol=1e-2).order <= torch.tensor([last, 20, 30, 2])).all())
    assert float(reduce(kernel[3], 2).relative_error) <= 1e-7


def check_that_errors_do_not_rise(families, length, count, orders, refine):
    """Beyond 1%, or what rounding makes of multiple poles."""
    draw = np.random.default_rng(4)
    kernel = torch.cat([kernels(make, count, length, draw) for make in families.values()])
    least = torch.full((len(kernel),), torch.inf, dtype=torch.float64)
    for order in orders:
        error = reduce(kernel, order, method=Balanced(refine=refine)).relative_error
        assert bool((error <= 1.01 * least + 1e-7).all())
        least = torch.minimum(least, error)


@pytest.mark.parametrize(
    ("length", "orders", "refine"),
    [
        (21, (2, 3, 20), True),
        pytest.param(63, (7, 8, 16), False, marks=pytest.mark.slow),
        (200, (2, 3, 12, 21), False),
    ],
)
def test_errors_do_not_rise_with_the_order(families, length, orders, refine):
    check_that_errors_do_not_rise(families, length, 1, orders, refine)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "refine"), [(21, True), (40, True), (63, False)])
def test_errors_do_not_rise_over_all_orders(families, length, refine):
    check_that_errors_do_not_rise(families, length, 2, range(1, min(length, 33)), refine)


def test_reductions_of_textbook_filters_stay_inside_their_bounds():
    """Windowed sincs of hundreds of taps: flat spectra that end abruptly."""
    for length in (201, 401):
        for cutoff in (0.1, 0.3):
            kernel = torch.from_numpy(scipy.signal.firwin(length, cutoff))
            for order in (8, 16, 32):
                both = torch.stack([kernel, kernel.roll(1)])
                found = reduce(both, order, method=Balanced(refine=False))
                assert bool((found.lower_bound <= found.relative_error).all())
                largest = found.hankel_singular_values[:, 0]
                assert bool((largest <= kernel.abs().sum() * (1 + 1e-5)).all())
