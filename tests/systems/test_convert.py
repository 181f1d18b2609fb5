"""Every change of realisation keeps the impulse response, or is refused with the reason."""

import numpy as np
import pytest
import scipy.signal
import torch

from gramian import FIR, Modal, StateSpace, TransferFunction
from gramian.systems import (
    System,
    from_control,
    from_zpk,
    to_control,
    to_fir,
    to_modal,
    to_state_space,
    to_transfer_function,
    to_zpk,
)

CONVERSIONS = {
    "transfer_function": (to_transfer_function, TransferFunction),
    "modal": (to_modal, Modal),
    "state_space": (to_state_space, StateSpace),
    "fir": (to_fir, FIR),
}


def make(name: str, order: int = 7, channels: tuple[int, ...] = (2, 3)) -> System:
    """An odd order: a real pole among conjugate pairs."""
    torch.manual_seed(order)
    pairs, single = order // 2, order % 2
    poles = torch.polar(
        0.5 + 0.45 * torch.rand(*channels, pairs + single, dtype=torch.float64),
        torch.pi * torch.rand(*channels, pairs + single, dtype=torch.float64),
    )
    if single:
        poles[..., -1] = poles[..., -1].real + 0j
    residues = torch.randn(*channels, pairs + single, dtype=torch.complex128)
    modal = Modal(poles, residues, torch.randn(channels, dtype=torch.float64))
    if name == "fir":
        return FIR(torch.randn(*channels, order + 1, dtype=torch.float64))
    if name == "state_space":  # in coordinates that show nothing
        dense = to_state_space(modal)
        change = torch.linalg.qr(torch.randn(*dense.A.shape, dtype=torch.float64))[0]
        return StateSpace(
            change @ dense.A @ change.mT,
            (change @ dense.B.unsqueeze(-1)).squeeze(-1),
            (change @ dense.C.unsqueeze(-1)).squeeze(-1),
            dense.D,
        )
    return modal if name == "modal" else to_transfer_function(modal)


def stepped(system: System, length: int) -> torch.Tensor:
    recurrence = system.recurrence()
    state, taps = recurrence.initial_state(system.channel_shape), []
    for t in range(length):
        impulse = torch.full(system.channel_shape, float(t == 0), dtype=torch.float64)
        y, state = recurrence.step(impulse, state)
        taps.append(y)
    return torch.stack(taps, -1)


@pytest.mark.pairs
@pytest.mark.parametrize("order", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("target", ["transfer_function", "modal", "state_space"])
@pytest.mark.parametrize("source", ["transfer_function", "modal", "state_space", "fir"])
def test_impulse_response_is_kept(source: str, target: str, order: int) -> None:
    if (source, target) == ("fir", "modal") and order > 1:
        pytest.skip("refused: see below")
    system = make(source, order)
    convert, kind = CONVERSIONS[target]
    converted = convert(system)
    assert isinstance(converted, kind)
    assert converted.channel_shape == system.channel_shape
    assert converted.order == system.order == order
    before = system.impulse_response(200)
    after = stepped(converted, 200) if target == "state_space" else converted.impulse_response(200)
    assert after.dtype == torch.float64
    torch.testing.assert_close(after, before, rtol=0, atol=1e-8 * float(before.abs().max()))


def test_ragged_orders_and_silent_modes() -> None:
    poles = torch.tensor([[0.5 + 0.1j, -0.3 + 0j, 0.2 + 0.2j], [0.9 + 0j, 0.8 + 0j, 0j]])
    residues = torch.tensor([[1.0 + 1j, 1.0, 0.0], [1.0, 1.0, 0.0]])
    system = Modal(poles.cdouble(), residues.cdouble(), torch.zeros(2).double())
    fraction = to_transfer_function(system)
    assert fraction.order == 3
    assert float(fraction.a[1, 2]) == 0  # a pole at zero
    for converted in (fraction, to_state_space(system)):
        torch.testing.assert_close(converted.impulse_response(50), system.impulse_response(50))


def test_finite_kernels() -> None:
    kernel = make("fir", 5)
    fraction = to_transfer_function(kernel)
    assert float(fraction.a.abs().max()) == 0
    for finite in (fraction, to_state_space(kernel), kernel):
        back = to_fir(finite)
        torch.testing.assert_close(back.kernel, kernel.kernel)
    one = FIR(torch.ones(2, 1))
    assert to_modal(one).order == 0
    for endless in ("modal", "transfer_function", "state_space"):
        with pytest.raises(ValueError, match="no end"):
            to_fir(make(endless))
    with pytest.raises(ValueError, match="equal poles have no modal form"):
        to_modal(kernel)


def test_equal_poles_have_no_modal_form() -> None:
    finite = TransferFunction(torch.ones(3), torch.zeros(3), torch.zeros(()))
    jordan = torch.tensor([[0.5, 1.0], [0.0, 0.5]])
    block = StateSpace(jordan, torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), torch.zeros(()))
    for defective in (finite, block):
        with pytest.raises(ValueError, match="coincide") as caught:
            to_modal(defective)
        assert "\n" not in str(caught.value)


