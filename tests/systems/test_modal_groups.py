"""Channels grouped by their number of modes: the same map, and no room for padding."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from gramian.filters import ModalFilter
from gramian.systems import Modal
from gramian.systems._modal_recurrence import partition_channels

COUNTS = {
    "one_large": (2,) * 20 + (64,) + (2,) * 10,
    "spread": tuple(range(31)),
    "equal": (5,) * 8,
    "none": (0, 0, 3),
    "nothing": (0, 0),
}


def make(counts: tuple[int, ...]) -> Modal:
    torch.manual_seed(len(counts))
    width = max(counts)
    kept = torch.arange(width) < torch.tensor(counts)[:, None]
    poles = torch.polar(0.5 + 0.45 * torch.rand(kept.shape), 3 * torch.rand(kept.shape))
    residues = torch.randn(kept.shape, dtype=torch.complex128) * kept
    d = torch.randn(len(counts), dtype=torch.float64)
    return Modal(poles.to(torch.complex128), residues, d, counts=counts)


def run(system: Modal, u: Tensor) -> Tensor:
    """Prefill, steps, a chunk and more steps."""
    recurrence = system.recurrence()
    y, state = recurrence.prefill(u[..., :7])
    outputs = [y]
    for begin, end in itertools.pairwise((7, 8, 9, 15, 16)):
        if end - begin == 1:
            y, state = recurrence.step(u[..., begin], state)
            outputs.append(y.unsqueeze(-1))
        else:
            y, state = system(u[..., begin:end], state)
            outputs.append(y)
    return torch.cat(outputs, -1)


@pytest.mark.each
@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_grouped_is_the_same_map(kind: str, batch: tuple[int, ...]) -> None:
    system = make(COUNTS[kind])
    u = torch.randn(*batch, len(COUNTS[kind]), 16, dtype=torch.float64)
    taps = system.impulse_response(16)
    expected = torch.stack(
        [sum(taps[:, j] * u[..., t - j] for j in range(t + 1)) for t in range(16)], -1
    )
    assert_close(run(system, u), expected)
    heads = system[:, None, None]  # one system for many streams, as in heads
    wide = torch.randn(*batch, len(COUNTS[kind]), 2, 3, 16, dtype=torch.float64)
    got, wanted = run(heads, wide), heads(wide)
    assert_close(got, wanted)


@pytest.mark.parametrize("kind", COUNTS)
def test_states_have_little_padding(kind: str) -> None:
    counts = COUNTS[kind]
    state = make(counts).recurrence().initial_state((1, len(counts)))
    needed = 16 * sum(counts)  # bytes of a complex number in double precision
    assert needed <= state.nbytes <= (1.25 if kind == "spread" else 1.1) * needed
    assert len(state.modes) <= 4


def test_one_filter_of_many_modes_does_not_inflate_its_layer() -> None:
    counts = (8,) * 511 + (128,)
    assert [group.modes for group in partition_channels(counts)] == [8, 128]
    state = ModalFilter(512, counts, 64)().recurrence().initial_state((1, 512))
    assert state.nbytes == 8 * sum(counts)


def test_the_partition_is_the_best() -> None:
    """Against all partitions of the sorted counts into as many intervals."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        counts = tuple(torch.randint(1, 12, (9,), generator=generator).tolist())
        groups = partition_channels(counts)
        reached = sum(len(group.channels or counts) * group.modes for group in groups)
        ordered = sorted(counts)
        best = min(
            sum((b - a) * ordered[b - 1] for a, b in itertools.pairwise((0, *cuts, 9)))
            for cuts in itertools.combinations(range(1, 9), len(groups) - 1)
        )
        assert reached == best
        assert sorted(sum((g.channels or tuple(range(9)) for g in groups), ())) == list(range(9))


def test_counts_follow_the_channels() -> None:
    system = make(COUNTS["one_large"])
    assert system[3:25].groups == partition_channels(COUNTS["one_large"][3:25])
    assert system[::2].recurrence().initial_state((1, 16)).nbytes < 16 * (15 * 2 + 65)
    assert len(system[[20, 3]].groups) == 1  # unknown after other indices
    leaves, spec = pytree.tree_flatten(system)
    assert pytree.tree_unflatten(leaves, spec).groups == system.groups == system.detach().groups
    u = torch.randn(2, 16, 16, dtype=torch.float64)
    assert_close(run(system[::2], u), system[::2](u))
    with pytest.raises(ValueError, match=r"one number of modes for each channel.*got 2"):
        Modal(system.poles, system.residues, system.d, counts=(1, 2))


def test_a_channel_without_modes_has_gradients_through_chunks() -> None:
    poles = torch.zeros(2, 1, dtype=torch.complex128)
    poles[1] = 0.5 + 0.3j
    residues = torch.zeros_like(poles)
    residues[1] = 1.0 - 0.2j
    system = Modal(poles, residues, torch.ones(2, dtype=torch.float64), counts=(0, 1))
    u = torch.randn(3, 2, 9, dtype=torch.float64, requires_grad=True)
    state = system.recurrence().initial_state((3, 2))
    first, state = system(u[..., :4], state)
    second, _ = system(u[..., 4:], state)
    (slope,) = torch.autograd.grad(torch.cat([first, second], -1).square().sum(), u)
    (expected,) = torch.autograd.grad(system(u).square().sum(), u)
    assert_close(slope, expected)
