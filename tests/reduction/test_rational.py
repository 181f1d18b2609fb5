"""Rational interpolation by gradient descent, and the options of the descent."""

from typing import Any

import numpy as np
import pytest
import scipy.signal
import torch

from gramian import FIR, TransferFunction, reduce
from gramian.reduction import Descent, Gradient, rational_interpolation
from gramian.reduction.descent import descended
from gramian.reduction.rational import _RationalLoss

STABILITIES = ["none", "schur"]


def rational_taps(length: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """The first taps of two rational functions of degree 3, by scipy, and their coefficients."""
    poles = np.array([[0.7, 0.7 * np.exp(1.8j)], [-0.6, 0.8 * np.exp(0.9j)]])
    a = np.stack([np.poly([p[0], p[1], p[1].conj()]).real for p in poles])
    b = np.array([[0.5, 1.0, -0.4, 0.3], [-1.0, 0.2, 0.6, 0.5]])
    impulse = np.eye(1, length)[0]
    taps = [scipy.signal.lfilter(x, y, impulse) for x, y in zip(b, a, strict=True)]
    return torch.from_numpy(np.stack(taps)), b, a


@pytest.mark.parametrize("schur", [False, True])
@pytest.mark.parametrize("length", [40, 41])
def test_the_gradient_against_autograd(schur: bool, length: int) -> None:
    taps = torch.randn(3, length - 1, dtype=torch.float64)
    parameters = (0.2 * torch.randn(2, 3, 5, dtype=torch.float64)).requires_grad_()
    value, slope = _RationalLoss(taps, schur)(parameters)
    (exact,) = torch.autograd.grad(value.sum(), parameters)
    torch.testing.assert_close(slope, exact)


@pytest.mark.parametrize("stability", STABILITIES)
def test_the_loss_is_the_error_of_the_result(stability: str) -> None:
    kernel = torch.randn(2, 30, dtype=torch.float64)
    fit = rational_interpolation(kernel, 4, Descent(60), stability=stability)
    found = fit.system.impulse_response(30)
    error = (found - kernel).norm(dim=-1) / kernel.norm(dim=-1)
    torch.testing.assert_close(fit.relative_error, error)
    torch.testing.assert_close(found[:, 0], kernel[:, 0])
    none = kernel[:, 1:].norm(dim=-1) / kernel.norm(dim=-1)
    assert bool((fit.relative_error < none).all())


@pytest.mark.parametrize("stability", STABILITIES)
def test_rational_kernels_are_recovered(stability: str) -> None:
    taps, b, a = rational_taps(120)
    fit = rational_interpolation(taps, 3, Descent(3000, 5e-2), stability=stability)
    assert float(fit.relative_error.max()) < 1e-9
    assert bool(fit.stable.all())
    numerator, denominator = fit.system.to_scipy()
    np.testing.assert_allclose(denominator, a, atol=1e-7)
    np.testing.assert_allclose(numerator, b, atol=1e-7)
    # The exact numerator continues the kernel beyond the grid.
    exact = TransferFunction(fit.system.b, fit.system.a, fit.system.d)
    longer, *_ = rational_taps(300)
    torch.testing.assert_close(exact.impulse_response(300), longer, atol=1e-7, rtol=0)


@pytest.mark.parametrize("stability", STABILITIES)
def test_the_recurrence_computes_the_fitted_kernel(stability: str) -> None:
    torch.manual_seed(1)
    kernel = torch.randn(3, 48, dtype=torch.float64)
    fit = rational_interpolation(kernel, 6, Descent(400, 2e-2), stability=stability)
    recurrence = fit.system.recurrence()
    u = torch.randn(3, 48, dtype=torch.float64)
    y, _ = recurrence.prefill(u, recurrence.initial_state(()))
    torch.testing.assert_close(y, FIR(fit.system.impulse_response(48))(u), atol=1e-4, rtol=0)


def test_schur_is_stable_where_free_denominators_are_not() -> None:
    """A kernel that grows is fitted by poles outside the circle, unless these are excluded."""
    time = torch.arange(64, dtype=torch.float64)
    kernel = 1.1**time
    free, stable = (
        rational_interpolation(kernel, 2, Descent(1500, 1e-2), stability=stability)
        for stability in STABILITIES
    )
    assert not bool(free.stable) and float(free.system.spectral_radius()) > 1
    assert bool(stable.stable) and float(stable.system.spectral_radius()) < 1


def test_channels_shapes_and_dtypes(dtype: torch.dtype) -> None:
    kernel = torch.randn(2, 3, 33, dtype=dtype)
    fit = rational_interpolation(kernel, 5, Descent(30))
    assert fit.system.channel_shape == (2, 3) and fit.system.order == 5
    assert fit.system.dtype == dtype
    assert fit.relative_error.shape == fit.stable.shape == (2, 3)
    assert "channels=(2, 3), order=5" in repr(fit) and "unstable=0" in repr(fit)
    alone = rational_interpolation(kernel[1, 2], 5, Descent(30))
    assert alone.relative_error.shape == ()
    torch.testing.assert_close(alone.relative_error, fit.relative_error[1, 2])
    system = TransferFunction(kernel[..., :4], 0.1 * kernel[..., 4:8], kernel[..., 0])
    taken = rational_interpolation(system, 5, Descent(30), length=33)
    direct = rational_interpolation(system.impulse_response(33), 5, Descent(30))
    torch.testing.assert_close(taken.relative_error, direct.relative_error)
    silent = rational_interpolation(torch.zeros(2, 9, dtype=dtype), 2, Descent(3))
    assert not bool(silent.relative_error.any()) and bool(silent.stable.all())


def test_progress_is_told_in_channels() -> None:
    seen: list[tuple[int, int]] = []
    kernel = torch.randn(5, 20)
    rational_interpolation(kernel, 2, Descent(60), progress=lambda *part: seen.append(part))
    assert seen[0] == (0, 5) and seen[-1] == (5, 5)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_weight_decay_and_schedule_are_those_of_torch() -> None:
    """The descent takes the steps of torch's AdamW, at a constant rate and at an annealed one."""
    goal = torch.randn(2, 3, 4, dtype=torch.float64)
    weight = torch.rand(2, 3, 4, dtype=torch.float64)

    def loss(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (weight * (x - goal).square()).sum((0, 2)), 2 * weight * (x - goal)

    for schedule in ("constant", "cosine"):
        options = Descent(40, 0.02, schedule=schedule, weight_decay=0.3)
        found = descended(torch.zeros_like(goal), loss, options)
        theirs = torch.zeros_like(goal).requires_grad_()
        optimizer = torch.optim.AdamW([theirs], lr=0.02, weight_decay=0.3, eps=1e-12)
        for step in range(40):
            optimizer.param_groups[0]["lr"] = options.rate(step)
            theirs.grad = loss(theirs.detach())[1]
            optimizer.step()
        torch.testing.assert_close(found, theirs.detach())
    assert Descent(40, 0.02, schedule="constant").rate(39) == 0.02
    assert Descent(40, 0.02).rate(39) < 1e-4


def test_modal_descents_take_these_options() -> None:
    kernel = torch.randn(2, 40, dtype=torch.float64)
    options: list[dict[str, Any]] = [{}, {"schedule": "constant"}, {"weight_decay": 10.0}]
    errors = [
        reduce(kernel, 4, method=Gradient(40, 1e-2, **more)).relative_error for more in options
    ]
    assert not torch.equal(errors[0], errors[1]) and not torch.equal(errors[0], errors[2])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"order": 0}, "order must be an integer of at least 1"),
        ({"order": 20}, "order must lie in 1 … 19"),
        ({"stability": "montel"}, "'schur', 'none'"),
        ({"length": 20}, "length goes with a system"),
    ],
)
def test_wrong_arguments_get_one_sentence(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        rational_interpolation(torch.randn(20), **{"order": 2, **arguments})
    with pytest.raises(ValueError, match="NaN or infinite"):
        rational_interpolation(torch.full((20,), torch.nan), 2)
    with pytest.raises(TypeError, match="takes a kernel"):
        rational_interpolation([1.0, 2.0], 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"steps": 0}, "steps must be"),
        ({"learning_rate": 0.0}, "learning_rate must be"),
        ({"schedule": "linear"}, "'cosine', 'constant'"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
    ],
)
def test_wrong_descents_get_one_sentence(arguments: dict[str, Any], sentence: str) -> None:
    for options in (Descent, Gradient):
        with pytest.raises(ValueError, match=sentence):
            options(**arguments)
