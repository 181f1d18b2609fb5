"""The gradient method and modal truncation, and what all methods share."""

import math

import pytest
import torch

from gramian import Modal, TransferFunction, reduce
from gramian.reduction import Balanced, Gradient, Method
from gramian.reduction.gradient import _FrequencyLoss, _TimeLoss
from gramian.reduction.modal_truncation import dominant_modes

METHODS = ["balanced", "modal", "gradient"]


def options(method, **more):
    return {"method": Gradient(steps=5) if method == "gradient" else method, **more}


@pytest.mark.pairs
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [1, 2, 3, 63, 257])
def test_every_method_takes_every_size(method, length, dtype):
    kernel = torch.randn(2, 3, length, dtype=dtype)
    for order in sorted({min(n, max(1, length - 1)) for n in (1, 2, 7, 20)}):
        reduction = reduce(kernel, order, **options(method))
        assert reduction.system.dtype == dtype
        assert bool((reduction.order <= order).all())
        assert bool((reduction.system.spectral_radius() < 1).all())
        found = reduction.system.impulse_response(length).double()
        norm = kernel.double().norm(dim=-1)
        error = (kernel.double() - found).norm(dim=-1) / norm
        torch.testing.assert_close(reduction.relative_error, error, rtol=1e-3, atol=1e-6)
        assert bool((reduction.lower_bound <= reduction.relative_error * (1 + 1e-9)).all())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_tolerance(method, smooth_kernel):
    kernel = smooth_kernel(4, 60, 1e-3)
    reduction = reduce(kernel, tol=0.5, max_order=6, **options(method))
    met = reduction.relative_error <= 0.5
    assert torch.equal(met, reduction.converged)
    assert bool((reduction.order <= 6).all())


@pytest.mark.parametrize("method", METHODS)
def test_progress_is_told_in_channels(method, smooth_kernel):
    for wanted in ({"order": 3}, {"tol": 0.3, "max_order": 4}):
        seen = []
        told = options(method, progress=lambda done, total: seen.append((done, total)))  # noqa: B023
        reduce(smooth_kernel(5, 60), **wanted, **told)
        assert seen[0] == (0, 5) and seen[-1] == (5, 5)
        assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("loss", [_TimeLoss, _FrequencyLoss])
def test_gradients_against_autograd(loss):
    taps = torch.randn(3, 41, dtype=torch.float64)
    parameters = torch.rand(4, 3, 5, dtype=torch.float64)
    parameters[0] = 0.5 + 0.45 * parameters[0]
    parameters.requires_grad_()
    value, slope = loss(taps)(parameters)
    (exact,) = torch.autograd.grad(value.sum(), parameters)
    torch.testing.assert_close(slope, exact)


