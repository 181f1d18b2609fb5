"""One suite over every system: convolution, chunks, steps and the matrix are the same operator."""

import copy

import numpy as np
import pytest
import scipy.signal
import torch
import torch.utils._pytree as pytree

from gramian import FIR, Modal, StateSpace, TransferFunction
from gramian.systems import (
    DPLR,
    State,
    System,
    to_modal,
    to_state_space,
    to_transfer_function,
)
from gramian.testing import check_system

LENGTHS = [1, 2, 3, 63, 257, 1000]


def conjugate_poles(*shape: int, radius: float = 0.97) -> torch.Tensor:
    return torch.polar(
        radius * torch.rand(shape, dtype=torch.float64).sqrt(),
        torch.pi * torch.rand(shape, dtype=torch.float64),
    )


def make(
    name: str, channels: tuple[int, ...] = (3,), order: int = 6, radius: float = 0.97
) -> System:
    d = torch.randn(channels, dtype=torch.float64)
    if name == "fir":
        return FIR(torch.randn(*channels, 40, dtype=torch.float64))
    if name == "modal":
        residues = torch.randn(*channels, order, dtype=torch.complex128)
        return Modal(conjugate_poles(*channels, order, radius=radius), residues, d)
    if name == "state_space":
        A = torch.randn(*channels, order, order, dtype=torch.float64)
        A = A * radius / torch.linalg.eigvals(A).abs().amax(-1)[..., None, None]
        B, C = torch.randn(2, *channels, order, dtype=torch.float64)
        return StateSpace(A, B, C, d)
    if name == "dplr":  # the bilinear transform of Λ - P P*, which keeps it stable
        poles = conjugate_poles(*channels, order // 2, radius=radius)
        P, B, C = torch.randn(3, *channels, order // 2, dtype=torch.complex128) / 2
        q = P.conj() * (1 + poles) / 2
        p = P * (1 + poles) / 2 / (1 + (q * P).real.sum(-1, keepdim=True))
        return DPLR(poles, B, C, p, q, d)
    poles = conjugate_poles(*channels, order // 2, radius=radius).reshape(-1, order // 2).numpy()
    a = np.stack([np.poly(np.r_[p, p.conj()]).real[1:] for p in poles])
    a = torch.from_numpy(a).reshape(*channels, order)
    b = torch.randn(*channels, order, dtype=torch.float64)
    if name == "transfer_function":
        return TransferFunction(b, a, d)
    assert name == "truncated"
    return TransferFunction.from_truncated(b, a, d, 1000)


SYSTEMS = ["dplr", "fir", "modal", "state_space", "transfer_function", "truncated"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def by_definition(system: System, u: torch.Tensor) -> torch.Tensor:
    """y = h * u by numpy, with the taps of every channel."""
    taps = system.impulse_response(u.shape[-1]).expand(*u.shape[:-1], -1)
    rows = [
        np.convolve(h, x)[: u.shape[-1]]
        for h, x in zip(
            taps.reshape(-1, u.shape[-1]).numpy(), u.reshape(-1, u.shape[-1]).numpy(), strict=True
        )
    ]
    return torch.from_numpy(np.stack(rows)).reshape(u.shape)


@pytest.mark.each
@pytest.mark.parametrize("channels", [(), (3,), (2, 3)])
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_kind_conforms(name, channels):
    check_system(make(name, channels))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_mode_is_the_same_operator(name, length):
    system = make(name)
    u = torch.randn(2, 3, length, dtype=torch.float64)
    expected = by_definition(system, u)
    scale = float(expected.abs().max())

    def close(actual: torch.Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * scale)

    close(system(u))
    close((system.matrix(length) @ u.unsqueeze(-1)).squeeze(-1))

    recurrence = system.recurrence()
    state = recurrence.initial_state((2, 3))
    outputs = []
    for t in range(length):
        y, state = recurrence.step(u[..., t], state)
        outputs.append(y)
    close(torch.stack(outputs, -1))

    cut, steps = length // 3, min(5, length - length // 3)
    outputs = []
    state = recurrence.initial_state((2, 3))
    if cut:
        y, state = recurrence.prefill(u[..., :cut])
        outputs.append(y)
    for t in range(cut, cut + steps):
        y, state = recurrence.step(u[..., t], state)
        outputs.append(y.unsqueeze(-1))
    if cut + steps < length:
        y, state = system(u[..., cut + steps :], state)
        outputs.append(y)
    close(torch.cat(outputs, -1))


@pytest.mark.parametrize("name", SYSTEMS)
def test_channels_broadcast_against_more_streams(name):
    system = make(name)[:, None]
    u = torch.randn(2, 3, 4, 33, dtype=torch.float64)
    expected = by_definition(system, u)
    torch.testing.assert_close(system(u), expected, rtol=0, atol=1e-9)
    recurrence = system.recurrence()
    y, state = recurrence.prefill(u[..., :20])
    rest, _ = recurrence.prefill(u[..., 20:], state)
    torch.testing.assert_close(torch.cat([y, rest], -1), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("channels", [(), (1,), (2, 3)])
def test_any_channel_shape(name, channels):
    system = make(name, channels)
    assert system.channel_shape == channels
    assert system.impulse_response(9).shape == (*channels, 9)
    u = torch.randn(*channels, 50, dtype=torch.float64)
    torch.testing.assert_close(system(u), by_definition(system, u), rtol=0, atol=1e-9)
    y, _ = system.recurrence().prefill(u)
    torch.testing.assert_close(y, by_definition(system, u), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SYSTEMS)
def test_precision_of_the_input_is_kept(name, dtype):
    system = make(name).to(dtype=torch.float32)
    u = torch.randn(2, 3, 100, dtype=torch.float64)
    expected = by_definition(system.to(dtype=torch.float64), u)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    u = u.to(dtype)
    recurrence = system.recurrence()
    state = recurrence.initial_state((2, 3))
    chunk, state = recurrence.prefill(u[..., :60], state)
    outputs = [chunk]
    for t in range(60, 100):
        y, state = recurrence.step(u[..., t], state)
        outputs.append(y.unsqueeze(-1))
    for actual in (system(u), torch.cat(outputs, -1)):
        assert actual.dtype == dtype
        assert (actual.double() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("name", SYSTEMS)
def test_hankel_singular_values(name):
    system = make(name, (2,), radius=0.9)
    length, at = 41, 13
    expected = torch.linalg.svdvals(system.matrix(length)[..., at:, :at])
    actual = system.hankel_singular_values(length, at)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * float(expected.max()))

    horizon = 601
    dense = torch.linalg.svdvals(system.matrix(horizon)[..., horizon // 2 :, : horizon // 2])
    values = system.hankel_singular_values()
    count = min(values.shape[-1], dense.shape[-1])
    difference = values[..., :count] - dense[..., :count]
    assert float(difference.abs().max()) < 1e-10 * float(dense.max())
    for bad in (0, 41):
        with pytest.raises(ValueError, match="must lie in 1"):
            system.hankel_singular_values(41, bad)


@pytest.mark.parametrize("convert", [to_state_space, to_modal, to_transfer_function])
def test_a_dplr_system_converts(convert):
    system = make("dplr")
    torch.testing.assert_close(
        convert(system).impulse_response(100), system.impulse_response(100), rtol=0, atol=1e-8
    )


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"D": torch.zeros(3, dtype=torch.complex64)}, TypeError, "real D"),
        ({"p": torch.zeros(3, 3)}, TypeError, "complex"),
        ({"q": torch.zeros(3, 2) + 0j}, ValueError, "modes"),
        ({"B": None}, TypeError, "B of a DPLR"),
    ],
)
def test_dplr_names_what_it_takes(fields, error, match):
    made = make("dplr")
    given = {name: getattr(made, name) for name in ("poles", "B", "C", "p", "q", "D")}
    with pytest.raises(error, match=match) as caught:
        DPLR(**{**given, **fields})
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="dplr"):
        made.recurrence("modal")
    with pytest.raises(TypeError, match="DPLRState"):
        made(torch.zeros(3, 4), make("modal").recurrence().initial_state((3,)))


def test_infinite_horizon_needs_stability():
    modal = Modal(torch.full((1, 1), 1.0 + 0j), torch.ones(1, 1) + 0j, torch.zeros(1))
    transfer = TransferFunction(torch.ones(1, 1), torch.tensor([[-1.0]]), torch.zeros(1))
    for system in (modal, transfer):
        with pytest.raises(ValueError, match="inside the unit circle"):
            system.hankel_singular_values()
        assert system.hankel_singular_values(9, 4).shape == (1, 4)


@pytest.mark.parametrize("name", SYSTEMS)
def test_pytree_and_indexing(name):
    system = make(name)
    leaves, spec = pytree.tree_flatten(system)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves if leaf is not None)
    again = pytree.tree_unflatten(leaves, spec)
    assert type(again) is type(system)
    assert torch.equal(again.impulse_response(20), system.impulse_response(20))
    part = system[1:]
    assert part.channel_shape == (2,)
    torch.testing.assert_close(part.impulse_response(20), system.impulse_response(20)[1:])
    assert system.reshape_channels(3, 1).channel_shape == (3, 1)
    assert system.to(torch.float32).dtype == system.to(dtype=torch.float32).dtype == torch.float32
    with pytest.raises(AttributeError):
        system.order = 3
    with pytest.raises(IndexError, match=r"\.\.\."):
        system[..., 0]
    copy.deepcopy(system)


@pytest.mark.parametrize("name", SYSTEMS)
def test_states_can_be_selected_repeated_and_moved(name):
    system = make(name)
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
    single = pytree.tree_leaves(state.to(dtype=torch.float32))
    assert all(x.dtype == torch.float32 for x in single if x.ndim)

    kept = state.clone()
    recurrence.step(u[..., 0], state)
    _, expected = recurrence.prefill(u)
    torch.testing.assert_close(tuple(kept), tuple(expected))


@pytest.mark.parametrize("name", SYSTEMS)
def test_gradients_flow_through_output_and_state(name):
    system = make(name, (2,), 4)
    leaves, spec = pytree.tree_flatten(system)
    inputs = [x.detach().requires_grad_() for x in leaves if x is not None]
    u = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    if name == "truncated":  # the taps are a function of the coefficients: fields do not vary alone
        b, a, d = inputs[:3]

        def build(b, a, d):
            return TransferFunction.from_truncated(b, a, d, 12)

        inputs = [b, a, d]
    else:

        def build(*values):
            return pytree.tree_unflatten([*values, *leaves[len(values) :]], spec)

    def run(u, *values):
        system = build(*values)
        state = make_state(system)
        y, state = system(u[..., :4], state)
        z, state = system(u[..., 4:], state)
        return y, z, *(x for x in pytree.tree_leaves(state) if x.ndim)

    def make_state(system):
        return system.recurrence("companion" if "tr" in name else None).initial_state((2,))

    assert torch.autograd.gradcheck(run, (u, *inputs), fast_mode=True)


@pytest.mark.parametrize("name", ["modal", "transfer_function"])
def test_against_scipy(name):
    system = make(name)
    if name == "modal":
        pairs = [np.r_[p, p.conj()] for p in system.poles.numpy()]
        halves = [np.r_[r, r.conj()] / 2 for r in system.residues.numpy()]
        parts = [
            scipy.signal.invresz(r, p, [], tol=1e-9) for r, p in zip(halves, pairs, strict=True)
        ]
        b = np.stack([np.r_[0, np.real(x[0])] for x in parts])  # one delay: h_t = Σ r p^(t-1)
        a = np.stack([np.real(x[1]) for x in parts])
        b[:, : a.shape[1]] += system.d.numpy()[:, None] * a
    else:
        b, a = system.to_scipy()
    u = torch.randn(3, 500, dtype=torch.float64)
    expected = np.stack([scipy.signal.lfilter(b[c], a[c], u[c].numpy()) for c in range(3)])
    np.testing.assert_allclose(system(u), expected, rtol=0, atol=1e-8 * np.abs(expected).max())


@pytest.mark.parametrize(("order", "edge"), [(4, 0.1), (4, 0.01), (6, 0.05), (8, 0.1)])
def test_poles_that_crowd_near_the_circle(order, edge):
    b, a = scipy.signal.butter(order, edge)
    system = TransferFunction.from_scipy(b, a)
    u = torch.randn(2000, dtype=torch.float64)
    expected = torch.from_numpy(scipy.signal.lfilter(b, a, u.numpy()))
    recurrence = system.recurrence()
    chunk, state = recurrence.prefill(u[:1500])
    rest, _ = system(u[1500:], state)
    for y in (system(u), torch.cat([chunk, rest])):
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_from_scipy_and_back():
    rng = np.random.default_rng(0)
    for order in (1, 2, 5):
        b, a = scipy.signal.butter(order, 0.3)
        b, a = b * rng.uniform(1, 3), a * rng.uniform(1, 3)
        system = TransferFunction.from_scipy(b, a)
        u = rng.standard_normal(200)
        y = system(torch.from_numpy(u))
        np.testing.assert_allclose(y, scipy.signal.lfilter(b, a, u), rtol=0, atol=1e-12)
        num, den = system.to_scipy()
        np.testing.assert_allclose(num, b / a[0], atol=1e-15)
        np.testing.assert_allclose(den, a / a[0], atol=1e-15)
    short = TransferFunction.from_scipy([1.0], [1.0, -0.5])  # fewer numerator coefficients
    np.testing.assert_allclose(short.impulse_response(4), [1, 0.5, 0.25, 0.125])
    with pytest.raises(ValueError, match=r"a\[0\]"):
        TransferFunction.from_scipy([1.0], [0.0, 1.0])


def test_exact_numerator_continues_the_truncated_kernel():
    """The recurrence of a truncated parametrisation computes its convolution, and goes on."""
    system = make("truncated")
    grid = 1000
    exact = TransferFunction(system.b, system.a, system.d)
    kernel = system.impulse_response(grid)
    torch.testing.assert_close(exact.impulse_response(grid), kernel, rtol=0, atol=1e-10)
    assert system.recurrence().form == "companion"
    assert system.recurrence("companion").error < 1e-10


def test_unstable_kernel_falls_back_to_the_exact_form():
    a = torch.from_numpy(np.poly(np.r_[[1.3] * 4, [-1.3] * 4, [1.1j, -1.1j]]).real[1:])[None]
    system = TransferFunction.from_truncated(torch.randn(1, 10).double(), a, torch.zeros(1), 512)
    recurrence = system.recurrence()
    assert recurrence.form == "online"
    assert not system.recurrence("companion").error <= 1e-5
    u = torch.randn(1, 512, dtype=torch.float64)
    y, state = recurrence.prefill(u[:, :100])
    z, _ = system(u[:, 100:], state)
    torch.testing.assert_close(torch.cat([y, z], -1), system(u))


def test_orders():
    poles = torch.tensor([[0.5 + 0.1j, -0.3 + 0j, 0.2 + 0.2j], [0.9 + 0j, 0.8 + 0j, 0j]])
    residues = torch.tensor([[1.0 + 1j, 1.0, 0.0], [1.0, 1.0, 0.0]]).to(torch.complex64)
    system = Modal(poles, residues, torch.zeros(2))
    assert system.orders.tolist() == [3, 2]
    assert system.order == 3
    torch.testing.assert_close(system.spectral_radius(), torch.tensor([0.26**0.5, 0.9]))
    assert make("transfer_function").order == 6
    assert make("fir").order == 39
    assert make("state_space").order == 6


@pytest.mark.parametrize("name", ["state_space", "transfer_function"])
def test_spectral_radius_is_that_of_the_poles(name):
    system = make(name, (2, 3), radius=0.8)
    A = system.state_space().A
    expected = np.abs(np.linalg.eigvals(A.numpy())).max(-1)
    np.testing.assert_allclose(system.spectral_radius(), expected, rtol=1e-9)
    assert system.poles().shape == (2, 3, 6)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: FIR(torch.zeros(3, 0)), ValueError, "at least one tap"),
        (lambda: FIR(torch.zeros(3, dtype=torch.int64)), TypeError, "floating point"),
        (lambda: FIR([1.0]), TypeError, "tensor"),
        (lambda: Modal(torch.zeros(2), torch.zeros(2), torch.zeros(())), TypeError, "complex"),
        (
            lambda: Modal(torch.zeros(2, 3) + 0j, torch.zeros(2, 2) + 0j, torch.zeros(2)),
            ValueError,
            "modes",
        ),
        (
            lambda: TransferFunction(torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(2)),
            ValueError,
            "channels",
        ),
        (
            lambda: StateSpace(torch.eye(2), torch.ones(2), torch.ones(3), torch.ones(())),
            ValueError,
            "n, n",
        ),
        (
            lambda: StateSpace(*make("modal", (), 2)._fields()[:1] * 3, torch.ones(())),
            TypeError,
            "real floating point",
        ),
        (lambda: make("state_space").recurrence("modal"), ValueError, "state_space"),
        (lambda: StateSpace.from_scipy(1.0, [[1, 2]], 1.0, 0.0), ValueError, "one input"),
        (lambda: make("fir")(torch.zeros(2, 9)), ValueError, "broadcast"),
        (lambda: make("modal")(torch.zeros(3, 9, dtype=torch.int64)), TypeError, "floating"),
        (lambda: make("fir").recurrence("modal"), ValueError, "online"),
        (lambda: make("modal").recurrence("online"), ValueError, "modal"),
        (lambda: make("transfer_function").recurrence("online"), ValueError, "taps"),
        (lambda: make("transfer_function").recurrence("lattice"), ValueError, "companion"),
        (
            lambda: TransferFunction.from_truncated(
                torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(1), 4
            ),
            ValueError,
            "grid",
        ),
        (
            lambda: make("modal")(torch.zeros(3, 4), make("fir").recurrence().initial_state((3,))),
            TypeError,
            "ModalState",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, error, match):
    with pytest.raises(error, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
