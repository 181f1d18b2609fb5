"""Time-varying systems and dense operators: every mode is the operator of the definition."""

import copy

import pytest
import torch
import torch.utils._pytree as pytree

from gramian import FIR, Modal, StateSpace, TransferFunction
from gramian.systems import (
    DPLR,
    DenseOperator,
    State,
    System,
    TimeVarying,
    gated_convolution,
    to_dense_operator,
    to_modal,
    to_time_varying,
)
from gramian.testing import check_system

LENGTHS = [1, 2, 3, 63, 257, 1000]
SYSTEMS = ["diagonal", "delta", "dense", "operator"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(name: str, length: int, channels: tuple[int, ...] = (3,), order: int = 5) -> System:
    if name == "operator":
        return DenseOperator(torch.randn(*channels, length, length, dtype=torch.float64))
    B, C = torch.randn(2, *channels, length, order, dtype=torch.float64)
    D = torch.randn(*channels, length, dtype=torch.float64)
    if name == "dense":
        A = torch.linalg.qr(torch.randn(*channels, length, order, order, dtype=torch.float64))[0]
        return TimeVarying(0.98 * A, B, C, D)
    A = torch.rand(*channels, length, order, dtype=torch.float64) * 1.5 - 0.5
    A[..., length // 2, 0] = 0  # a gate that shuts
    if name == "diagonal":
        return TimeVarying(A.clamp_max(1), B, C, D)
    key = torch.nn.functional.normalize(B, dim=-1)
    beta = 2 * torch.rand(*channels, length, 1, dtype=torch.float64)  # up to a reflection
    return TimeVarying(torch.ones_like(A), key, C, D, -beta * key, key)


@pytest.mark.each
@pytest.mark.parametrize("channels", [(), (3,), (2, 3)])
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_kind_conforms(name, channels):
    check_system(make(name, 63, channels))


def definition(system: System, length: int) -> torch.Tensor:
    """The operator column by column, (*C, length, length)."""
    if isinstance(system, DenseOperator):
        return system.entries[..., :length, :length].tril()
    A = system.A if system.A.ndim > system.B.ndim else torch.diag_embed(system.A)
    if system.p is not None:
        A = A + system.p.unsqueeze(-1) * system.q.unsqueeze(-2)
    T = torch.zeros(*system.channel_shape, length, length, dtype=system.dtype)
    for j in range(length):
        T[..., j, j] = system.D[..., j]
        x = system.B[..., j, :]
        for i in range(j + 1, length):
            T[..., i, j] = (system.C[..., i, :] * x).sum(-1)
            x = (A[..., i, :, :] @ x.unsqueeze(-1)).squeeze(-1)
    return T


def by_steps(system: System, u: torch.Tensor) -> torch.Tensor:
    recurrence = system.recurrence()
    state, outputs = recurrence.initial_state(u.shape[:-1]), []
    for sample in u.unbind(-1):
        y, state = recurrence.step(sample, state)
        outputs.append(y)
    return torch.stack(outputs, -1)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_matrix_is_that_of_the_definition(name):
    for length in (1, 2, 3, 29):
        system = make(name, 29)
        expected = definition(system, length)
        torch.testing.assert_close(system.matrix(length), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(system.matrix(), system.matrix(29))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_mode_is_the_same_operator(name, length):
    system = make(name, length)
    u = torch.randn(2, 3, length, dtype=torch.float64)
    expected = (system.matrix(length) @ u.unsqueeze(-1)).squeeze(-1)

    def close(actual: torch.Tensor) -> None:
        scale = float(expected.abs().max())
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11 * scale)

    close(system(u))
    close(by_steps(system, u))
    short = max(1, length // 2)
    close(torch.cat([system(u[..., :short]), expected[..., short:]], -1))

    recurrence = system.recurrence()
    cut, steps = length // 3, min(5, length - length // 3)
    outputs, state = [], recurrence.initial_state((2, 3))
    if cut:
        y, state = recurrence.prefill(u[..., :cut])
        outputs.append(y)
    for t in range(cut, cut + steps):
        y, state = recurrence.step(u[..., t], state)
        outputs.append(y.unsqueeze(-1))
    y, state = system(u[..., cut + steps :], state)
    close(torch.cat([*outputs, y], -1))
    assert int(state.position) == length
    for go_on in (system, recurrence.prefill):
        with pytest.raises(ValueError, match=f"has {length} steps of which {length}"):
            go_on(u[..., :1], state)
    with pytest.raises(ValueError, match=f"has {length} steps of which {length}"):
        recurrence.step(u[..., 0], state)


@pytest.mark.parametrize("name", SYSTEMS)
def test_channels_broadcast_against_more_streams(name):
    system = make(name, 33)[:, None]
    assert system.channel_shape == (3, 1)
    u = torch.randn(2, 3, 4, 33, dtype=torch.float64)
    expected = (system.matrix() @ u.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(system(u), expected, rtol=0, atol=1e-10)
    recurrence = system.recurrence()
    y, state = recurrence.prefill(u[..., :20])
    rest, _ = system(u[..., 20:], state)
    torch.testing.assert_close(torch.cat([y, rest], -1), expected, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="broadcast"):
        system(torch.randn(2, 4, 4, 33))


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("channels", [(), (1,), (2, 3)])
def test_any_channel_shape(name, channels):
    system = make(name, 20, channels)
    assert system.channel_shape == channels
    u = torch.randn(*channels, 20, dtype=torch.float64)
    expected = (system.matrix() @ u.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(system(u), expected, rtol=0, atol=1e-10)
    assert system.hankel_singular_values(at=3).shape[:-1] == channels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SYSTEMS)
def test_precision_of_the_input_is_kept(name, dtype):
    system = make(name, 100).to(torch.float32)
    u = torch.randn(2, 3, 100).to(dtype)
    expected = (system.to(torch.float64).matrix() @ u.double().unsqueeze(-1)).squeeze(-1)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    chunk, state = system.recurrence().prefill(u[..., :60])
    rest, _ = system(u[..., 60:], state)
    for actual in (system(u), by_steps(system, u), torch.cat([chunk, rest], -1)):
        assert actual.dtype == dtype
        assert (actual.double() - expected).norm() < tolerance * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        again = system(u.float())
    assert (again - expected).norm() < 1e-5 * expected.norm()
    half = system.to(dtype)
    assert half.dtype == half.matrix().dtype == half.hankel_singular_values().dtype == dtype


@pytest.mark.parametrize("name", SYSTEMS)
def test_hankel_singular_values(name):
    system = make(name, 41, (2,))
    for length, at in ((None, None), (None, 13), (30, 2), (41, 40), (2, 1)):
        horizon = length or 41
        cut = at or horizon // 2
        block = system.matrix(horizon)[..., cut:, :cut]
        expected = torch.linalg.svdvals(block)
        actual = system.hankel_singular_values(length, at)
        expected = expected[..., : actual.shape[-1]]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * float(expected.max()))
        assert actual.shape[-1] == min(system.order, cut, horizon - cut)
    for bad in (0, 41):
        with pytest.raises(ValueError, match="must lie in 1"):
            system.hankel_singular_values(41, bad)
    with pytest.raises(ValueError, match="has 41 steps"):
        system.hankel_singular_values(42)


@pytest.mark.parametrize("name", SYSTEMS)
def test_pytree_and_indexing(name):
    system = make(name, 12)
    leaves, spec = pytree.tree_flatten(system)
    again = pytree.tree_unflatten(leaves, spec)
    assert type(again) is type(system)
    assert torch.equal(again.matrix(), system.matrix())
    torch.testing.assert_close(system[1:].matrix(), system.matrix()[1:])
    assert system.reshape_channels(3, 1).channel_shape == (3, 1)
    assert system.to(torch.float32).dtype == torch.float32
    assert torch.equal(copy.deepcopy(system).matrix(), system.matrix())
    with pytest.raises(AttributeError):
        system.order = 3
    assert system.order == (11 if name == "operator" else 5)


@pytest.mark.parametrize("name", SYSTEMS)
def test_states_can_be_selected_repeated_and_moved(name):
    system = make(name, 40)
    recurrence = system.recurrence()
    u = torch.randn(4, 3, 30, dtype=torch.float64)
    _, state = recurrence.prefill(u)
    assert isinstance(state, State)
    assert state.nbytes == sum(x.nbytes for x in pytree.tree_leaves(state) if x.ndim)
    order = torch.tensor([2, 0, 0])
    _, expected = recurrence.prefill(u[order])
    torch.testing.assert_close(tuple(state.select(order)), tuple(expected))
    _, expected = recurrence.prefill(u.repeat_interleave(2, 0))
    torch.testing.assert_close(tuple(state.repeat(2)), tuple(expected))
    assert all(x.dtype == torch.float32 for x in state.to(dtype=torch.float32) if x.ndim)
    kept = state.clone()
    recurrence.step(u[..., 0], state)
    _, expected = recurrence.prefill(u)
    torch.testing.assert_close(tuple(kept), tuple(expected))


@pytest.mark.parametrize("name", ["diagonal", "delta", "dense"])
def test_the_state_goes_on_in_the_system_of_the_next_stretch(name):
    whole = make(name, 50)
    first, second = whole.steps(0, 20), whole.steps(20, 50)
    u = torch.randn(2, 3, 50, dtype=torch.float64)
    y, state = first(u[..., :20], first.recurrence().initial_state((2, 3)))
    z, _ = second(u[..., 20:], state.restart())
    torch.testing.assert_close(torch.cat([y, z], -1), whole(u), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", SYSTEMS)
def test_gradients_flow_through_output_and_state(name):
    system = make(name, 11, (2,), 6)
    leaves, spec = pytree.tree_flatten(system)
    values = [x.detach().clone().requires_grad_() for x in leaves if x is not None]
    u = torch.randn(2, 2, 11, dtype=torch.float64, requires_grad=True)
    nothing = [None] * (len(leaves) - len(values))

    def run(u, *values):
        system = pytree.tree_unflatten([*values, *nothing], spec)
        y, state = system(u[..., :4], system.recurrence().initial_state((2, 2)))
        z, state = system(u[..., 4:], state)
        return y, z, state[0], system(u), system.matrix(9)

    assert torch.autograd.gradcheck(run, (u, *values), fast_mode=True)


def rational(name: str) -> System:
    """Two channels."""
    d = torch.randn(2, dtype=torch.float64)
    poles = torch.polar(torch.rand(2, 3).double(), 3 * torch.rand(2, 3).double())
    residues = torch.randn(2, 3, dtype=torch.complex128)
    if name == "modal":
        return Modal(poles, residues, d)
    if name == "real_modal":
        return Modal(poles.real + 0j, residues, d)
    if name == "dplr":
        return DPLR(poles, residues, residues, residues / 9, residues / 9, d)
    if name == "fir":
        return FIR(torch.randn(2, 5, dtype=torch.float64))
    if name == "transfer_function":
        b, a = torch.randn(2, 2, 4, dtype=torch.float64)
        return TransferFunction(b, a / 4, d)
    A = torch.randn(2, 4, 4, dtype=torch.float64) / 3
    return StateSpace(A, *torch.randn(2, 2, 4, dtype=torch.float64), d)


@pytest.mark.parametrize(
    "name", ["modal", "real_modal", "dplr", "fir", "transfer_function", "state_space"]
)
def test_a_gated_convolution_is_a_time_varying_system(name):
    system = rational(name)
    length = 19
    T = system.matrix(length)
    constant = to_time_varying(system, length)
    torch.testing.assert_close(constant.matrix(), T, rtol=0, atol=1e-11)
    if name == "real_modal":
        assert constant.A.ndim == constant.B.ndim
    torch.testing.assert_close(to_dense_operator(system, length).matrix(), T)
    q, k = torch.randn(2, 3, 2, length, dtype=torch.float64)
    expected = q.unsqueeze(-1) * T * k.unsqueeze(-2)
    gated = gated_convolution(system, q, k)
    assert gated.channel_shape == (3, 2)
    torch.testing.assert_close(gated.matrix(), expected, rtol=0, atol=1e-11)
    u = torch.randn(3, 2, length, dtype=torch.float64)
    torch.testing.assert_close(gated(u), q * system(k * u), rtol=0, atol=1e-11)


def test_conversions_name_what_they_take():
    system, gate = rational("modal"), torch.randn(2, 9)
    for q, k in ((gate, gate[:, 1:]), (gate[0], gate[0]), (torch.ones(()), torch.ones(()))):
        with pytest.raises(ValueError, match="gates q and k") as caught:
            gated_convolution(system, q, k)
        assert "\n" not in str(caught.value)
    varying = make("diagonal", 9)
    assert to_time_varying(varying, 4).length == 4
    for call in (to_time_varying, to_dense_operator):
        with pytest.raises(ValueError, match="has 9 steps"):
            call(varying, 10)
    with pytest.raises(TypeError, match="time-invariant system is needed"):
        to_modal(varying)


def test_gradients_reach_the_gates():
    system = rational("state_space")
    gates = torch.randn(2, 2, 7, dtype=torch.float64, requires_grad=True)

    def run(gates, A, B):
        changed = StateSpace(A, B, system.C, system.D)
        return gated_convolution(changed, gates[0], gates[1]).matrix()

    fields = (system.A.requires_grad_(), system.B.requires_grad_())
    assert torch.autograd.gradcheck(run, (gates, *fields), fast_mode=True)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda v: TimeVarying(v, v, v, v), ValueError, "time-varying system takes"),
        (lambda v: TimeVarying(v, v, v[1:], v[..., 0]), ValueError, "time-varying system takes"),
        (lambda v: TimeVarying(v, v, v, v[..., 0], v), TypeError, "q of a time-varying"),
        (lambda v: TimeVarying(v.long(), v, v, v[..., 0]), TypeError, "real floating point"),
        (
            lambda v: TimeVarying(torch.diag_embed(v), v, v, v[..., 0], v, v),
            ValueError,
            "p and q belong to a diagonal",
        ),
        (lambda v: DenseOperator(v), ValueError, "L, L"),
        (lambda v: DenseOperator(torch.eye(3).long()), TypeError, "real floating point"),
        (lambda v: DenseOperator([1.0]), TypeError, "tensor"),
        (lambda v: make("dense", 4).recurrence("modal"), ValueError, "time_varying"),
        (lambda v: make("operator", 4).recurrence("modal"), ValueError, "dense"),
        (
            lambda v: make("dense", 4)(
                torch.ones(3, 4), make("operator", 4).recurrence().initial_state((3,))
            ),
            TypeError,
            "TimeVaryingState",
        ),
        (
            lambda v: make("operator", 4)(
                torch.ones(3, 4), make("dense", 4).recurrence().initial_state((3,))
            ),
            TypeError,
            "DenseOperatorState",
        ),
        (lambda v: make("operator", 4)(torch.ones(3, 5)), ValueError, "has 4 steps; 5 were"),
        (lambda v: make("delta", 4)(torch.ones(3, 5)), ValueError, "has 4 steps; 5 were"),
    ],
)
def test_bad_input_gets_one_sentence(call, error, match):
    with pytest.raises(error, match=match) as caught:
        call(torch.ones(4, 5, 3))
    assert "\n" not in str(caught.value)