def test_losses_are_errors_in_time_and_frequency():
    taps = torch.randn(2, 30, dtype=torch.float64)
    parameters = torch.rand(4, 2, 3, dtype=torch.float64)
    radius, angle, a, b = parameters
    system = Modal(torch.polar(radius, angle), torch.complex(a, b), torch.zeros(2).double())
    error = -system.impulse_response(5000)[:, 1:]
    error[:, :30] += taps
    within, _ = _TimeLoss(taps)(parameters)
    torch.testing.assert_close(within, error[:, :30].square().sum(-1))
    # A spectrum on N points is that of the error folded on N samples.
    points = 2 * (_FrequencyLoss(taps).z.shape[0] - 1)
    folded = error[:, : 4998 // points * points].unflatten(-1, (-1, points)).sum(1)
    everywhere, _ = _FrequencyLoss(taps)(parameters)
    torch.testing.assert_close(everywhere, folded.square().sum(-1))


@pytest.mark.parametrize("objective", ["l2", "h2"])
@pytest.mark.parametrize("initialization", ["ring", "even"])
def test_descent_descends(smooth_kernel, objective, initialization):
    kernel = smooth_kernel(4, 128, 1e-2)
    arguments = {
        "objective": objective,
        "initialization": initialization,
        "learning_rate": 1e-2,
    }
    methods = [Gradient(steps=n, **arguments) for n in (1, 30, 300)]
    errors = [reduce(kernel, 6, method=method).relative_error for method in methods]
    assert float(errors[2].mean()) < float(errors[1].mean()) < 1
    assert float(errors[2].mean()) < 0.96 * float(errors[0].mean())


def test_descent_finds_a_single_mode():
    time = torch.arange(100, dtype=torch.float64)
    kernel = torch.cat([torch.zeros(1), 0.97**time * torch.cos(1.5 * time + 0.4)]).double()
    reduction = reduce(kernel, 2, method=Gradient(steps=1500, learning_rate=1e-2))
    assert float(reduction.relative_error) < 1e-3
    real = torch.cat([torch.zeros(1), 0.97**time]).double()
    assert float(reduce(real, 1, method=Gradient(steps=1500)).relative_error) < 1e-2


def test_descents_depend_on_the_seed_alone():
    kernel = torch.randn(3, 50, dtype=torch.float64)
    arguments = {"order": 4, "method": Gradient(steps=20, initialization="ring")}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = reduce(kernel, **arguments)
    assert torch.equal(torch.get_rng_state(), before)
    alone = reduce(kernel[1], **arguments)
    torch.testing.assert_close(alone.system.poles, first.system.poles[1])
    other = reduce(kernel, 4, method=Gradient(steps=20, initialization="ring", seed=1))
    assert not torch.equal(other.system.poles, first.system.poles)


def test_descents_run_in_inference_mode(smooth_kernel):
    kernel = smooth_kernel(2, 40)
    with torch.inference_mode():
        for method in METHODS:
            assert bool(reduce(kernel, 3, **options(method)).relative_error.isfinite().all())


def test_dominant_modes_by_brute_force(random_system):
    system = random_system(6, 4, 3)
    length = 80
    poles, residues = system.poles, system.residues
    time = torch.arange(length, dtype=torch.float64)
    energy = (residues.unsqueeze(-1) * poles.unsqueeze(-1) ** time).real.square().sum(-1)
    for order in (1, 2, 3, 6, 11, 20):
        kept = dominant_modes(poles, residues, torch.full((6,), order), length)
        for b in range(6):
            left = order
            for k in energy[b].argsort(descending=True).tolist():
                cost = 2 if poles[b, k].imag != 0 else 1
                assert bool(kept[b, k]) == (cost <= left)
                left -= cost * int(kept[b, k])


def test_modal_truncation_keeps_modes_of_the_system(random_system):
    system = random_system(3, 5, 1)
    scaled = torch.tensor([1.0, 1e-3, 1.0, 1e-3, 1e-3, 1e-4], dtype=torch.float64)
    system = Modal(system.poles, system.residues * scaled, system.d)
    reduction = reduce(system, 4, method="modal", length=300)
    for b in range(3):
        found = sorted(reduction.system.poles[b].angle().tolist())
        assert found == pytest.approx(sorted(system.poles[b, [0, 2]].angle().tolist()))
    assert float(reduction.relative_error.max()) < 2e-2
    closer = reduce(system, 4, length=300)
    assert bool((closer.relative_error <= reduction.relative_error * (1 + 1e-9)).all())
    below = Modal(
        system.poles.conj().resolve_conj(), system.residues.conj().resolve_conj(), system.d
    )
    mirrored = reduce(below, 4, method="modal", length=300)
    torch.testing.assert_close(mirrored.relative_error, reduction.relative_error)


def test_modal_truncation_of_rational_functions():
    b = torch.tensor([1.0, -0.3, 0.2], dtype=torch.float64)
    a = torch.tensor([-0.5, 0.8, -0.36], dtype=torch.float64)
    system = TransferFunction(b, a, torch.tensor(0.5).double())
    whole = reduce(system, 3, method="modal", length=200)
    assert float(whole.relative_error) < 1e-8
    part = reduce(system, 2, method="modal", length=200)
    distance = (part.system.poles.unsqueeze(-1) - system.poles()).abs().amin()
    assert float(distance) < 1e-9


def test_unstable_modes_are_kept_or_moved():
    time = torch.arange(150, dtype=torch.float64)
    kernel = 1.02**time * torch.cos(0.7 * time)
    system = Modal(
        torch.polar(torch.tensor([1.02]), torch.tensor([0.7])).to(torch.complex128),
        torch.polar(torch.tensor([1.02]), torch.tensor([0.7])).to(torch.complex128),
        torch.tensor(1.0).double(),
    )
    torch.testing.assert_close(system.impulse_response(150), kernel, rtol=1e-4, atol=1e-4)
    for method in METHODS:
        loose = reduce(system, 2, length=150, stable=False, **options(method))
        tight = reduce(system, 2, length=150, **options(method))
        assert float(tight.system.spectral_radius()) < 1
        assert float(loose.relative_error) <= float(tight.relative_error) * (1 + 1e-9)


def test_a_reduction_prints_as_a_summary(smooth_kernel):
    kernel = smooth_kernel(6, 80, 1e-1).reshape(2, 3, 80)
    text = repr(reduce(kernel, 4))
    assert "channels=(2, 3)" in text and "taps=80" in text and "order=4" in text
    assert "tail_energy=" in text
    assert "tensor" not in text and len(text) < 200
    assert "6 above the tolerance" in repr(reduce(kernel, tol=1e-6, max_order=2))
    assert "order=1 … 3" in repr(reduce(kernel[0], torch.tensor([1, 2, 3])))


def test_out_of_reach_the_closest_order_tried_is_returned(smooth_kernel):
    kernel = smooth_kernel(4, 90, 1e-1)
    arguments = {"method": Gradient(steps=60)}
    levels = [reduce(kernel, order, **arguments) for order in (16, 32, 64, 89)]
    found = reduce(kernel, tol=1e-9, **arguments)
    assert not bool(found.converged.any())
    least = torch.stack([level.relative_error for level in levels]).amin(0)
    torch.testing.assert_close(found.relative_error, least)
    assert bool((found.order >= 16).all())
    assert bool((found.lower_bound <= found.relative_error * (1 + 1e-9)).all())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"steps": 0}, "steps must be"),
        ({"steps": 1.5}, "steps must be"),
        ({"learning_rate": -1.0}, "learning_rate must be"),
        ({"learning_rate": math.nan}, "learning_rate must be"),
        ({"objective": "l1"}, "'l2', 'h2'"),
        ({"initialization": "zeros"}, "'ring', 'even'"),
        ({"seed": 0.5}, "seed must be"),
    ],
)
def test_wrong_options_get_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Gradient(**arguments)


def test_a_method_that_there_is_not_gets_one_sentence():
    with pytest.raises(ValueError, match="'balanced', 'modal', 'gradient' or a gramian"):
        reduce(torch.randn(2, 20), 2, method="balance")
    with pytest.raises(ValueError, match="refine must be true or false"):
        Balanced(refine=2)


def test_a_method_of_ones_own_is_taken():
    class Last(Method):
        """One mode at a place that is given."""

        def solve(self, problem, order, rows):
            best = problem.silence(rows)
            poles = torch.full((len(rows), 1), 0.5, dtype=torch.complex128)
            problem.offer(best, poles, rows, torch.arange(len(rows)))
            return best

    kernel = 0.5 ** torch.arange(20.0)
    reduction = reduce(kernel, 3, method=Last())
    assert int(reduction.order) == 1 and float(reduction.relative_error) < 1e-6
