"""Zeros, poles, gains and second-order sections as systems; what rounding loses is said."""

import warnings

import numpy as np
import pytest
import scipy.signal
import torch

from gramian import FIR, Modal, StateSpace, TransferFunction
from gramian.systems import DPLR, from_zpk, to_modal, to_transfer_function
from tests.systems.reference import designed, relative_error

NARROW = [
    scipy.signal.butter(5, [1, 2], "band", fs=200, output="zpk"),
    scipy.signal.butter(8, [0.01, 0.02], "band", output="zpk"),
    scipy.signal.cheby1(12, 1.0, [0.63, 0.95], "bandstop", output="zpk"),
    scipy.signal.ellip(7, 0.5, 60, 0.003, output="zpk"),
]


@pytest.mark.parametrize("zpk", NARROW, ids=["butter", "narrow", "chebyshev", "elliptic"])
def test_filters_that_no_polynomial_holds(zpk: tuple) -> None:
    expected = designed(*zpk, 1500)
    sos = scipy.signal.zpk2sos(*zpk)
    for system in (
        StateSpace.from_zpk(*zpk),
        StateSpace.from_sos(sos),
        Modal.from_zpk(*zpk),
        Modal.from_sos(sos),
    ):
        assert system.channel_shape == () and system.order == len(zpk[1])
        assert relative_error(system.impulse_response(1500), expected) < 1e-9
        assert float(system.spectral_radius()) == pytest.approx(float(np.abs(zpk[1]).max()))
        recurrence = system.recurrence()
        state, taps = recurrence.initial_state(()), []
        for t in range(200):
            y, state = recurrence.step(torch.tensor(float(t == 0), dtype=torch.float64), state)
            taps.append(y)
        scale = np.linalg.norm(expected) / np.linalg.norm(expected[:200])
        assert relative_error(torch.stack(taps), expected[:200]) < 1e-9 * scale
    with pytest.raises(ValueError, match=r"StateSpace\.from_zpk and Modal\.from_zpk expand none"):
        from_zpk(*zpk)
    single = StateSpace.from_sos(sos, dtype=torch.float32)
    assert single.dtype == torch.float32


@pytest.mark.parametrize(
    ("zeros", "poles"),
    [
        ([], [0.9]),
        ([], [0.9, 0.9]),
        ([0.3], [0.9, 0.9, 0.9, -0.2, 0.0]),
        ([1.0, -1.0, 0.2], [0.9, 0.9, 0.9, 0.9, 0.9]),
        ([0.5 + 0.1j, 0.5 - 0.1j, 2.0], [0.7 + 0.2j, 0.7 - 0.2j] * 3),
        ([], [0.0, 0.0, 0.0]),
        ([1.5], [1.1, 0.5]),
        ([], [1.0]),
        ([], [0.9 + 1e-9j, 0.9 - 1e-9j]),
        ([-1.0] * 7, [0.5, 0.9 + 0.1j, 0.9 - 0.1j, 0.3, 0.2, 0.1, -0.9]),
    ],
)
def test_cascades_of_any_roots(zeros: list, poles: list) -> None:
    system = StateSpace.from_zpk(zeros, poles, -0.7)
    expected = designed(zeros, poles, -0.7, 200)
    assert system.order == len(poles)
    assert relative_error(system.impulse_response(200), expected) < 1e-12


def test_a_gain_alone() -> None:
    assert StateSpace.from_zpk([], [], 2.5).impulse_response(3).tolist() == [2.5, 0, 0]
    assert Modal.from_zpk([], [], 2.5).impulse_response(3).tolist() == [2.5, 0, 0]
    assert StateSpace.from_sos([[5.0, 0, 0, 2, 0, 0]]).impulse_response(2).tolist() == [2.5, 0]
    assert float(StateSpace.from_zpk([0.5], [0.2], 0.0).impulse_response(9).abs().max()) == 0


