"""Effective state-size against its definition: a singular value decomposition of every block."""

import math

import numpy as np
import pytest
import torch

import gramian
from gramian import FIR, DenseOperator, Modal, TimeVarying, TransferFunction, effective_state_size
from gramian.ess import dense, hankel_singular_values, recurrent, sketched_state_size
from gramian.ess.measures import Measure
from tests.ess.conftest import (
    SYSTEMS,
    TIME_INVARIANT,
    TIME_VARYING,
    attention,
    entropy_by_definition,
    make,
    spectra,
)


def padded(rows: list[np.ndarray], size: int) -> torch.Tensor:
    full = torch.zeros(len(rows), size, dtype=torch.float64)
    for k, row in enumerate(rows):
        full[k, : min(len(row), size)] = torch.from_numpy(row[:size].copy())
    return full


@pytest.mark.each
@pytest.mark.parametrize("length", [1, 2, 3, 63, 100])
@pytest.mark.parametrize("name", SYSTEMS)
def test_singular_values_are_those_of_the_blocks(name, length):
    system = make(name, length)
    actual = hankel_singular_values(system, length=length, horizon=length)
    assert actual.shape[:2] == (2, length)
    if length == 1:
        assert actual.shape[-1] == 0
        return
    for channel, T in enumerate(system.matrix(length)):
        rows = spectra(T, list(range(length)))
        expected = padded(rows, actual.shape[-1])
        scale = expected.amax(-1, keepdim=True)
        assert bool(((actual[channel] - expected).abs() <= 1e-10 * scale).all())
        dropped = [row[actual.shape[-1] :] for row in rows]
        assert all((d <= 1e-10 * r[0]).all() for d, r in zip(dropped, rows, strict=True) if d.size)


@pytest.mark.each
@pytest.mark.parametrize("length", [1, 2, 3, 63, 100])
@pytest.mark.parametrize("name", SYSTEMS)
def test_entropy_is_that_of_the_definition(name, length):
    system = make(name, length)
    actual = effective_state_size(system, length=length, horizon=length)
    assert actual.shape == (2, length) and actual.dtype == torch.float64
    for channel, T in enumerate(system.matrix(length)):
        expected = entropy_by_definition(T, list(range(length)))
        np.testing.assert_allclose(actual[channel], expected, rtol=1e-6, atol=1e-9)
    assert bool((actual[:, 0] == 0).all())


@pytest.mark.each
@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize(("tol", "rtol"), [(0.3, None), (None, 1e-3), (0.01, 0.1), (0.0, None)])
def test_tolerance_counts_singular_values(name, tol, rtol):
    length = 40
    system = make(name, length)
    actual = effective_state_size(
        system, measure="tolerance", tol=tol, rtol=rtol, length=length, horizon=length
    )
    values = hankel_singular_values(system, length=length, horizon=length)
    threshold = torch.full_like(values[..., :1], tol or 0)
    if rtol is not None:
        threshold = torch.maximum(threshold, rtol * values[..., :1])
    expected = (values > threshold).sum(-1).double()
    expected[:, 0] = 0
    if tol == 0:  # what counts as zero is rounding's choice: no more than the block has rows and
        cap = torch.tensor([min(i, length - i) for i in range(length)])  # columns, and no less
        clear = (values > 1e-10 * values[..., :1]).sum(-1)  # than what rounding cannot make
        assert bool((actual <= cap).all()) and bool((actual >= clear)[:, 1:].all())
        assert bool((actual[:, 1:] >= 1).all()) and bool((actual[:, 0] == 0).all())
    else:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", SYSTEMS)
def test_positions_in_any_order_and_number(name):
    length = 50
    system = make(name, length, (2, 1))
    whole = effective_state_size(system, length=length, horizon=length)
    some = [49, 3, 3, 0, 25, 26]
    torch.testing.assert_close(
        effective_state_size(system, some, horizon=length), whole[..., some], rtol=1e-9, atol=1e-9
    )
    one = effective_state_size(system, 7, horizon=length)
    torch.testing.assert_close(one, whole[..., 7], rtol=1e-9, atol=0)
    assert effective_state_size(system, torch.tensor([5]), horizon=length).shape == (2, 1, 1)
    assert effective_state_size(system, [], horizon=length).shape == (2, 1, 0)
    assert effective_state_size(system, range(0, 50, 9), horizon=length).shape == (2, 1, 6)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_horizon_cuts_and_reads_on(name):
    system = make(name, 60)
    T = system.matrix(60)
    for horizon in (60, 31):
        actual = effective_state_size(system, range(25), horizon=horizon)
        for channel in range(2):
            expected = entropy_by_definition(T[channel, :horizon, :horizon], list(range(25)))
            np.testing.assert_allclose(actual[channel], expected, rtol=1e-6)
    if name in TIME_INVARIANT:  # twice what is reported by default
        torch.testing.assert_close(
            effective_state_size(system, length=30),
            effective_state_size(system, range(30), horizon=60),
        )


