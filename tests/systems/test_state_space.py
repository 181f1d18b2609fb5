"""State-space systems whose powers cannot be squared: right in every way of running them."""

import numpy as np
import pytest
import scipy.signal
import torch

from gramian import StateSpace, TimeVarying, TransferFunction
from gramian.ess import effective_state_size
from gramian.systems import System, to_time_varying
from tests.systems.reference import relative_error, stepped_exactly

DESIGNS = [(4, 0.02), (5, 0.02), (6, 0.02), (8, 0.05), (12, 0.2)]
LENGTH = 500


def matrices(order: int, cutoff: float) -> tuple[np.ndarray, ...]:
    with np.errstate(all="ignore"):
        return scipy.signal.tf2ss(*scipy.signal.butter(order, cutoff))


def convolved(taps: np.ndarray, u: torch.Tensor) -> torch.Tensor:
    rows = [np.convolve(row, taps)[: u.shape[-1]] for row in u.numpy()]
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize(("order", "cutoff"), DESIGNS)
def test_companion_forms_of_scipy(order: int, cutoff: float) -> None:
    given = matrices(order, cutoff)
    system = StateSpace.from_scipy(*given)
    taps = stepped_exactly(*given, LENGTH)
    assert relative_error(system.impulse_response(LENGTH), taps) < 1e-12
    u = torch.randn(2, LENGTH, dtype=torch.float64)
    expected = convolved(taps, u)
    assert relative_error(system(u), expected) < 1e-12
    assert relative_error(system.matrix(40)[:, 0], taps[:40]) < 1e-12
    recurrence = system.recurrence()
    state, outputs = recurrence.initial_state((2,)), []
    for chunk in u.split((1, 63, 200, 236), -1):
        y, state = recurrence.prefill(chunk, state)
        outputs.append(y)
    assert relative_error(torch.cat(outputs, -1), expected) < 2e-8  # states are rounded in between
    y, _ = recurrence.step(u[:, 0], state)  # and a step goes on where chunks end
    stepping, state = [], recurrence.initial_state((2,))
    for t in range(LENGTH):
        out, state = recurrence.step(u[:, t], state)
        stepping.append(out)
    assert relative_error(y, recurrence.step(u[:, 0], state)[0]) < 1e-6
    # Plain steps round in every one.
    assert relative_error(torch.stack(stepping, -1), expected) < 1e-7


@pytest.mark.parametrize(("order", "cutoff"), DESIGNS)
def test_values_of_the_infinite_horizon(order: int, cutoff: float) -> None:
    """Those of a Butterworth low pass hardly depend on the cutoff: compare with a high one, where
    every method agrees, and with the taps.
    """
    b, a = scipy.signal.butter(order, cutoff)
    values = TransferFunction.from_scipy(b, a).hankel_singular_values()
    again = StateSpace.from_scipy(*matrices(order, cutoff)).hankel_singular_values()
    taps = stepped_exactly(*matrices(order, cutoff), 2400)
    block = torch.from_numpy(taps[1:2400]).unfold(-1, 1200, 1)
    expected = torch.linalg.svdvals(block)[:order]
    for found in (values, again):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.each
@pytest.mark.parametrize(("order", "cutoff"), [(5, 0.02), (6, 0.02), (8, 0.05)])
@pytest.mark.parametrize("kind", ["state_space", "transfer_function", "dense", "converted"])
def test_memory_in_use(kind: str, order: int, cutoff: float) -> None:
    b, a = scipy.signal.butter(order, cutoff)
    given = matrices(order, cutoff)
    length, at = 256, [30, 128, 200]
    fields = [torch.from_numpy(m) for m in given]
    system: System
    if kind == "transfer_function":
        system = TransferFunction.from_scipy(b, a)
    else:
        system = StateSpace.from_scipy(*given)
    if kind == "converted":
        system = to_time_varying(system, length)
    if kind == "dense":
        A, B, C, D = fields[0], fields[1][:, 0], fields[2][0], fields[3][0, 0]
        system = TimeVarying(*(m.expand(length, *m.shape).clone() for m in (A, B, C, D)))
    taps = stepped_exactly(*given, length)
    T = torch.from_numpy(scipy.linalg.toeplitz(taps, np.zeros(length)))
    sizes, counts = [], []
    for i in at:
        values = torch.linalg.svdvals(T[i:, :i])
        p = values[values > 1e-15] / values.sum()
        sizes.append(float((-(p * p.log()).sum()).exp()))
        counts.append(float((values > 1e-5 * values[0]).sum()))
    found = effective_state_size(system, at=at, horizon=length)
    torch.testing.assert_close(found, torch.tensor(sizes).double(), rtol=0, atol=1e-6)
    counted = effective_state_size(system, at=at, measure="tolerance", rtol=1e-5, horizon=length)
    assert counted.tolist() == counts


