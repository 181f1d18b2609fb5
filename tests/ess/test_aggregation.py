"""State-size that could be used, its share, and averages and totals."""

import pytest
import torch

from gramian import FIR, Modal, StateSpace, TimeVarying, TransferFunction, effective_state_size
from gramian.ess import aggregate, theoretical_state_size, usable_state_size, utilization
from gramian.filters import ModalFilter
from gramian.mixers import Hyena, MultiHyena
from gramian.systems import gated_convolution, to_state_space, to_time_varying
from tests.ess.conftest import SYSTEMS, attention, make


@pytest.mark.parametrize("name", SYSTEMS)
def test_state_in_use_is_at_most_the_state_there_is(name):
    system = make(name, 30)
    ess = effective_state_size(system, length=30)
    tss = theoretical_state_size(system, length=30)
    assert ess.shape == tss.shape == (2, 30)
    assert bool((ess <= tss * (1 + 1e-9)).all())
    share = utilization(ess, tss)
    assert bool((share >= 0).all()) and bool((share <= 1 + 1e-9).all())


def test_what_could_be_used():
    assert theoretical_state_size(attention(length=5)).tolist() == [0, 1, 2, 3, 4]
    assert theoretical_state_size(FIR(torch.ones(3)), length=5).tolist() == [0, 1, 2, 2, 2]
    assert theoretical_state_size(make("dense", 5), [0, 4]).tolist() == [[6, 6], [6, 6]]
    poles = torch.tensor([[0.5 + 0.1j, 0.3 + 0j], [0.9 + 0j, 0j]])
    modal = Modal(poles, torch.tensor([[1.0, 1.0], [1.0, 0.0]]) + 0j, torch.zeros(2))
    assert theoretical_state_size(modal, 7).tolist() == [3, 1]


def test_channels_of_fewer_states_than_others():
    poles = torch.tensor([[0.5 + 0.1j, 0.3 + 0j, 0.2j], [0.9 + 0j, 0j, 0.1j], [0j, 0j, 0j]])
    residues = torch.tensor([[1.0, 1.0, 2.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]) + 0j
    modal = Modal(
        poles.to(torch.complex128), residues.to(torch.complex128), torch.zeros(3).double()
    )
    gate = torch.rand(2, 3, 9, dtype=torch.float64)
    systems = [
        modal,
        to_state_space(modal),
        to_time_varying(modal, 9),
        gated_convolution(modal, gate, gate),
        TransferFunction(
            torch.tensor([[0.1, 0, 0, 0, 0.2], [0.5, 0, 0, 0, 0], [0, 0, 0, 0, 0]]),
            torch.tensor([[0, 0.1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]),
            torch.ones(3),
        ),
    ]
    for system in systems:
        tss = theoretical_state_size(system, 4, horizon=9)
        assert tss.tolist() in ([5, 1, 0], [[5, 1, 0], [5, 1, 0]]), type(system)
    shift = torch.diag(torch.ones(3), -1)  # u enters a delay line that nobody reads past state 2
    line = StateSpace(
        shift, torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 1.0, 0, 0]), torch.zeros(())
    )
    assert float(theoretical_state_size(line, 4)) == 2
    u, n = torch.rand(1, 9, 3), torch.zeros(1, 9, 3)
    u[..., 2] = 0
    low_rank = TimeVarying(u, u, n + torch.eye(3)[0], u[..., 0], n + torch.eye(3)[0], u)
    assert float(theoretical_state_size(low_rank, 4)) == 2


@pytest.mark.parametrize("heads", [1, 2])
def test_filters_of_unequal_orders(heads):
    """Of a mixer whose filters have 2 to 6 states, every channel has its own."""
    poles = torch.polar(torch.full((4, 3), 0.7), 0.3 + torch.arange(12.0).reshape(4, 3) / 12)
    residues = (torch.arange(3) < torch.tensor([[1], [3], [2], [1]])).float() + 0j
    filter = ModalFilter.from_system(Modal(poles, residues, torch.ones(4)), 20)
    x = torch.randn(1, 60, 4 * heads)
    mixer = Hyena(4, filter) if heads == 1 else MultiHyena(8, 4, filter)
    tss = theoretical_state_size(mixer.operator(x), [7, 15])
    torch.testing.assert_close(tss[0, :, 0].double(), heads * torch.tensor([2.0, 6, 4, 2]).double())


def test_nothing_is_used_of_no_state():
    share = utilization(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 4.0]))
    assert share.tolist() == [0, 0.5]


def test_averages_and_totals():
    first = torch.tensor([[1.0, 3.0], [3.0, 5.0]])  # two channels
    second = torch.tensor([[10.0, 20.0]])
    assert float(aggregate(first)) == 3
    assert float(aggregate(first, "total")) == 6
    assert float(aggregate([first, second])) == (3 + 15) / 2
    assert float(aggregate([first, second], "total")) == 6 + 15
    assert aggregate([first, second], over_positions=False).tolist() == [6, 12]
    assert aggregate([first, second], "total", over_positions=False).tolist() == [14, 28]
    many = torch.rand(2, 3, 4, 7)
    torch.testing.assert_close(aggregate(many), many.mean())
    for bad in ([], [first, torch.ones(2, 3)], torch.ones(())):
        with pytest.raises(ValueError, match=r"one tensor \(\*channels, positions\)"):
            aggregate([bad] if isinstance(bad, torch.Tensor) else bad)
    with pytest.raises(ValueError, match="kind must be"):
        aggregate(first, "median")


def test_positions_bound_what_can_be_used():
    tss = torch.tensor([[5.0, 5, 5, 5], [0, 1, 2, 3]])
    assert usable_state_size(tss, [0, 1, 4, 9], 10).tolist() == [[0, 1, 4, 1], [0, 1, 2, 1]]
    for at, message in (
        ([0, 1], "one position"),
        ([0, 1, 2, 11], "0 … 10"),
        ([-1, 0, 1, 2], "0 …"),
    ):
        with pytest.raises(ValueError, match=message):
            usable_state_size(tss, at, 10)


@pytest.mark.each
@pytest.mark.parametrize("length", [1, 2, 3, 63])
@pytest.mark.parametrize("window", [1, 2, 6, 200])
def test_a_window_keeps_no_more_than_the_window(length: int, window: int) -> None:
    row, column = torch.arange(length)[:, None], torch.arange(length)
    scores = torch.randn(2, length, length).masked_fill(column > row, -torch.inf)
    scores[0] = scores[0].masked_fill(row - column >= window, -torch.inf)
    tss = theoretical_state_size(scores.softmax(-1))
    for i in range(length):
        assert tss[:, i].tolist() == [min(i, window - 1, length - 1), i]


@pytest.mark.parametrize("rows", [1, 3, 5, 512])
def test_inputs_that_nothing_reads_any_more_are_not_kept(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gramian.ess.aggregation._ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 17, 17, generator=generator)
    matrix = torch.where(torch.rand(matrix.shape, generator=generator) < 0.15, matrix, 0).tril()
    horizon = 13
    for positions in ([0, 4, 9, 12], [5, 6], [7], [12]):
        tss = theoretical_state_size(matrix, positions, horizon=horizon)
        for g in range(3):
            for p, i in enumerate(positions):
                kept = [j for j in range(i) if bool((matrix[g, i:horizon, j] != 0).any())]
                assert float(tss[g, p]) == len(kept)
                assert torch.linalg.matrix_rank(matrix[g, i:horizon, :i]) <= len(kept)
    assert theoretical_state_size(torch.zeros(0, 4, 4)).shape == (0, 4)
