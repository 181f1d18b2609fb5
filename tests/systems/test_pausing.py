"""Streams of unequal lengths in one chunk: each is what it is alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from gramian import FIR, Modal, StateSpace, TransferFunction
from gramian.systems import DPLR, Pause, PausedOperator, Recurrence
from gramian.systems._pausing import apply_paused

CHANNELS = 3


def modal() -> Recurrence:
    angle = torch.rand(CHANNELS, 4, dtype=torch.float64) * 3
    poles = torch.polar(torch.full_like(angle, 0.9), angle)
    residues = torch.randn(CHANNELS, 4, dtype=torch.complex128)
    return Modal(poles, residues, torch.randn(CHANNELS, dtype=torch.float64)).recurrence()


def transfer_function() -> TransferFunction:
    b, a = (0.2 * torch.randn(CHANNELS, 5, dtype=torch.float64) for _ in range(2))
    return TransferFunction(b, a, torch.randn(CHANNELS, dtype=torch.float64))


def state_space() -> Recurrence:
    A = 0.3 * torch.randn(CHANNELS, 4, 4, dtype=torch.float64)
    B, C = torch.randn(2, CHANNELS, 4, dtype=torch.float64)
    return StateSpace(A, B, C, torch.randn(CHANNELS, dtype=torch.float64)).recurrence()


def dplr() -> Recurrence:
    poles = torch.polar(torch.full((CHANNELS, 3), 0.8), torch.rand(CHANNELS, 3)).to(
        torch.complex128
    )
    fields = (0.3 * torch.randn(CHANNELS, 3, dtype=torch.complex128) for _ in range(4))
    return DPLR(poles, *fields, torch.randn(CHANNELS, dtype=torch.float64)).recurrence()


FORMS: dict[str, Callable[[], Recurrence]] = {
    "modal": modal,
    "companion": lambda: transfer_function().recurrence("companion"),
    "state_space": state_space,
    "dplr": dplr,
    **{
        f"{form}_{taps}": lambda form=form, taps=taps: FIR(
            torch.randn(CHANNELS, taps, dtype=torch.float64)
        ).recurrence(form)
        for form in ("online", "window")
        for taps in (1, 37)
    },
}


@pytest.fixture(params=FORMS)
def recurrence(request: pytest.FixtureRequest) -> Recurrence:
    torch.manual_seed(0)
    return FORMS[request.param]()


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 3), (5, 63), (20, 257)])
def test_a_stream_of_a_chunk_is_the_stream_alone(
    recurrence: Recurrence, batch: int, length: int
) -> None:
    shape = (batch, CHANNELS)
    past = torch.randn(*shape, 45, dtype=torch.float64)
    _, warm = recurrence.prefill(past, recurrence.initial_state(shape))
    steps = torch.randint(length + 1, (batch,)).tolist()
    steps[0] = length if batch > 1 else steps[0]  # a stream without a sample
    u = torch.randn(*shape, length, dtype=torch.float64)
    noise = u.clone()
    for row, step in enumerate(steps):
        noise[row, :, :step] = 1e3  # what stands there is not looked at
    y, after = apply_paused(recurrence.prefill, noise, warm.clone(), Pause(steps, length))
    last, _ = recurrence.step(u[..., 0], after.clone())
    for row, step in enumerate(steps):
        one = torch.tensor([row])
        _, state = recurrence.prefill(past[one], recurrence.initial_state((1, CHANNELS)))
        if step < length:
            alone, state = recurrence.prefill(u[one][..., step:], state)
            torch.testing.assert_close(y[one][..., step:], alone, rtol=1e-9, atol=1e-9)
        assert not y[one][..., :step].any()
        then, _ = recurrence.step(u[one][..., 0], state)
        torch.testing.assert_close(last[one], then, rtol=1e-9, atol=1e-9)


def test_parts_of_a_chunk_are_the_chunk(recurrence: Recurrence) -> None:
    pause, u = Pause([0, 7, 3, 11], 11), torch.randn(4, CHANNELS, 11, dtype=torch.float64)
    _, warm = recurrence.prefill(torch.randn(4, CHANNELS, 9, dtype=torch.float64))
    y, after = apply_paused(recurrence.prefill, u, warm.clone(), pause)
    operator, state, made = PausedOperator(recurrence.prefill, pause), warm, []
    for size in (4, 1, 6):
        begin = sum(part.shape[-1] for part in made)
        part, state = operator(u[..., begin : begin + size], state)
        made.append(part)
    torch.testing.assert_close(torch.cat(made, -1), y)
    torch.testing.assert_close(
        recurrence.step(u[..., 0], state)[0], recurrence.step(u[..., 0], after)[0]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_have_the_dtype_of_the_chunk(recurrence: Recurrence, dtype: torch.dtype) -> None:
    _, warm = recurrence.prefill(torch.randn(2, CHANNELS, 9))
    u = torch.randn(2, CHANNELS, 5, dtype=dtype)
    for steps in ([0, 0], [0, 3]):
        y, _ = apply_paused(recurrence.prefill, u, warm.clone(), Pause(steps, 5))
        assert y.dtype == dtype


def test_gradients_reach_inputs_and_states_of_streams_that_pause() -> None:
    torch.manual_seed(0)
    system = transfer_function()
    u = torch.randn(3, CHANNELS, 6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, CHANNELS, 5, dtype=torch.float64, requires_grad=True)
    empty = system.recurrence("companion").initial_state((3, CHANNELS))

    def paused(u: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, state = apply_paused(system, u, type(empty)(x), Pause([0, 4, 6], 6))
        return y, *state

    assert torch.autograd.gradcheck(paused, (u, x))


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 257])
def test_pieces_are_every_sample_once_and_few(length: int) -> None:
    torch.manual_seed(length)
    for batch in (1, 2, 40):
        steps = torch.randint(length + 1, (batch,)).tolist()
        pieces = Pause(steps, length).pieces
        assert len(pieces) <= length.bit_length()
        reached = list(steps)
        for piece in pieces:
            for row, begin in zip(piece.streams, piece.begins, strict=True):
                assert begin == reached[row]
                reached[row] += piece.length
        assert reached == [length] * batch


def test_a_pause_within_a_part() -> None:
    pause = Pause([0, 3, 8], 8)
    assert [pause.within(2, 5).steps, pause.within(5, 9).steps] == [(0, 1, 3), (0, 0, 3)]
    assert list(itertools.chain(pause.within(0, 8).steps)) == [0, 3, 8]