def test_dense_time_varying_systems_of_companion_matrices() -> None:
    given = matrices(6, 0.02)
    A, B, C, D = given[0], given[1][:, 0], given[2][0], given[3][0, 0]
    A, B, C, D = (torch.tensor(m).expand(300, *np.shape(m)).clone() for m in (A, B, C, D))
    system = TimeVarying(A, B, C, D)
    taps = stepped_exactly(*given, 300)
    T = torch.from_numpy(scipy.linalg.toeplitz(taps, np.zeros(300)))
    u = torch.randn(3, 300, dtype=torch.float64)
    assert relative_error(system(u), u @ T.mT) < 1e-7
    assert relative_error(system.matrix(), T) < 1e-7
    y, state = system(u[:, :77], system.recurrence().initial_state((3,)))
    rest, _ = system(u[:, 77:], state)
    assert relative_error(torch.cat([y, rest], -1), u @ T.mT) < 1e-7
    expected = torch.linalg.svdvals(T[150:, :150])[:6]
    torch.testing.assert_close(system.hankel_singular_values(), expected, rtol=0, atol=1e-7)
    short = system.steps(0, 12)
    leaves = [leaf.requires_grad_() for leaf in (short.A, short.B, short.C, short.D)]
    assert torch.autograd.gradcheck(
        lambda *f: TimeVarying(*f)(u[0, :12]), leaves, atol=1e-4, rtol=1e-3
    )


def test_a_system_with_a_pole_outside_grows() -> None:
    b, a = [0.0, 1.0, 0.5], [1.0, -2.5, 1.2]
    with pytest.warns(UserWarning, match="these matrices have a pole of modulus 1.85"):
        system = StateSpace.from_scipy(np.array([[2.5, -1.2], [1, 0]]), [1, 0], [1, 0.5], 0)
    expected = scipy.signal.lfilter(b, a, np.eye(1, 200)[0])
    assert relative_error(system.impulse_response(200), expected) < 1e-12
    with pytest.raises(ValueError, match="inside the unit circle"):
        system.hankel_singular_values()


def test_gradients_in_changed_coordinates() -> None:
    A, B, C, D = (
        torch.from_numpy(np.array(m)) for m in scipy.signal.tf2ss(*scipy.signal.butter(2, 0.002))
    )
    fields = [m.clone().requires_grad_() for m in (A, B[:, 0], C[0], D[0, 0])]
    assert StateSpace(*fields).realized()[0].factors
    u = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)

    def chunk(A, B, C, D, u, x):
        system = StateSpace(A, B, C, D)
        state = type(system.recurrence().initial_state((2,)))(x)
        y, (x,) = system(u, state)
        return y, x, system.impulse_response(7)

    assert torch.autograd.gradcheck(chunk, (*fields, u, x))


def test_a_parameter_that_is_updated_is_seen() -> None:
    """Only frozen copies remember coordinates."""
    A, B, C, D = (torch.from_numpy(m) for m in matrices(6, 0.02))
    system = StateSpace(A, B[:, 0], C[0], D[0, 0])
    recurrence = system.recurrence()
    before = system.impulse_response(50)
    A.mul_(0.5)
    after = system.impulse_response(50)
    assert relative_error(after, before) > 0.1
    kept, _ = recurrence.prefill(torch.eye(1, 50, dtype=torch.float64)[0])
    assert relative_error(kept, before) < 1e-9


def test_what_cannot_be_computed_is_refused() -> None:
    system = StateSpace(*(torch.full(s, torch.nan) for s in ((2, 2), (2,), (2,), ())))
    with pytest.raises(ValueError, match="double precision"):
        system.hankel_singular_values()