@pytest.mark.parametrize("name", SYSTEMS)
def test_no_curve_exceeds_its_cap(name):
    length = 30
    system = make(name, length, order=20)
    cap = torch.tensor([min(i, length - i) for i in range(length)])
    for measure in ({}, {"measure": "tolerance", "rtol": 1e-9}):
        sizes = effective_state_size(system, length=length, horizon=length, **measure)
        assert bool((sizes <= cap * (1 + 1e-12)).all())
        if name == "operator" and measure:  # attention fills it
            assert bool((sizes == cap).all())


def test_rank_of_a_recurrence_is_found_exactly():
    """Blocks of rank 3 among rounding errors: nothing of these is counted."""
    system = make("low_rank_operator", 120)
    for source in (system, system.to(torch.float32)):
        counted = effective_state_size(source, 60, measure="tolerance", rtol=1e-5)
        assert counted.tolist() == [3, 3]
    few = make("diagonal", 120, order=3)
    torch.testing.assert_close(
        effective_state_size(DenseOperator(few.matrix())),
        effective_state_size(few),
        rtol=1e-6,
        atol=1e-9,
    )


@pytest.mark.each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*TIME_VARYING, "modal", "fir"])
def test_other_precisions_are_decided_in_float64(name, dtype):
    system = make(name, 40).to(dtype if name != "modal" else torch.float32)
    actual = effective_state_size(system, length=40)
    assert actual.dtype == torch.float32
    expected = effective_state_size(system.to(torch.float64), length=40)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


def test_silent_blocks_have_no_state():
    T = attention(length=40)
    T[20:, :20] = 0  # forgets everything at 20
    sizes = effective_state_size(T)
    assert sizes[20] == 0 and sizes[19] >= 1 and sizes[21] >= 1
    T[20:, :20] = 1e-18 * torch.rand(20, 20)
    for measure in ({}, {"measure": "tolerance", "rtol": 0.1}):
        assert effective_state_size(T, 20, **measure) == 0
    assert effective_state_size(T.float(), 20) == 0
    assert bool((effective_state_size(torch.zeros(2, 9, 9)) == 0).all())
    assert bool((effective_state_size(torch.eye(9)) == 0).all())

    system = make("diagonal", 30)
    A = system.A.clone()
    A[:, 11] = 0
    B = system.B.clone()
    B[:, 11] = 0
    forgets = TimeVarying(A, B, system.C, system.D)
    sizes = effective_state_size(forgets)
    assert bool((sizes[:, 12] == 0).all()) and bool((sizes[:, [11, 13]] > 0.5).all())
    silent = Modal(torch.zeros(1, 2) + 0j, torch.zeros(1, 2) + 0j, torch.ones(1))
    assert bool((effective_state_size(silent, length=5) == 0).all())
    assert bool((effective_state_size(FIR(torch.ones(1, 1)), length=5) == 0).all())


@pytest.mark.parametrize("name", SYSTEMS)
def test_no_channels_and_no_state(name):
    if name != "dplr":
        nothing = make(name, 12)[:0]
        assert effective_state_size(nothing, length=12).shape == (0, 12)
        assert hankel_singular_values(nothing, length=12).shape[:2] == (0, 12)
    none = TimeVarying(*torch.zeros(3, 2, 5, 0), torch.ones(2, 5))
    assert bool((effective_state_size(none) == 0).all())


@pytest.mark.parametrize("name", SYSTEMS)
def test_not_finite_values_name_their_channel(name):
    system = make(name, 12, (2, 3))
    first = system._fields()[0].clone()
    place = (5, 3) if "operator" in name else (0,) * (first.ndim - 2)
    first[(1, 2, *place)] = math.nan
    spoiled = system._from_fields([first, *system._fields()[1:]])
    for call in (effective_state_size, hankel_singular_values):
        with pytest.raises(ValueError, match=r"channel \(1, 2\) has NaN or infinite") as caught:
            call(spoiled, length=12)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="channel 1 has NaN"):
        effective_state_size(spoiled[:, 2], length=12)


