"""`gramian.reduce`: figures that are true, bounds that hold, and what pyMOR finds."""

import math
import threading

import numpy as np
import pytest
import scipy.linalg
import torch

from gramian import FIR, Modal, TransferFunction, reduce
from gramian.ops.threads import work

TAILS = ["zero", "free", "auto"]
LENGTHS = [1, 2, 3, 4, 17, 63, 257, 1000]


def taps_of(reduction, length):
    """Taps of the returned system, from its poles and residues by a plain sum in float64."""
    system = reduction.system
    poles = system.poles.to(torch.complex128).unsqueeze(-1)
    residues = system.residues.to(torch.complex128).unsqueeze(-1)
    powers = torch.cat([torch.ones_like(poles), poles.expand(*poles.shape[:-1], length)], dim=-1)
    tail = (residues * powers.cumprod(-1)[..., : length - 1]).real.sum(-2)
    return torch.cat([system.d.double().unsqueeze(-1), tail], dim=-1)


def check_figures(reduction, kernel):
    kernel = kernel.double()
    error = kernel - taps_of(reduction, kernel.shape[-1])
    norm = kernel.norm(dim=-1)
    assert torch.equal(reduction.system.d.double(), kernel[..., 0])
    torch.testing.assert_close(
        reduction.relative_error,
        torch.where(norm > 0, error.norm(dim=-1) / norm, 0),
        atol=1e-8,
        rtol=1e-6,
    )
    torch.testing.assert_close(
        reduction.l1_error, error.abs().sum(-1), atol=1e-7 * float(norm.max()), rtol=1e-6
    )
    assert bool((reduction.lower_bound <= reduction.relative_error + 1e-15).all())


def exact_hankel_norm(kernel, reduction, horizon):
    """Of h - ĥ, from a dense matrix that is long enough for ĥ to have died out."""
    length = kernel.shape[-1]
    error = -taps_of(reduction, horizon)
    error[..., :length] += kernel.double()
    return torch.stack(
        [
            torch.from_numpy(scipy.linalg.svdvals(scipy.linalg.hankel(e[1:].numpy())))[0]
            for e in error
        ]
    )


@pytest.mark.each
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("highest", [11, pytest.param(32, marks=pytest.mark.slow)])
def test_figures_are_those_of_the_returned_system(length, tail, dtype, highest):
    kernel = torch.randn(2, 3, length, dtype=dtype)
    for order in sorted({min(n, max(1, length - 1)) for n in (1, highest)}):
        reduction = reduce(kernel, order, tail=tail)
        check_figures(reduction, kernel)
        assert reduction.system.dtype == dtype
        assert reduction.order.shape == (2, 3)
        assert bool((reduction.order <= order).all())
        assert torch.equal(reduction.order, reduction.system.orders)
        assert bool((reduction.system.spectral_radius() < 1).all())
        assert bool(reduction.converged.all())


@pytest.mark.each
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("pairs", "reals"), [(1, 0), (0, 1), (2, 1), (3, 2), (6, 0)])
def test_low_order_systems_are_recovered(random_system, tail, pairs, reals):
    system = random_system(4, pairs, reals)
    order = 2 * pairs + reals
    length = 500
    reduction = reduce(system, order, tail=tail, length=length)
    assert reduction.order.tolist() == [order] * 4
    assert float(reduction.relative_error.max()) < 1e-8
    for channel in range(4):
        found = reduction.system.poles[channel]
        for pole in system.poles[channel]:
            assert float((found - pole).abs().min()) < 1e-6


def test_an_order_above_the_rank_gives_the_rank(random_system):
    reduction = reduce(random_system(3, 2), 12, length=300)
    assert reduction.order.tolist() == [4] * 3
    assert float(reduction.relative_error.max()) < 1e-9


@pytest.mark.parametrize("length", [2, 3, 4, 9, 40])
def test_as_many_states_as_taps_reproduce_any_kernel(length):
    kernel = torch.randn(5, length, dtype=torch.float64)
    assert float(reduce(kernel, length - 1).relative_error.max()) < 1e-10


def test_the_free_tail_is_far_better_on_a_smooth_kernel_cut_short():
    time = torch.linspace(0, 1, 1024, dtype=torch.float64)
    kernel = (torch.cos(5 * time) + 0.3 * torch.cos(11 * time + 1)) * torch.exp(-time)
    free, zero = reduce(kernel, 6, tail="free"), reduce(kernel, 6, tail="zero")
    assert float(free.relative_error) < 1e-3 * float(zero.relative_error)
    assert float(free.tail_energy) > 10 * float(zero.tail_energy)
    both = reduce(kernel, 6)
    assert float(both.relative_error) <= float(free.relative_error) * (1 + 1e-9)


