"""One suite over every recurrence: the pure step, the block form, and states that do not belong."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from functools import cache
from pathlib import Path
from unittest import mock

import mpmath
import numpy as np
import pytest
import scipy.signal
import torch
import torch.utils._pytree as pytree
from torch.testing import assert_close

from gramian import Modal, StateSpace, TransferFunction
from gramian.filters import RTF, build
from gramian.systems import (
    FIR,
    LatticeRecurrence,
    ModalState,
    Recurrence,
    State,
    StateSpaceState,
    System,
    TimeVaryingState,
    define_state,
)
from gramian.systems.blocks import MatrixBlocks
from tests.systems.test_systems import make
from tests.systems.test_time_varying import make as make_finite

CHANNELS = 3
LENGTH = 200


def grouped() -> Modal:
    counts = (1, 40, 2)
    kept = torch.arange(40) < torch.tensor(counts)[:, None]
    system = make("modal", (CHANNELS,), 40, radius=0.9)
    return Modal(system.poles, system.residues * kept, system.d, counts=counts)


def real_modes(counts: tuple[int, ...] | None = None) -> Modal:
    """Return decaying exponentials, a number of the state for each."""
    modes = max(counts or (4,))
    poles = 0.99 * torch.rand(CHANNELS, modes, dtype=torch.float64)
    residues, d = torch.randn_like(poles), torch.randn(CHANNELS, dtype=torch.float64)
    if counts:
        residues = residues * (torch.arange(modes) < torch.tensor(counts)[:, None])
    return Modal(poles + 0j, residues + 0j, d, counts=counts, real=True)


def schur() -> TransferFunction:
    config = {"type": "rtf", "state_size": 6, "stability": "schur", "initialization": "schur"}
    return build(config, channels=CHANNELS, max_length=LENGTH)()


def gains() -> TransferFunction:
    """Return a system without a state."""
    nothing = torch.zeros(CHANNELS, 0, dtype=torch.float64)
    return TransferFunction(nothing, nothing, torch.randn(CHANNELS, dtype=torch.float64))


SYSTEMS = {
    "modal": lambda: make("modal"),
    "modal_groups": grouped,
    "state_space": lambda: make("state_space"),
    "dplr": lambda: make("dplr"),
    "transfer_function": lambda: make("transfer_function"),
    "no_order": gains,
    "truncated": lambda: make("truncated"),
    "lattice": schur,
    "modal_real": real_modes,
    "modal_real_groups": lambda: real_modes((1, 40, 2)),
    "window": lambda: make("fir"),
    "window_one_tap": lambda: FIR(torch.randn(CHANNELS, 1, dtype=torch.float64)),
    "online": lambda: FIR(torch.randn(CHANNELS, 70, dtype=torch.float64)),
    **{
        name: lambda name=name: make_finite(name, LENGTH) for name in ("diagonal", "delta", "dense")
    },
    "operator": lambda: make_finite("operator", LENGTH),
}
"""A system of three channels for every recurrence."""

FORMS = {"lattice": "lattice", "window": "window", "window_one_tap": "window", "online": "online"}
"""The forms of the recurrences that have several."""

BLOCKED = [
    "modal",
    "modal_groups",
    "modal_real",
    "modal_real_groups",
    "state_space",
    "dplr",
    "transfer_function",
    "lattice",
    "window",
    "window_one_tap",
]


def recurrence_of(name: str) -> Recurrence:
    torch.manual_seed(0)
    system = SYSTEMS[name]()
    return system.recurrence(FORMS.get(name))


def warm(recurrence: Recurrence, steps: int = 70) -> State:
    """Return the state after some samples of two streams."""
    return recurrence.prefill(torch.randn(2, CHANNELS, steps, dtype=torch.float64))[1]


def leaves(state: State) -> list[torch.Tensor]:
    return [tensor for tensor in pytree.tree_leaves(state) if tensor.ndim]


@pytest.mark.parametrize("name", SYSTEMS)
def test_advance_is_the_step_and_writes_into_nothing(name: str) -> None:
    recurrence = recurrence_of(name)
    pure = warm(recurrence)
    stepped = pure.clone()
    for _ in range(70):  # past the window of an online convolution
        sample = torch.randn(2, CHANNELS, dtype=torch.float64)
        before = pure.clone()
        expected, stepped = recurrence.step(sample, stepped)
        y, after = recurrence.advance(sample, pure)
        assert_close(y, expected)
        assert_close(tuple(pure), tuple(before), rtol=0, atol=0)
        assert_close(tuple(after), tuple(stepped))
        assert type(after) is type(stepped) is recurrence.state_type
        pure = after


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name not in ("online", "operator")])
def test_gradients_flow_through_advance(name: str) -> None:
    recurrence = recurrence_of(name)
    state = warm(recurrence).map(lambda tensor: tensor.double().requires_grad_())
    sample = torch.randn(2, CHANNELS, dtype=torch.float64, requires_grad=True)
    y, after = recurrence.advance(sample, state)
    total = y.sum() + sum(tensor.sum() for tensor in leaves(after))
    inputs = [sample, *(tensor for tensor in leaves(state) if tensor.numel())]
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(total, inputs))


@pytest.mark.parametrize("name", ["modal_groups", "dplr", "transfer_function", "state_space"])
def test_advance_is_traced_into_a_program_without_writes(name: str) -> None:
    recurrence = recurrence_of(name)

    class Program(torch.nn.Module):
        def forward(self, u, state):
            return recurrence.advance(u, state)

    state, sample = warm(recurrence), torch.randn(2, CHANNELS, dtype=torch.float64)
    with torch.no_grad():
        program = torch.export.export(Program(), (sample, state), strict=False)
        y, after = program.module()(sample, state)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls and not any(re.match(r"aten\.\w*[a-z]_\.", call) for call in calls)
    expected, stepped = recurrence.step(sample, state.clone())
    assert_close(y, expected)
    assert_close(tuple(after), tuple(stepped))


@cache
def warm_states() -> list[State]:
    """Return a state of every system, for tests that hand them to others."""
    return [warm(recurrence_of(name)) for name in SYSTEMS]


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_state_of_another_kind_gets_a_sentence(name: str) -> None:
    recurrence, system = recurrence_of(name), SYSTEMS[name]()
    states = [state for state in warm_states() if type(state) is not recurrence.state_type]
    sample = torch.randn(2, CHANNELS, dtype=torch.float64)
    for wrong in [*states, None, torch.zeros(2, CHANNELS, 6), (torch.zeros(2, CHANNELS, 6),)]:
        found = type(wrong).__name__
        calls = [lambda w=wrong: recurrence.step(sample, w)]
        calls.append(lambda w=wrong: recurrence.advance(sample, w))
        if wrong is not None:
            calls.append(lambda w=wrong: recurrence.prefill(sample[..., None], w))
            if not isinstance(wrong, system._state_types):  # some continue from several kinds
                calls.append(lambda w=wrong: system(sample[..., None], w))
        for call in calls:
            with pytest.raises(TypeError, match=f"{recurrence.state_type.__name__}.*{found}") as e:
                call()
            assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_state_of_other_shapes_gets_a_sentence(name: str) -> None:
    recurrence, system = recurrence_of(name), SYSTEMS[name]()
    state = warm(recurrence)
    sample = torch.randn(2, CHANNELS, dtype=torch.float64)
    modes = -2 if "modal" in name else -1  # the last dimension is that of the channels there
    wrong = [
        state.map(lambda t: torch.cat([t, t[:1]])),  # three streams, not two
        state.map(lambda t: t.repeat_interleave(2, dim=modes)),
        state.map(lambda t: t.sum(tuple(range(1, t.ndim)))),
    ]
    if name in ("no_order", "window_one_tap"):  # nothing to repeat
        del wrong[1]
    for one in wrong:
        for call in (
            lambda s=one: recurrence.step(sample, s),
            lambda s=one: recurrence.advance(sample, s),
            lambda s=one: recurrence.prefill(sample[..., None], s),
            lambda s=one: system(sample[..., None], s),
        ):
            with pytest.raises(ValueError, match=r"shape \(2, 3\) need a state as initial") as e:
                call()
            assert "\n" not in str(e.value)


@pytest.mark.parametrize("size", [2, 32])
@pytest.mark.parametrize("name", BLOCKED)
def test_block_form_is_the_recurrence(name: str, size: int) -> None:
    recurrence = recurrence_of(name)
    form = recurrence.block_form(size)
    state = warm(recurrence)
    u = torch.randn(2, CHANNELS, size, dtype=leaves(state)[0].dtype)
    outputs, ends = [], []
    for part, x in zip(form.parts, form.pack(state), strict=True):
        samples = part.select(u).unsqueeze(-1)  # (batch, G, c, 1)
        if part.is_static:  # its state is empty, in a shape of its own
            outputs.append((part.inside @ samples).squeeze(-1))
            ends.append(x)
            continue
        outputs.append((part.inside @ samples + part.observe @ x).squeeze(-1))
        ends.append(part.advance(x) + part.reach @ samples)
    y, end = form.restore_order(outputs), form.unpack(ends, state)
    for sample, actual in zip(u.unbind(-1), y.unbind(-1), strict=True):
        expected, state = recurrence.step(sample, state)
        assert_close(actual, expected, rtol=0, atol=1e-5 if y.dtype == torch.float32 else 1e-10)
    assert_close(tuple(end), tuple(state))

    silent = form.unpack(form.pack(end), end)
    for before, after in zip(leaves(end), leaves(silent), strict=True):
        assert torch.equal(before, after)
    alone = warm(recurrence)
    packed = zip(form.parts, form.pack(alone), strict=True)
    rest = torch.tensor([size - 1, size // 2])  # of each sequence
    moved = form.unpack(
        [x if part.is_static else part.advance_by(x, rest) for part, x in packed], alone
    )
    for steps in range(1, size):
        _, alone = recurrence.step(torch.zeros_like(u[..., 0]), alone)
        for row in (rest == steps).nonzero():
            assert_close(tuple(moved.select(row)), tuple(alone.select(row)))


@pytest.mark.parametrize("name", ["online", "diagonal", "operator"])
def test_no_block_form_without_a_constant_state_matrix(name: str) -> None:
    with pytest.raises(ValueError, match=r"no constant state matrix, so it has no block form\.$"):
        recurrence_of(name).block_form(32)


def test_powers_of_crowding_companions_are_right() -> None:
    """A power of the companion matrix of a narrow filter, against 60 digits."""
    b, a = scipy.signal.cheby1(10, 0.1, 0.01)
    with pytest.warns(UserWarning, match="do not hold these poles"):
        system = TransferFunction.from_scipy(b, a).state_space()
    blocks = MatrixBlocks.from_matrices(system.A, system.B, system.C, system.D, 32, torch.float64)
    with mpmath.workdps(60):
        power = mpmath.matrix(system.A.tolist()) ** 32
        exact = torch.tensor(np.array(power.tolist(), dtype=float))
    squared = torch.linalg.matrix_power(system.A, 32)

    def error(found: torch.Tensor) -> float:
        return float(torch.linalg.matrix_norm(found - exact) / torch.linalg.matrix_norm(exact))

    assert error(blocks.whole[0]) < 1e-3 * error(squared)


def test_counts_are_kept_by_reshaping() -> None:
    system = grouped()
    pair = Modal(
        *(torch.cat([field, field]) for field in (system.poles, system.residues, system.d)),
        counts=(*system.counts, 3, 40, 2),
    )
    assert pair.reshape_channels(6, 1).counts == pair.counts
    assert pair.reshape_channels(2, 3).counts == (40, 40)
    assert pair.reshape_channels(3, 2).counts == (40, 3, 40)
    assert pair.reshape_channels(3, 2).reshape_channels(-1).counts == (40, 40, 3, 3, 40, 40)
    assert pair[:0].reshape_channels(0, 2).counts is None
    assert pair[0].reshape_channels().counts is None
    u = torch.randn(2, 3, 9, dtype=torch.float64)
    assert_close(pair.reshape_channels(2, 3)(u), pair(u.reshape(6, 9)).reshape(2, 3, 9))
    assert pickle.loads(pickle.dumps(pair)).counts == copy.deepcopy(pair).counts == pair.counts


def test_a_truncated_numerator_is_read_off_when_it_is_needed(monkeypatch) -> None:
    from gramian.systems import transfer_function

    calls = []
    read = transfer_function.exact_numerator
    monkeypatch.setattr(
        transfer_function, "exact_numerator", lambda a, taps: calls.append(1) or read(a, taps)
    )
    system = make("truncated")
    u = torch.randn(2, CHANNELS, 50, dtype=torch.float64)
    system[1:].reshape_channels(2, 1).detach().impulse_response(9), system(u)
    assert not calls
    plain = TransferFunction(system.b, system.a, system.d)
    assert len(calls) == 1 and system.b is system.b and len(calls) == 1
    assert_close(plain.impulse_response(50), system.impulse_response(50))
    assert pickle.loads(pickle.dumps(system)).b.equal(system.b)
    changed = dataclasses.replace(system, d=system.d + 1)
    assert changed.b is system.b and type(changed) is type(system)


@pytest.mark.filterwarnings("ignore:in float32 the impulse response")
def test_a_truncated_numerator_is_read_off_before_the_taps_are_rounded() -> None:
    system = make("truncated")
    rounded = system[:].to(torch.float32)
    assert torch.equal(rounded.b, system.b.float())


def test_define_state_makes_a_named_tuple() -> None:
    @define_state
    class Pair(State):
        """Two tensors."""

        first: torch.Tensor
        inner: ModalState

        def total(self) -> torch.Tensor:
            return self.first.sum()

    one = Pair(torch.ones(2, 3), inner=ModalState((torch.zeros(2, 1),)))
    first, inner = one
    assert first is one.first and inner is one.inner and one._fields == ("first", "inner")
    assert one.total() == 6 and Pair.__doc__ == "Two tensors." and Pair.__name__ == "Pair"
    doubled = one.repeat(2)
    assert type(doubled) is Pair and doubled.inner.modes[0].shape == (4, 1)
    flat, spec = pytree.tree_flatten(one)
    assert type(pytree.tree_unflatten(flat, spec)) is Pair
    with pytest.raises(AttributeError):
        one.first = first
    with pytest.raises(TypeError, match=r"the state Empty has no annotated field\."):

        @define_state
        class Empty(State):
            pass


def test_states_are_pickled() -> None:
    for state in (
        StateSpaceState(torch.ones(1, 2)),
        TimeVaryingState(torch.ones(1), torch.tensor(3)),
    ):
        again = pickle.loads(pickle.dumps(state))
        assert type(again) is type(state)
        assert_close(tuple(again), tuple(state))


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_saved_state_continues_as_the_state_does(name: str, tmp_path: Path) -> None:
    recurrence = recurrence_of(name)
    state = warm(recurrence)
    state.save(tmp_path / "state.pt")
    read = type(state).load(tmp_path / "state.pt")
    plain = torch.load(tmp_path / "state.pt", weights_only=True)
    u = torch.randn(2, CHANNELS, dtype=torch.float64)
    expected = recurrence.advance(u, state)[0]
    for again in (read, plain):
        assert type(again) is type(state)
        assert torch.equal(recurrence.advance(u, again)[0], expected)


def test_a_file_without_the_state_gets_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    state = StateSpaceState(torch.ones(4, 2)[:1])
    state.save(path)
    assert torch.load(path, weights_only=True)[0].untyped_storage().nbytes() == 8
    assert State.load(path, "meta")[0].is_meta
    with pytest.raises(ValueError, match="of type StateSpaceState; a ModalState is needed"):
        ModalState.load(path)
    torch.save([Modal], path)
    with pytest.raises(
        ValueError, match="cannot be read as a state: it is damaged, or holds a class"
    ):
        State.load(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read as a state"):
        State.load(path)
    with pytest.raises(FileNotFoundError):
        State.load(tmp_path / "absent")


@pytest.mark.parametrize("name", ["modal", "dplr", "window", "online", "transfer_function"])
def test_every_system_has_a_state_space(name: str) -> None:
    torch.manual_seed(0)
    system: System = SYSTEMS[name]()
    dense = system.state_space()
    assert isinstance(dense, StateSpace) and dense.dtype == torch.float64
    assert_close(dense.impulse_response(60), system.impulse_response(60))


@pytest.mark.pairs
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 40])
@pytest.mark.parametrize("kind", ["modal", "real modal", "window"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_chunks_of_few_samples_are_those_samples_one_by_one(
    kind: str, length: int, interleaved: bool
) -> None:
    """A chunk of few samples is computed in another way than a long one."""
    draw = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    if kind == "window":
        system: FIR | Modal = FIR(normal(5, 9))
    else:
        imaginary = torch.zeros(5, 3) if kind == "real modal" else 0.4 * normal(5, 3)
        poles = torch.complex(0.3 * normal(5, 3), imaginary.double())
        residues = torch.complex(normal(5, 3), (imaginary * 2).double())
        system = Modal(poles, residues, normal(5), real=kind == "real modal")
    recurrence = system.recurrence()
    u = normal(2, length, 5).mT if interleaved else normal(2, 5, length)
    _, state = recurrence.prefill(normal(2, 5, 30))
    y, after = recurrence.prefill(u, state.clone())
    for t in range(length):
        y_t, state = recurrence.step(u[..., t], state)
        assert_close(y[..., t], y_t)
    for made, expected in zip(pytree.tree_leaves(after), pytree.tree_leaves(state), strict=True):
        assert_close(made, expected)
        assert made.untyped_storage().nbytes() == made.nbytes  # and nothing of the chunk


@pytest.mark.parametrize("form", ["window", "online"])
def test_a_chunk_for_all_channels_is_broadcast_as_a_sample_is(form):
    torch.manual_seed(0)
    system = FIR(torch.randn(3, 5, dtype=torch.float64))
    u = torch.randn(2, 1, 23, dtype=torch.float64)
    expected = system(u.expand(2, 3, 23))
    recurrence = system.recurrence(form)
    first, state = recurrence.prefill(u[..., :6])
    steps = []
    for t in range(6, 15):
        y, state = recurrence.step(u[..., t], state)
        steps.append(y)
    last, _ = recurrence.prefill(u[..., 15:], state)
    found = torch.cat([first, torch.stack(steps, dim=-1), last], dim=-1)
    torch.testing.assert_close(found, expected)


@pytest.mark.each
@pytest.mark.parametrize("radius", [0.5, 0.99, 1.01])
@pytest.mark.parametrize("order", [1, 2, 5, 12])
@pytest.mark.parametrize("length", [63, 700])
def test_blocks_measure_the_errors_of_steps(
    monkeypatch: pytest.MonkeyPatch, radius: float, order: int, length: int
) -> None:
    """Blocks never call a recurrence exact that is not, nor change the form that is chosen."""
    rng = np.random.default_rng(order + length)
    half = radius * np.exp(1j * rng.uniform(0, np.pi, (3, order // 2)))
    rest = np.full((3, order % 2), radius)
    a = np.stack([np.poly(row).real[1:] for row in np.concatenate([half, half.conj(), rest], -1)])
    system = TransferFunction.from_truncated(
        torch.from_numpy(rng.standard_normal((3, order))),
        torch.from_numpy(a),
        torch.from_numpy(rng.standard_normal(3)),
        length,
    )
    steps = system.recurrence("companion").error
    monkeypatch.setattr("gramian.systems._recurrence._LONG", 2)
    blocks = system.recurrence("companion").error
    assert (blocks <= 1e-5) == (steps <= 1e-5)
    assert blocks == steps or steps / 4 - 1e-15 < blocks <= 1e-5


@pytest.mark.parametrize("denominators", [1, 2])
def test_blocks_step_lattices_with_shared_reflections(
    monkeypatch: pytest.MonkeyPatch, denominators: int
) -> None:
    filter = RTF(6, 5, 1001, stability="schur", num_denominators=denominators)
    with torch.no_grad():
        filter.theta.normal_()
        filter.b.normal_()
    steps = filter().recurrence("lattice").error
    monkeypatch.setattr("gramian.systems._recurrence._LONG", 2)
    with mock.patch.object(LatticeRecurrence, "_step", autospec=True) as step:
        step.side_effect = LatticeRecurrence._advance
        assert steps / 4 < filter().recurrence("lattice").error < 4 * steps
    assert step.call_count < 100  # not a step a tap