def test_entries_above_the_diagonal_are_not_read():
    T = attention(length=20)
    filled = T + torch.ones_like(T).triu(1)
    filled[0, 5] = math.nan
    torch.testing.assert_close(effective_state_size(filled), effective_state_size(T))


@pytest.mark.parametrize("name", SYSTEMS)
def test_gradients(name):
    system = make(name, 9, (2,), 4)
    fields = [f.detach().clone().requires_grad_() for f in system._fields() if f is not None]
    nothing = [None] * (len(system._fields()) - len(fields))

    def size(*values):
        return effective_state_size(system._from_fields([*values, *nothing]), [1, 4, 7], horizon=9)

    torch.testing.assert_close(
        size(*fields), effective_state_size(system, [1, 4, 7], horizon=9), rtol=1e-6, atol=0
    )
    assert torch.autograd.gradcheck(size, fields, fast_mode=True)
    with pytest.raises(ValueError, match="no gradient"):
        effective_state_size(
            system._from_fields([*fields, *nothing]), 3, measure="tolerance", tol=0.1
        )


def test_gradients_stay_finite_without_full_rank():
    low = make("low_rank_operator", 20).entries.requires_grad_()
    effective_state_size(low).sum().backward()
    assert bool(low.grad.isfinite().all()) and float(low.grad.norm()) > 0
    zero = torch.zeros(6, 6, requires_grad=True)
    effective_state_size(zero).sum().backward()
    assert bool((zero.grad == 0).all())


def test_long_chains_are_taken_by_stretches(monkeypatch):
    """Memory is bounded by making factors again."""
    names = ["diagonal", "delta", "dense", "modal", "state_space"]
    systems = [make(name, 70, (5,)) for name in names]
    expected = [effective_state_size(s, length=70) for s in systems]
    monkeypatch.setattr(recurrent, "_BUDGET", 1)
    monkeypatch.setattr("gramian.ess._reading._FACTORS", 1)
    for system, sizes in zip(systems, expected, strict=True):
        torch.testing.assert_close(
            effective_state_size(system, length=70), sizes, rtol=1e-9, atol=0
        )


def test_memory_of_a_long_chain_is_bounded(monkeypatch, largest_allocation):
    system = make("diagonal", 300, (1,), 16)
    monkeypatch.setattr(recurrent, "_BUDGET", 2**16)
    with largest_allocation() as most:
        effective_state_size(system)
    assert most.bytes < 2**18 < 300 * 16 * 16 * 8


def test_two_threads_find_the_same(two_threads):
    for name in ("operator", "dense", "fir", "modal"):
        system = make(name, 50)
        for T, sizes in zip(
            system.matrix(50), effective_state_size(system, length=50, horizon=50), strict=True
        ):
            np.testing.assert_allclose(sizes, entropy_by_definition(T, list(range(50))), rtol=1e-6)


def test_a_sensitive_transfer_function_is_measured_by_its_taps():
    """Powers of the companion matrix of crowded poles lose what the impulse response holds."""
    a = torch.from_numpy(np.poly([0.99, 0.985, 0.98, 0.975, 0.97, 0.965])[1:])[None]
    system = TransferFunction(torch.randn(1, 6).double(), a, torch.zeros(1).double())
    sizes = effective_state_size(system, [30, 60], horizon=120)
    expected = entropy_by_definition(system.matrix(120)[0], [30, 60])
    np.testing.assert_allclose(sizes[0], expected, rtol=1e-6)