@pytest.mark.parametrize("length", [40, 400])
@pytest.mark.parametrize("count", [15, pytest.param(150, marks=pytest.mark.slow)])
def test_bounds_hold_for_many_kernels(smooth_kernel, length, count):
    kernel = torch.cat([smooth_kernel(count, length, noise) for noise in (0.0, 1e-5, 1e-1, 10.0)])
    for order in (1, 5, 12):
        reduction = reduce(kernel, order)
        check_figures(reduction, kernel)
        assert bool((reduction.order <= order).all())
        reached = (reduction.order == order).double().unflatten(0, (4, count)).mean(1)
        assert bool((reached > 0.75).all())  # few are closer below, whatever the noise
        assert bool((reduction.lower_bound >= 0).all())
        missed = reduction.hankel_singular_values[:, order]
        assert bool((missed <= reduction.hankel_error * (1 + 1e-3)).all())


def test_the_lower_bound_says_something(smooth_kernel):
    reduction = reduce(smooth_kernel(20, 400, 1e-2), 4)
    assert bool((reduction.lower_bound > 0.05 * reduction.relative_error).all())


@pytest.mark.parametrize("length", [20, 150, 400])
def test_hankel_error_is_the_norm_on_the_infinite_horizon(random_system, length):
    kernel = random_system(3, 5, highest=0.9).impulse_response(length)
    for tail in ("zero", "free"):
        reduction = reduce(kernel, 4, tail=tail)
        radius = float(reduction.system.spectral_radius().max())
        assert radius < (0.95 if tail == "zero" else 0.999)
        horizon = length + math.ceil(math.log(1e-7) / math.log(radius))  # where ĥ has died out
        exact = exact_hankel_norm(kernel, reduction, min(horizon, 3000))
        torch.testing.assert_close(reduction.hankel_error, exact, rtol=1e-3, atol=1e-10)


def test_l1_error_bounds_outputs(smooth_kernel):
    kernel = smooth_kernel(30, 200, 1e-2)
    reduction = reduce(kernel, 6)
    u = torch.rand(50, 1, 200, dtype=torch.float64) * 2 - 1
    worst = torch.sign(kernel - taps_of(reduction, 200)).flip(-1)  # attains the bound
    for signal in (u, worst):
        difference = (FIR(kernel)(signal.expand(-1, 30, -1) if signal is u else signal)) - (
            reduction.system(signal.expand(-1, 30, -1) if signal is u else signal)
        )
        gain = difference.abs().amax(-1) / signal.abs().amax(-1)
        assert bool((gain <= reduction.l1_error * (1 + 1e-6)).all())
    torch.testing.assert_close(gain, reduction.l1_error, rtol=1e-6, atol=1e-12)


def test_tail_energy_is_that_past_the_last_tap(smooth_kernel):
    kernel = smooth_kernel(6, 100)
    reduction = reduce(kernel, 4, tail="zero")
    horizon = 100 + math.ceil(40 / (1 - float(reduction.system.spectral_radius().max())))
    tail = taps_of(reduction, horizon)[:, 100:].square().sum(-1)
    energy = kernel.square().sum(-1)
    torch.testing.assert_close(reduction.tail_energy, tail / energy, rtol=1e-5, atol=1e-20)


@pytest.mark.parametrize(("tail", "force_stability"), [("zero", True), ("free", False)])
def test_at_least_as_close_as_pymor(smooth_kernel, tail, force_stability):
    era = pytest.importorskip("pymor.reductors.era")
    kernel = smooth_kernel(3, 340, 1e-2)
    for order in (4, 9):
        reduction = reduce(kernel, order, tail=tail, stable=force_stability)
        for channel in range(3):
            taps = kernel[channel, 1:].numpy()
            model = era.ERAReductor(taps, 1.0, force_stability=force_stability).reduce(r=order)
            state, outputs = model.B.matrix[:, 0], []
            for _ in taps:
                outputs.append(model.C.matrix[0] @ state)
                state = model.A.matrix @ state
            theirs = np.linalg.norm(taps - np.array(outputs))
            ours = float(reduction.relative_error[channel] * kernel[channel].norm())
            assert ours <= 1.01 * theirs


