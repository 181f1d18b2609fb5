"""Filters at another sampling rate: a tap is the response over the time of its held input."""

from __future__ import annotations

from typing import Any

import control
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from gramian import Modal
from gramian.filters import Filter, build

CHANNELS, LENGTH = 4, 96
S4D = {"type": "s4d", "state_size": 8, "dt_max": 0.02}
RTF = {"type": "rtf", "state_size": 5}
FILTERS: dict[str, dict[str, Any]] = {
    "s4d": S4D,
    "modal": {"type": "modal", "orders": [2, 0, 3, 1]},
    "modal_unbounded": {"type": "modal", "orders": 3, "bounded": False},
    "modal_real": {"type": "modal", "orders": [1, 2, 3, 2], "real": True},
    "rtf_truncated": RTF,
    "rtf_shared": RTF | {"num_denominators": 2},
    "rtf_exact": RTF | {"numerator": "exact"},
    "rtf_schur": RTF | {"stability": "schur", "initialization": "schur"},
}


def make(name: str) -> Filter:
    torch.manual_seed(2)
    made = build(FILTERS[name], channels=CHANNELS, max_length=LENGTH)
    if name.startswith("rtf") and name != "rtf_schur":
        with torch.no_grad():  # poles apart, none of them negative
            roots = np.array([0.97, 0.6, 0.9 * np.exp(0.4j), 0.9 * np.exp(-0.4j), 0.3])
            made.load_denominator(torch.from_numpy(np.poly(roots).real[1:]).repeat(len(made.a), 1))
            made.b.normal_()
    return made


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert float(((found - expected).norm() / expected.norm()).detach()) < tolerance


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("name", FILTERS)
def test_taps_at_a_lower_rate_are_sums_of_taps(name: str, step: int) -> None:
    made = make(name)
    taps = made().impulse_response(step * LENGTH).detach().double()
    before = made.config()
    made.resample(step)
    assert made.config() == before
    close(made().impulse_response(LENGTH).double(), taps.unflatten(-1, (LENGTH, step)).sum(-1))


@pytest.mark.parametrize("name", [name for name in FILTERS if name != "rtf_schur"])
def test_a_higher_rate_and_back_is_the_filter(name: str) -> None:
    made = make(name).double()
    taps = made().impulse_response(LENGTH).detach()
    made.resample(0.4)
    assert made().impulse_response(LENGTH).isfinite().all()
    made.resample(2.5)
    close(made().impulse_response(LENGTH), taps)


@pytest.mark.parametrize(
    "config",
    [{"type": "s4", "state_size": 8, "dt_max": 0.01}, S4D | {"discretization": "bilinear"}],
)
def test_bilinear_filters_are_discretized_anew(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    made = build(config, channels=CHANNELS, max_length=LENGTH)
    sums = made().impulse_response(2 * LENGTH).unflatten(-1, (LENGTH, 2)).sum(-1)
    made.resample(2)
    found = made().impulse_response(LENGTH)
    close(found.cumsum(-1), sums.cumsum(-1), 0.1)  # the step response, up to the order of dt²


def test_a_modal_system_is_sampled_as_zero_order_hold_samples() -> None:
    """Of one continuous system, at two rates."""
    A, B = np.diag([-1.0, -3.0]), np.ones((2, 1))
    continuous = control.ss(A, B, np.array([[2.0, -1.0]]), 0)

    def sampled(dt: float) -> Modal:
        discrete = control.c2d(continuous, dt, "zoh")
        poles = torch.tensor(np.diag(discrete.A)) + 0j
        # Outputs follow the input that was held until then.
        first = torch.from_numpy(discrete.C[0] * discrete.B[:, 0])
        return Modal(poles[None], (first * poles)[None], first.sum()[None])

    for step in (2.0, 0.3):
        found, expected = sampled(0.1).resample(step), sampled(0.1 * step)
        for name in ("poles", "residues", "d"):
            assert_close(getattr(found, name), getattr(expected, name), rtol=1e-10, atol=1e-12)


def test_special_poles_of_a_modal_system() -> None:
    ones = torch.ones(1, 1, dtype=torch.complex128)
    integrator = Modal(ones, ones, torch.zeros(1, dtype=torch.float64)).resample(3)
    assert_close(
        integrator.impulse_response(4), torch.tensor([[2.0, 3.0, 3.0, 3.0]], dtype=torch.float64)
    )
    delay = Modal(0 * ones, ones, torch.zeros(1, dtype=torch.float64))
    assert_close(delay.resample(2).impulse_response(3)[0].tolist(), [1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="a pole at 0 has no value between samples"):
        delay.resample(0.5)


def test_what_cannot_be_resampled_gets_a_sentence() -> None:
    with pytest.raises(NotImplementedError, match="'implicit' has no sampling rate to change"):
        build({"type": "implicit"}, channels=2, max_length=8).resample(2)
    for name in ("s4d", "modal", "rtf_exact"):
        for step in (0, -1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="step must be a finite number above 0"):
                make(name).resample(step)
    made = make("rtf_truncated")
    roots = np.array([-0.5, 0.2, 0.3, 0.6, 0.7])
    made.load_denominator(torch.from_numpy(np.poly(roots)[1:]).repeat(CHANNELS, 1))
    before = made().impulse_response(LENGTH)
    with pytest.raises(ValueError, match="negative real axis has real powers for integer steps"):
        made.resample(1.5)
    assert torch.equal(made().impulse_response(LENGTH), before)
    made.resample(2)
    made = make("rtf_truncated")
    before = made().impulse_response(LENGTH)
    with pytest.raises(ValueError, match=r"coefficients in torch\.float32 miss the taps"):
        made.resample(0.4)
    assert torch.equal(made().impulse_response(LENGTH), before)