def test_measures_know_their_spectra():
    flat = torch.ones(3, 8, dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(Measure()(flat, zero), torch.full((3,), 8.0).double())
    assert Measure(tol=1.0)(flat, zero).tolist() == [0, 0, 0]
    assert Measure(tol=0.5, rtol=0.5)(flat, zero).tolist() == [8, 8, 8]
    one = torch.tensor([[5.0, 0, 0]]).double()
    assert Measure()(one, zero[:1]).tolist() == [1.0]
    assert Measure()(one, zero[:1] + 6).tolist() == [0.0]


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_a_sketch_states_its_error(sharpness):
    """Two standard errors, which one estimate in twenty exceeds; none of these by far."""
    T = attention(2, length=150, sharpness=sharpness)
    at = [0, 10, 40, 60, 75, 90, 110, 149]
    exact = effective_state_size(T, at)
    for rank in (8, 16, 24):
        estimate, error = sketched_state_size(T, at, rank)
        assert estimate.shape == error.shape == (2, 8)
        missed = (estimate - exact).abs()
        assert bool((missed <= 2 * error + 2e-3 * exact).all())
        assert float((missed <= error + 1e-3 * exact).double().mean()) >= 0.8
        assert bool((error <= 0.1 * exact).all())
    again, _ = sketched_state_size(T, at, 24)
    assert torch.equal(again, estimate)
    other, _ = sketched_state_size(T, at, 24, seed=1)
    assert not torch.equal(other, estimate)
    more = sketched_state_size(T, at, 24, probes=160)[1]
    assert float(more.sum()) < 0.5 * float(error.sum())


def test_a_sketch_of_what_it_can_hold_is_exact():
    T = attention(2, length=60)
    estimate, error = sketched_state_size(T, rank=30)
    torch.testing.assert_close(estimate, effective_state_size(T), rtol=1e-7, atol=1e-9)
    assert float(error.abs().max()) == 0
    low = make("low_rank_operator", 100)
    estimate, error = sketched_state_size(low, [50], 4)
    torch.testing.assert_close(estimate, effective_state_size(low, [50]), rtol=1e-6, atol=0)
    assert float(error.abs().max()) == 0
    silent = torch.zeros(50, 50)
    assert [float(x.abs().sum()) for x in sketched_state_size(silent, rank=3)] == [0, 0]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda s: effective_state_size([1.0]), TypeError, "a system, or a tensor of lower"),
        (lambda s: effective_state_size(torch.ones(3, 4)), ValueError, "L, L"),
        (lambda s: effective_state_size(s, measure="rank"), ValueError, "entropy"),
        (lambda s: effective_state_size(s, tol=0.1), ValueError, "tol and rtol go with"),
        (lambda s: effective_state_size(s, measure="tolerance"), ValueError, "needs tol"),
        (
            lambda s: effective_state_size(s, measure="tolerance", tol=-1),
            ValueError,
            "tol must be a number",
        ),
        (lambda s: effective_state_size(s, 10), ValueError, "0 … 9; got 10"),
        (lambda s: effective_state_size(s, [-1, 2]), ValueError, "0 … 9; got -1 … 2"),
        (lambda s: effective_state_size(s, [5], horizon=5), ValueError, "0 … 4"),
        (lambda s: effective_state_size(s, horizon=11), ValueError, "at most 10"),
        (lambda s: effective_state_size(s, length=0), ValueError, "at least 1"),
        (lambda s: effective_state_size(s, [3], length=4), ValueError, "not both"),
        (lambda s: effective_state_size(make("modal", 9)), ValueError, "has no end"),
        (lambda s: sketched_state_size(make("modal", 9), 3), TypeError, "DenseOperator"),
        (lambda s: sketched_state_size(torch.ones(3, 3), 1, 0), ValueError, "rank must"),
    ],
)
def test_bad_input_gets_one_sentence(call, error, match):
    with pytest.raises(error, match=match) as caught:
        call(make("diagonal", 10))
    assert "\n" not in str(caught.value)


def test_the_public_names():
    assert gramian.effective_state_size is effective_state_size
    assert {"TimeVarying", "DenseOperator", "realize", "ess"} <= set(gramian.__all__)


def test_blocks_are_decomposed_only_where_gram_matrices_do_not_do(monkeypatch):
    decomposed = []
    exact = dense.singular_values

    def counted(T, at):
        decomposed.append(at)
        return exact(T, at)

    monkeypatch.setattr(dense, "singular_values", counted)
    effective_state_size(attention(length=60))
    assert decomposed == []
    effective_state_size(make("low_rank_operator", 60)[0])
    assert set(decomposed) >= set(range(10, 50)) and len(decomposed) < 60


@pytest.mark.parametrize("scale", [1e153, 1e300, 1e-170, 1e-300])
def test_operators_whose_squares_overflow_or_underflow_are_refused(scale: float) -> None:
    matrix = torch.randn(40, 40, dtype=torch.float64).tril()
    for measure in ({}, {"measure": "tolerance", "rtol": 1e-3}):
        with pytest.raises(ValueError, match="between 1e-140 and 1e\\+140"):
            effective_state_size(scale * matrix, **measure)


@pytest.mark.parametrize("scale", [1e130, 1e-130])
def test_scale_does_not_change_an_entropy(scale: float) -> None:
    matrix = torch.randn(40, 40, dtype=torch.float64).tril()
    expected = effective_state_size(matrix)
    torch.testing.assert_close(effective_state_size(scale * matrix), expected)