def test_sections_of_any_degree() -> None:
    rng = np.random.default_rng(0)
    sos = np.array(
        [
            [0.5, 0.2, 0.0, 2.0, -1.0, 0.0],  # of first order, not normalised
            [1.0, -2.0, 3.0, 1.0, -1.2, 0.7],
            [0.0, 1.0, 0.0, 1.0, -0.5, 0.06],  # a delay
            [1.0, 0.0, 0.5, 1.0, 0.0, 0.0],  # zeros only
        ]
    )
    u = rng.standard_normal(300)
    normalised = sos / sos[:, 3:4]
    expected = scipy.signal.sosfilt(normalised, u)
    for system in (StateSpace.from_sos(sos), StateSpace.from_sos(normalised)):
        assert relative_error(system(torch.from_numpy(u)), expected) < 1e-13
    with pytest.raises(ValueError, match="no partial fractions"):  # two poles at zero
        Modal.from_sos(sos)
    modal = Modal.from_sos(sos[:3])
    assert (
        relative_error(modal(torch.from_numpy(u)), scipy.signal.sosfilt(sos[:3] / sos[:3, 3:4], u))
        < 1e-13
    )


def test_equal_poles_have_no_partial_fractions() -> None:
    for gap in (0.0, 1e-12, 1e-9):
        with pytest.raises(ValueError, match=r"StateSpace\.from_zpk takes them") as caught:
            Modal.from_zpk([], [0.9, 0.9 + gap, 0.9 - gap], 1.0)
        assert "\n" not in str(caught.value)


def test_what_is_no_filter_is_refused() -> None:
    for make in (StateSpace.from_zpk, Modal.from_zpk, from_zpk):
        with pytest.raises(ValueError, match="at most as many zeros"):
            make([0.1, 0.2], [0.5], 1.0)
        with pytest.raises(ValueError, match="conjugate pairs"):
            make([], [0.5 + 0.1j, 0.4], 1.0)
        with pytest.raises(ValueError, match="conjugate pairs"):
            make([], [0.5 + 0.1j, 0.5 + 0.1j], 1.0)
        with pytest.raises(ValueError, match="finite"):
            make([], [np.nan], 1.0)
    for make in (StateSpace.from_sos, Modal.from_sos):
        with pytest.raises(ValueError, match="rows"):
            make([[1.0, 2.0]])
        with pytest.raises(ValueError, match="a0"):
            make([[1.0, 0, 0, 0, 1, 0]])


def test_python_control() -> None:
    control = pytest.importorskip("control")
    theirs = control.tf([1.0, 0.5], [1.0, -1.2, 0.5], True)
    _, expected = control.impulse_response(theirs, T=np.arange(40))
    for given in (theirs, control.ss(theirs)):
        for kind in (StateSpace, Modal):
            system = kind.from_control(given)
            assert isinstance(system, kind)
            assert relative_error(system.impulse_response(40), expected) < 1e-12
    with pytest.raises(TypeError, match="float"):
        Modal.from_control(1.0)


def test_coefficients_that_lost_their_poles_are_warned_of() -> None:
    for zpk in NARROW:
        with pytest.warns(UserWarning, match=r"do not hold these poles.*StateSpace\.from_sos"):
            TransferFunction.from_scipy(*scipy.signal.zpk2tf(*zpk))
        with pytest.warns(UserWarning, match=r"do not hold these poles.*StateSpace\.from_sos"):
            StateSpace.from_scipy(*scipy.signal.tf2ss(*scipy.signal.zpk2tf(*zpk)))
    with pytest.warns(UserWarning, match="modulus 1.5, outside of the unit circle"):
        TransferFunction.from_scipy([1.0, 0], [1.0, -1.5])
    with pytest.warns(UserWarning, match="float32 do not hold"):
        TransferFunction.from_scipy(*scipy.signal.butter(4, 0.02), dtype=torch.float32)


