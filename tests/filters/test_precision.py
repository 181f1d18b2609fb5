"""RTF's kernel in single precision, with the error that it states, on devices of every kind."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from gramian.filters import RTF, build
from gramian.mixers import Hyena, LongConvolution
from gramian.ops.polynomial import rational_kernel, single_precision_error
from gramian.reduction import reduce
from gramian.testing import check_device, check_filter, without_float64
from tests.filters.test_filters import CONFIGS

RADII = [0.5, 0.9, 0.99, 0.999, 0.9999, 1 - 1e-6]
ORDERS = [1, 2, 3, 8, 16, 63]


def coefficients(radius: float, order: int) -> tuple[torch.Tensor, ...]:
    """Numerators, denominators with all poles at a radius, and direct terms of four channels."""
    angles = math.pi * torch.rand(4, order // 2, dtype=torch.float64)
    pairs = torch.polar(torch.full_like(angles, radius), angles)
    rest = torch.full((4, order % 2), radius, dtype=torch.complex128)
    a = torch.ones(4, 1, dtype=torch.complex128)
    for pole in torch.cat([pairs, pairs.conj(), rest], -1).unbind(-1):
        a = torch.nn.functional.pad(a, (0, 1)) - pole[:, None] * torch.nn.functional.pad(a, (1, 0))
    return torch.randn(4, order), a.real[:, 1:].float(), torch.randn(4)


def distance(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (actual - expected).norm(dim=-1) / expected.norm(dim=-1)


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("order", ORDERS)
def test_the_stated_error_is_not_exceeded(radius: float, order: int) -> None:
    torch.manual_seed(order)
    for grid in (order + 2, 65, 257, 1000):
        b, a, d = coefficients(radius, order)
        expected = rational_kernel(b.double(), a.double(), d.double(), grid)
        stated = single_precision_error(b, a, d, grid)
        error = distance(rational_kernel(b, a, d, grid).double(), expected)
        usable = stated < 1  # otherwise nothing is promised
        assert bool((error <= stated)[usable].all()), (grid, error, stated)


def test_the_stated_error_is_of_use() -> None:
    """It says that modest poles are safe, and it is not far above the error."""
    torch.manual_seed(0)
    b, a, d = coefficients(0.5, 8)
    stated = single_precision_error(b, a, d, 1000)
    expected = rational_kernel(b.double(), a.double(), d.double(), 1000)
    error = distance(rational_kernel(b, a, d, 1000).double(), expected)
    assert bool((stated < 1e-4).all()) and bool((stated < 100 * error).all())
    b, a, d = coefficients(0.999, 63)
    assert bool((single_precision_error(b, a, d, 1000) > 1).all())


@pytest.mark.parametrize("radius", [0.9, 0.999])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_against_arithmetic_in_fifty_digits(radius: float, order: int) -> None:
    torch.manual_seed(order)
    grid, (b, a, d) = 63, coefficients(radius, order)
    stated = single_precision_error(b, a, d, grid)
    taps = rational_kernel(b, a, d, grid)
    with mpmath.workdps(50):
        roots = [mpmath.expjpi(mpmath.mpf(-2 * k) / grid) for k in range(grid)]
        for row in range(4):
            num, den = ([mpmath.mpf(float(c)) for c in x[row]] for x in (b, a))
            spectrum = [
                sum(c * w ** (j + 1) for j, c in enumerate(num))
                / (1 + sum(c * w ** (j + 1) for j, c in enumerate(den)))
                for w in roots
            ]
            exact = [
                float(sum(v * roots[-k * t % grid] for k, v in enumerate(spectrum)).real / grid)
                for t in range(grid)
            ]
            exact[0] += float(d[row])
            expected = torch.tensor(exact, dtype=torch.float64)
            assert distance(taps[row].double(), expected) <= stated[row]


@pytest.mark.parametrize("stability", ["none", "montel", "schur"])
@pytest.mark.parametrize("length", [1, 2, 3, 63, 257, 1000])
def test_a_filter_in_single_precision_keeps_to_its_error(stability: str, length: int) -> None:
    torch.manual_seed(0)
    options = {"stability": stability, "initialization": "montel"}
    double = RTF(6, 8, 1000, num_denominators=3, **options)
    single = RTF(6, 8, 1000, num_denominators=3, precision="single", **options)
    torch.nn.init.normal_(double.b)
    single.load_state_dict(double.state_dict())
    taps = single(length).impulse_response(length)
    assert taps.dtype == torch.float32
    whole, expected = single(1000).impulse_response(1000), double(1000).impulse_response(1000)
    assert expected.dtype == torch.float64
    assert bool((distance(whole.double(), expected) <= double.kernel_error()).all())
    torch.testing.assert_close(taps, whole[:, :length])


def test_the_default_is_double_precision_where_a_device_has_it(simulated: torch.device) -> None:
    filter = RTF(2, 3, 16, initialization="montel")
    assert filter(16).dtype == torch.float64
    filter.to(simulated)
    assert filter(16).dtype == torch.float64
    with without_float64():
        assert filter(16).dtype == torch.float32
    assert build({**RTF(2, 3, 16).config(), "precision": "single"})(16).dtype == torch.float32


def test_single_precision_conforms(simulated: torch.device) -> None:
    torch.manual_seed(0)
    filter = RTF(4, 3, 40, precision="single", initialization="montel")
    check_filter(filter)
    check_device(filter)


def test_bad_input_gets_one_sentence() -> None:
    with pytest.raises(ValueError, match="precision must be"):
        RTF(2, 3, 16, precision="half")
    with pytest.raises(ValueError, match='the precision "single", which needs the numerator "trun'):
        RTF(2, 3, 16, numerator="exact", precision="single")
    with pytest.raises(ValueError, match='this one is "exact"'):
        RTF(2, 3, 16, numerator="exact").kernel_error()


@pytest.mark.parametrize("name", [*CONFIGS, "rtf_schur", "rtf_montel"])
def test_a_device_without_double_precision_runs_a_filter_or_refuses_it(
    name: str, simulated: torch.device
) -> None:
    torch.manual_seed(0)
    config = CONFIGS.get(name, {"type": "rtf", "state_size": 4, "stability": name[4:]})
    filter = build(config, channels=4, max_length=40)
    mixer = LongConvolution(filter)
    x = torch.randn(2, 30, 4)
    expected = mixer(x)
    mixer.to(simulated)
    with without_float64():
        if filter.needs_float64:
            with pytest.raises(NotImplementedError, match="the device 'simulated' does not have"):
                mixer(x.to(simulated))
            return
        y = mixer(x.to(simulated))
        y.square().sum().backward()
        assert distance(y.cpu().flatten(), expected.flatten()) < 1e-4
        with torch.no_grad():
            recurrence = mixer.recurrence()
            first, state = recurrence.prefill(x[:, :20].to(simulated))
            steps = [first]
            for t in range(20, 30):
                step, state = recurrence.step(x[:, t].to(simulated), state)
                steps.append(step.unsqueeze(1))
        assert distance(torch.cat(steps, 1).cpu().flatten(), expected.flatten()) < 1e-4


def test_every_filter_says_whether_it_needs_double_precision() -> None:
    filters = (build(config, channels=4, max_length=40) for config in CONFIGS.values())
    needing = {filter.name for filter in filters if filter.needs_float64}
    assert needing == {"modal", "s4", "s4d"}


def test_a_reduction_leaves_a_device_without_double_precision(simulated: torch.device) -> None:
    """It computes on the CPU, and its results return in single precision."""
    torch.manual_seed(0)
    taps = 0.9 ** torch.arange(30) * torch.randn(2, 30)
    expected = reduce(taps, 4)
    with without_float64():
        found = reduce(taps.to(simulated), 4)
    assert found.relative_error.device == simulated and found.relative_error.dtype == torch.float32
    torch.testing.assert_close(
        found.relative_error.cpu().double(), expected.relative_error.double()
    )


def test_a_model_with_rtf_trains_without_double_precision(simulated: torch.device) -> None:
    torch.manual_seed(0)
    config = {"type": "rtf", "state_size": 4, "stability": "schur", "initialization": "schur"}
    mixer = Hyena(6, config, max_length=40).to(simulated)
    x = torch.randn(2, 33, 6).to(simulated)
    optimizer = torch.optim.AdamW(mixer.parameters(), lr=0.01)
    with without_float64():
        losses = []
        for _ in range(3):
            loss = (mixer(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach().cpu())
    assert losses[2] < losses[0]