def test_what_rounding_spoils_is_refused() -> None:
    """Sixty poles on a short arc: no polynomial in double precision has them."""
    poles = torch.polar(torch.full((60,), 0.99), torch.linspace(0.01, 0.1, 60)).cdouble()
    system = Modal(poles, torch.ones(60).cdouble(), torch.zeros(()).double())
    with pytest.raises(ValueError, match="coefficients lose"):
        to_transfer_function(system)


def test_other_objects_are_refused() -> None:
    for convert, _ in CONVERSIONS.values():
        with pytest.raises(TypeError, match="time-invariant"):
            convert(torch.ones(3))


def test_gradients_pass() -> None:
    modal = make("modal", 4, (2,))
    poles, residues = modal.poles.requires_grad_(), modal.residues.requires_grad_()
    b = to_transfer_function(Modal(poles, residues, modal.d)).b
    A = to_state_space(Modal(poles, residues, modal.d)).A
    gradients = torch.autograd.grad(b.square().sum() + A.square().sum(), (poles, residues))
    assert all(bool(g.isfinite().all()) and float(g.abs().max()) > 0 for g in gradients)


@pytest.mark.parametrize("name", ["transfer_function", "modal", "state_space", "fir"])
def test_python_control_and_back(name: str) -> None:
    control = pytest.importorskip("control")
    system = make(name, 5, ())
    theirs = system.to_control()
    _, output = control.impulse_response(theirs, T=np.arange(40))
    np.testing.assert_allclose(output, system.impulse_response(40), rtol=0, atol=1e-9)
    back = from_control(theirs)
    assert type(back) is (TransferFunction if name in ("transfer_function", "fir") else StateSpace)
    torch.testing.assert_close(back.impulse_response(40), system.impulse_response(40))


def test_python_controls_other_systems_are_refused() -> None:
    control = pytest.importorskip("control")
    with pytest.raises(ValueError, match="discrete time"):
        from_control(control.tf([1.0], [1.0, 2.0]))
    with pytest.raises(ValueError, match="one input"):
        from_control(control.drss(2, 2, 1))
    with pytest.raises(TypeError, match="float"):
        from_control(1.0)
    with pytest.raises(ValueError, match="index the system"):
        to_control(make("modal"))


@pytest.mark.parametrize("order", [1, 2, 5])
def test_zeros_poles_and_gain(order: int) -> None:
    for zpk in (
        scipy.signal.butter(order, 0.3, output="zpk"),
        (np.empty(0), np.array([0.5, -0.2]), 2.0),  # a delay of two steps
    ):
        system = from_zpk(*zpk)
        impulse = scipy.signal.dimpulse((*zpk, 1), n=30)[1][0][:, 0]
        np.testing.assert_allclose(system.impulse_response(30), impulse, rtol=0, atol=1e-12)
        zeros, poles, gain = to_zpk(system)
        again = from_zpk(zeros, poles, gain)
        torch.testing.assert_close(again.impulse_response(30), system.impulse_response(30))
        np.testing.assert_allclose(np.sort_complex(poles), np.sort_complex(zpk[1]), atol=1e-6)
    with pytest.raises(ValueError, match="at most as many zeros"):
        from_zpk([0.1, 0.2], [0.5], 1.0)
    with pytest.raises(ValueError, match="conjugate"):
        from_zpk([], [0.5j], 1.0)
    assert to_zpk(from_zpk([], [0.5], 0.0))[2] == 0.0


def test_polynomials_that_lose_their_poles_are_refused() -> None:
    for order, edge in ((10, 0.02), (20, 0.01)):
        with pytest.raises(ValueError, match="lose what these poles hold"):
            from_zpk(*scipy.signal.butter(order, edge, output="zpk"))
    from_zpk(*scipy.signal.butter(6, 0.1, output="zpk"))


def test_lists_keep_double_precision() -> None:
    assert TransferFunction.from_scipy([1.0, 0, 0], [1, -1.8, 0.81]).a[0] == -1.8


def test_scipys_state_space() -> None:
    rng = np.random.default_rng(0)
    A = rng.standard_normal((3, 3)) / 3
    B, C, D = rng.standard_normal((3, 1)), rng.standard_normal((1, 3)), np.array([[0.5]])
    system = StateSpace.from_scipy(A, B, C, D)
    u = rng.standard_normal(50)
    expected = scipy.signal.dlsim((A, B, C, D, 1), u)[1][:, 0]
    np.testing.assert_allclose(system(torch.from_numpy(u)), expected, atol=1e-12)
    for mine, given in zip(system.to_scipy(), (A, B, C, D), strict=True):
        np.testing.assert_array_equal(mine, given)