def test_good_coefficients_are_taken_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for order in range(1, 7):
            for cutoff in (0.1, 0.5, 0.9):
                b, a = scipy.signal.butter(order, cutoff)
                TransferFunction.from_scipy(b, a)
                StateSpace.from_scipy(*scipy.signal.tf2ss(b, a))
        TransferFunction.from_scipy([1.0], [1.0, -1.0])  # an integrator
        TransferFunction.from_scipy([1.0, 2.0, 3.0], [1.0])  # a finite kernel
        TransferFunction.from_scipy([1.0], [1.0])
        TransferFunction.from_scipy(np.ones((2, 3)), [1.0, -0.5, 0.1], dtype=torch.float32)


def near_double(gap: float) -> Modal:
    poles = torch.tensor([0.9, 0.9 + gap], dtype=torch.complex128)
    residues = torch.tensor([-1 / gap, 1 / gap], dtype=torch.complex128)
    return Modal(poles, residues, torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("gap", [1e-5, 1e-8])
def test_rounding_that_loses_what_cancels_is_warned_of(gap: float) -> None:
    system = near_double(gap)
    with pytest.warns(UserWarning, match="in float32 the impulse response of this Modal differs"):
        narrow = system.to(torch.float32)
    assert narrow.dtype == torch.float32
    with pytest.warns(UserWarning, match="float32"):
        system.to(dtype=torch.float32)
    b, a = scipy.signal.butter(4, 0.02)
    for polynomials in (
        TransferFunction.from_scipy(b, a),
        StateSpace.from_scipy(*scipy.signal.tf2ss(b, a)),
    ):
        with pytest.warns(UserWarning, match="float32"):
            polynomials.to(torch.float32)


def test_rounding_that_loses_nothing_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near_double(1e-2).to(torch.float32)
        near_double(1e-8).to("cpu")
        near_double(1e-8).to(torch.float64)
        StateSpace.from_zpk(*NARROW[0]).to(torch.float32).to(torch.float64)
        FIR(torch.randn(3, 20, dtype=torch.float64)).to(torch.bfloat16)
        poles = torch.full((2, 4), 0.5 + 0.1j, dtype=torch.complex128)
        fields = (torch.ones_like(poles) for _ in range(4))
        d = torch.zeros(2, dtype=torch.float64)
        DPLR(poles, *fields, d)[:0].to(torch.float32)
        for half in (torch.bfloat16, torch.float16):
            modal = Modal(poles, poles, d).to(half)
            assert (modal.d.dtype, modal.poles.dtype) == (half, torch.complex64)
            assert modal(torch.ones(2, 3, dtype=half)).dtype == half
        Modal(poles, poles, d).to(device="meta", dtype=torch.float32)


def test_clusters_become_modes_only_where_they_stay_right_for_all_time() -> None:
    """Four modes at radius 0.999: right on the first taps and wrong on the next thousands."""
    torch.manual_seed(0)
    accepted = 0
    for seed in range(14):
        rng = np.random.default_rng(seed)
        spread = 10.0 ** rng.uniform(-5, -1)
        radius = rng.choice([0.9, 0.99, 0.999])
        angles = rng.uniform(0.1, 3) + spread * rng.standard_normal(4)
        poles = radius * np.exp(1j * angles)
        modal = Modal(
            torch.from_numpy(poles),
            torch.from_numpy(rng.standard_normal(4) + 1j * rng.standard_normal(4)),
            torch.zeros((), dtype=torch.float64),
        )
        try:
            fraction = to_transfer_function(modal)
        except ValueError:
            continue
        before = modal.impulse_response(30_000)
        assert relative_error(fraction.impulse_response(30_000), before) < 2e-8
        assert float(fraction.spectral_radius()) < 1
        try:
            again = to_modal(fraction)
        except ValueError:
            continue
        accepted += 1
        assert relative_error(again.impulse_response(30_000), before) < 4e-8
        assert float(again.spectral_radius()) < 1
    assert accepted >= 2
