"""Textbook filters through every way in: right to a stated accuracy, refused or warned of."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import scipy.signal
import torch

from gramian import Modal, StateSpace, TransferFunction
from gramian.ess import effective_state_size
from gramian.systems import (
    TimeInvariantSystem,
    from_zpk,
    to_modal,
    to_time_varying,
    to_transfer_function,
)
from gramian.systems.transfer_function import proper_fraction
from tests.systems.reference import FAMILIES, design, designed, relative_error, stepped_exactly

BANDS = ("low", "high", "bandpass", "bandstop")


def attempt(make: Callable[[], TimeInvariantSystem]) -> tuple[TimeInvariantSystem | None, bool]:
    """What is made and whether a warning came with it; None where it is refused in one sentence."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            system = make()
        except ValueError as refusal:
            assert not isinstance(refusal, torch.linalg.LinAlgError)
            assert "\n" not in str(refusal) and str(refusal).endswith(".")
            return None, False
    assert all(issubclass(w.category, UserWarning) for w in caught)
    return system, bool(caught)


def check(family: str, order: int, cutoff, band: str, length: int) -> dict[str, bool]:
    """Every way in of one filter; which of them refused or warned."""
    z, p, k = design(family, order, cutoff, band)
    sos = design(family, order, cutoff, band, "sos")
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", scipy.signal.BadCoefficients)
        b, a = scipy.signal.zpk2tf(z, p, k)
        matrices = scipy.signal.tf2ss(b, a)
    taps = designed(z, p, k, length)
    impulse = np.zeros(2**14)
    impulse[0] = 1
    norm = np.linalg.norm(scipy.signal.sosfilt(sos, impulse))  # of the whole response

    def error(system: TimeInvariantSystem, expected=taps, scale: float = norm) -> float:
        found = system.impulse_response(length).numpy()
        return float(np.linalg.norm(found - expected)) / scale

    turned_away = {}
    # Without polynomials nothing is lost.
    sections = StateSpace.from_zpk(z, p, k)
    assert error(sections) < 1e-10
    assert error(StateSpace.from_sos(sos)) < 1e-10
    assert float(sections.spectral_radius()) < 1
    # Partial fractions, unless poles coincide.
    modal, _ = attempt(lambda: Modal.from_zpk(z, p, k))
    other, _ = attempt(lambda: Modal.from_sos(sos))
    converted, _ = attempt(lambda: to_modal(sections))
    turned_away["modal"] = modal is None
    for system in (modal, other, converted):
        if system is not None:
            assert error(system) < 2e-8
            assert float(system.spectral_radius()) < 1
    # Polynomials, where they hold the filter.
    for name, tolerance, make in (
        ("from_zpk", 2e-6, lambda: from_zpk(z, p, k)),
        ("from_scipy", 1e-5, lambda: TransferFunction.from_scipy(b, a)),
        ("to_transfer_function", 2e-8, lambda: to_transfer_function(sections)),
    ):
        fraction, warned = attempt(make)
        turned_away[name] = fraction is None or warned
        if not turned_away[name]:
            assert error(fraction) < tolerance, name
            assert float(fraction.spectral_radius()) < 1
    # The matrices that scipy makes of polynomials are what they are, even where they explode: plain
    # steps in double precision are then off by as much as 1e10.
    exact = stepped_exactly(*matrices, length)
    companion, warned = attempt(lambda: StateSpace.from_scipy(*matrices))
    assert companion is not None
    assert warned or error(companion) < 1e-5
    own = float(np.linalg.norm(exact))
    assert error(companion, exact, own) < (1e-6 if float(companion.spectral_radius()) < 1 else 1e-4)
    fraction = TransferFunction(*proper_fraction(b, a, torch.float64))
    modes, _ = attempt(lambda: to_modal(fraction))
    if modes is not None:
        expected = fraction.impulse_response(length).numpy()
        assert error(modes, expected, float(np.linalg.norm(expected))) < 1e-6
        assert float(fraction.spectral_radius()) > 1 or float(modes.spectral_radius()) < 1
    # A signal in chunks.
    u = np.random.default_rng(order).standard_normal(length)
    expected = scipy.signal.sosfilt(sos, u)
    for system in (sections, modal):
        if system is not None:
            recurrence, outputs = system.recurrence(), []
            state = recurrence.initial_state(())
            for chunk in np.split(u, [1, length // 3]):
                y, state = recurrence.prefill(torch.from_numpy(chunk.copy()), state)
                outputs.append(y)
            assert np.linalg.norm(torch.cat(outputs).numpy() - expected) < 1e-7 * max(
                np.linalg.norm(expected), norm
            )
    # Values and state-sizes by different factorisations.
    values = sections.hankel_singular_values()
    sizes = effective_state_size(sections, at=32, horizon=64)
    dense = effective_state_size(to_time_varying(sections, 64), at=32)
    assert abs(float(sizes - dense)) < 1e-6
    assert bool(values.isfinite().all()) and float(values[0]) > 0
    if modal is not None:
        again = modal.hankel_singular_values()[: len(values)]
        assert relative_error(again, values[: len(again)]) < 1e-7
        if np.linalg.norm(taps[1:64]) > 1e-3 * norm:  # else modes cancel more than all digits
            assert abs(float(sizes - effective_state_size(modal, at=32, horizon=64))) < 1e-5
    # In single precision.
    for system in (sections, modal):
        if system is not None:
            narrow, warned = attempt(lambda system=system: system.to(torch.float32))
            assert narrow is not None
            if not warned:
                assert error(narrow.to(torch.float64)) < 1e-3
    return turned_away


def drawn(rng: np.random.Generator) -> tuple:
    """A family, order, cutoffs and band at random; cutoffs and widths on a logarithmic scale."""
    family, band = str(rng.choice(FAMILIES)), str(rng.choice(BANDS))
    order = int(rng.integers(1, 13))
    low = float(np.exp(rng.uniform(np.log(0.002), np.log(0.9))))
    if not band.startswith("band"):
        return family, order, low, band
    high = min(0.95, low * float(np.exp(rng.uniform(0.05, 1.5))))
    return family, order, [min(low, 0.95 * high), high], band


@pytest.mark.each
@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_band(family: str, band: str) -> None:
    order = 3 + FAMILIES.index(family) % 3
    cutoff = [0.03, 0.05] if band.startswith("band") else 0.04
    check(family, order, cutoff, band, 250)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_thousand_filters(seed: int) -> None:
    rng = np.random.default_rng(seed)
    outcomes = [check(*drawn(rng), 600) for _ in range(50)]
    # Refusals are for what polynomials cannot hold, not for everything.
    assert sum(outcome["modal"] for outcome in outcomes) <= 5
    assert sum(outcome["from_scipy"] for outcome in outcomes) <= 35


def hankel_values_exactly(z, p, k) -> np.ndarray:
    """By Cholesky factors of both Gramians of the cascade in 60 digits."""
    with mpmath.workdps(60):
        A, B, C, _ = (mpmath.matrix(m.tolist()) for m in StateSpace.from_zpk(z, p, k).to_scipy())

        def gramian(A, Q):
            while True:
                more = A * Q * A.T
                Q = Q + more
                if mpmath.norm(more) < mpmath.mpf(10) ** -58 * mpmath.norm(Q):
                    return Q
                A = A * A

        L = mpmath.cholesky(gramian(A, B * B.T))
        values = mpmath.eigsy(L.T * gramian(A.T, C.T * C) * L, eigvals_only=True)
        return np.array(sorted((float(mpmath.sqrt(abs(v))) for v in values), reverse=True))


@pytest.mark.parametrize(
    ("family", "order", "cutoff", "band"),
    [
        ("butter", 5, 0.02, "low"),
        ("cheby1", 6, 0.01, "low"),
        ("ellip", 4, 0.002, "high"),
        ("bessel", 3, [0.01, 0.02], "bandpass"),
        ("cheby2", 3, [0.1, 0.12], "bandstop"),
    ],
)
def test_hankel_singular_values(family: str, order: int, cutoff, band: str) -> None:
    z, p, k = design(family, order, cutoff, band)
    expected = torch.from_numpy(hankel_values_exactly(z, p, k))
    for system in (StateSpace.from_zpk(z, p, k), Modal.from_zpk(z, p, k)):
        found = system.hankel_singular_values()[: len(expected)]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected[0]))