@pytest.mark.each
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("tol", [0.5, 1e-1, 1e-3])
def test_order_by_tolerance(random_system, tail, tol):
    kernel = random_system(6, 12, 1).impulse_response(300)
    reduction = reduce(kernel, tol=tol, tail=tail)
    check_figures(reduction, kernel)
    met = reduction.relative_error <= tol
    assert torch.equal(met, reduction.converged)
    assert bool(met.all())
    smaller = (reduction.order - 1).clamp(min=1)
    less = reduce(kernel, smaller, tail=tail)
    one_less = met & (reduction.order > 1)
    assert bool((less.relative_error[one_less] > tol).all())


def test_tolerance_per_channel_and_large_orders(random_system):
    system = random_system(3, 12)
    residues = system.residues.clone()
    residues[0, 3:], residues[1] = 0, 0
    reduction = reduce(Modal(system.poles, residues, system.d), tol=1e-7, length=600)
    assert reduction.order.tolist() == [6, 0, 24]
    assert bool(reduction.converged.all())


def test_what_cannot_meet_the_tolerance_says_so():
    kernel = torch.randn(4, 300)
    kernel[2] = 0.5 ** torch.arange(300)
    reduction = reduce(kernel, tol=1e-2, max_order=10)
    assert reduction.converged.tolist() == [False, False, True, False]
    assert reduction.order.tolist() == [10, 10, 1, 10]
    assert bool((reduction.relative_error[[0, 1, 3]] > 1e-2).all())
    check_figures(reduction, kernel)


def test_orders_per_channel(smooth_kernel):
    kernel = smooth_kernel(6, 300).reshape(2, 3, 300)
    orders = torch.tensor([[1, 8, 3], [5, 2, 12]])
    reduction = reduce(kernel, orders)
    assert torch.equal(reduction.order, orders)
    for i, j in ((0, 1), (1, 0)):
        alone = reduce(kernel[i, j], int(orders[i, j]))
        torch.testing.assert_close(
            alone.relative_error, reduction.relative_error[i, j], rtol=1e-3, atol=0
        )


def test_batch_shapes(smooth_kernel):
    kernel = smooth_kernel(4, 200)
    flat = reduce(kernel, 6)
    for shape in ((), (1,), (2, 2), (4, 1)):
        part = kernel[0] if math.prod(shape) == 1 else kernel
        reduction = reduce(part.reshape(*shape, 200), 6)
        assert reduction.order.shape == reduction.hankel_error.shape == shape
        assert reduction.system.channel_shape == shape
        torch.testing.assert_close(
            reduction.relative_error.flatten(), flat.relative_error[: math.prod(shape)]
        )


def test_silent_and_constant_channels():
    kernel = torch.zeros(4, 512, dtype=torch.float64)
    kernel[1, 0] = 2.0
    kernel[2, 1:] = 3.0
    kernel[3, 1:] = 3.0 * (-1.0) ** torch.arange(511)
    for tail in TAILS:
        reduction = reduce(kernel, 4, tail=tail)
        check_figures(reduction, kernel)
        assert reduction.order[:2].tolist() == [0, 0]
        assert reduction.relative_error[:2].tolist() == [0, 0]
        assert bool(reduction.hankel_error.isfinite().all())
    assert float(reduce(kernel, 1, tail="free").relative_error.max()) < 1e-5
    assert reduce(kernel, tol=1e-4, tail="free").order.tolist() == [0, 0, 1, 1]


def test_growing_kernels_without_stability():
    time = torch.arange(200, dtype=torch.float64)
    kernel = 1.01**time * torch.cos(0.3 * time)
    unstable = reduce(kernel, 2, tail="free", stable=False)
    assert float(unstable.relative_error) < 1e-8
    assert float(unstable.system.spectral_radius()) == pytest.approx(1.01)
    assert float(unstable.hankel_error) == float(unstable.tail_energy) == math.inf
    stable = reduce(kernel, 2, tail="free")
    assert float(stable.system.spectral_radius()) < 1
    assert float(stable.relative_error) > 0.1
    check_figures(stable, kernel)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_a_kernel_does_not_matter(smooth_kernel, scale):
    kernel = smooth_kernel(3, 400).float()
    plain, scaled = reduce(kernel, 8), reduce(kernel * scale, 8)
    torch.testing.assert_close(scaled.relative_error, plain.relative_error, rtol=1e-3, atol=0)
    torch.testing.assert_close(scaled.hankel_error / scale, plain.hankel_error, rtol=1e-3, atol=0)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_kernels_give_float32_systems(smooth_kernel, half):
    kernel = smooth_kernel(3, 200).to(half)
    reduction = reduce(kernel, 6)
    assert reduction.system.dtype == torch.float32
    check_figures(reduction, kernel)


def test_rounding_to_float32_costs_little(smooth_kernel):
    kernel = smooth_kernel(5, 600).float()
    rounded, exact = reduce(kernel, 16), reduce(kernel.double(), 16)
    assert rounded.system.poles.dtype == torch.complex64
    assert bool((rounded.relative_error <= exact.relative_error * 1.01 + 1e-6).all())


def test_systems_are_reduced_by_their_impulse_response(random_system):
    system = random_system(2, 8)
    kernel = system.impulse_response(300)
    direct = reduce(kernel, 6)
    for source, length in ((system, 300), (FIR(kernel), None), (FIR(kernel), 300)):
        reduction = reduce(source, 6, length=length)
        torch.testing.assert_close(reduction.relative_error, direct.relative_error)
    rational = TransferFunction(torch.tensor([1.0]), torch.tensor([-0.5]), torch.tensor(2.0))
    found = reduce(rational, 1, length=64)
    torch.testing.assert_close(found.system.poles, torch.tensor([0.5 + 0j]))


def test_the_same_input_gives_the_same_result_whatever_the_seed(smooth_kernel):
    kernel = smooth_kernel(3, 500)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = reduce(kernel, 7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = reduce(kernel, 7)
    assert torch.equal(first.system.poles, second.system.poles)
    assert torch.equal(first.system.residues, second.system.residues)


def test_no_gradient_is_recorded(smooth_kernel):
    kernel = smooth_kernel(2, 200).requires_grad_()
    reduction = reduce(kernel, 4)
    assert not reduction.system.poles.requires_grad
    assert not reduction.hankel_error.requires_grad
    assert not reduction.system.d.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(smooth_kernel):
    kernel = smooth_kernel(5, 600)
    there, here = reduce(kernel.cuda(), 8), reduce(kernel, 8)
    for name in ("relative_error", "lower_bound", "l1_error", "hankel_error", "tail_energy"):
        figure = getattr(there, name)
        assert figure.device.type == "cuda"
        torch.testing.assert_close(figure.cpu(), getattr(here, name), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "either order or tol"),
        ({"order": 3, "tol": 0.1}, "either order or tol"),
        ({"order": 0}, "1 … 19"),
        ({"order": 20}, "1 … 19"),
        ({"order": 2.5}, "integer"),
        ({"order": torch.tensor([1, 2, 3])}, "broadcast"),
        ({"tol": 0.0}, "tol must be"),
        ({"tol": math.nan}, "tol must be"),
        ({"order": 2, "method": "magic"}, "'balanced'"),
        ({"order": 2, "tail": "loose"}, "'auto', 'zero', 'free'"),
        ({"order": 2, "length": 10}, "length goes with a system"),
        ({"order": 2, "max_order": 10}, "max_order"),
        ({"tol": 0.1, "max_order": 0}, "max_order"),
    ],
)
def test_wrong_arguments_get_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        reduce(torch.randn(2, 20), **arguments)


def test_wrong_kernels_get_one_sentence(random_system):
    kernel = torch.randn(2, 3, 20)
    kernel[1, 2, 7] = math.nan
    with pytest.raises(ValueError, match=r"channel \(1, 2\)"):
        reduce(kernel, 2)
    with pytest.raises(ValueError, match="channel 2 "):
        reduce(kernel[1], tol=0.1)
    kernel[1, 2, 7] = math.inf
    with pytest.raises(ValueError, match="the kernel holds"):
        reduce(kernel[1, 2], 2)
    for wrong in (
        torch.ones(2, 4, dtype=torch.long),
        torch.randn(2, 0),
        torch.randn(0, 2),
        torch.tensor(1.0),
    ):
        with pytest.raises(TypeError, match="a kernel is"):
            reduce(wrong, 1)
    with pytest.raises(TypeError, match="list"):
        reduce([1.0, 2.0], 1)
    with pytest.raises(ValueError, match="length"):
        reduce(random_system(1, 1), 1)


def test_several_threads_give_one_threads_results_and_end(two_threads: None) -> None:
    kernels = torch.randn(9, 40, generator=torch.Generator().manual_seed(0)).cumsum(-1)
    blocks = list(kernels.split(2))
    before, running = torch.get_num_threads(), threading.active_count()
    several = work(lambda block: reduce(block, order=3).relative_error, blocks, kernels)
    assert (torch.get_num_threads(), threading.active_count()) == (before, running)
    torch.set_num_threads(1)
    alone = work(lambda block: reduce(block, order=3).relative_error, blocks, kernels)
    torch.testing.assert_close(torch.cat(several), torch.cat(alone))
