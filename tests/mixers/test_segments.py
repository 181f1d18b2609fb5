"""Padding is not time, and packed rows hold sequences of their own: for every mixer and filter."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gramian.mixers import Block, Mixer, Segments, SoftmaxAttention

_spec = importlib.util.spec_from_file_location("grid", Path(__file__).with_name("test_mixers.py"))
assert _spec is not None and _spec.loader is not None
grid: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(grid)

WIDTH = grid.WIDTH
LENGTHS = [23, 13, 7, 1, 20]
PADDINGS = ("left", "right", "gap")
ATTENTIONS = {
    "attention": lambda: SoftmaxAttention(WIDTH, 3),
    "window": lambda: SoftmaxAttention(WIDTH, 3, 1, window=5),
}
EVERY = [
    *itertools.product(grid.MIXERS, grid.FILTERS),
    *itertools.product(["block"], ["rtf", "implicit"]),
    *((name, "none") for name in (*grid.RECURRENCES, *ATTENTIONS)),
]
every = pytest.mark.parametrize(("name", "filter_name"), EVERY)


def make(name: str, filter_name: str) -> Mixer:
    torch.manual_seed(0)
    if name in ATTENTIONS:
        mixer: Mixer = ATTENTIONS[name]()
    elif name == "block":
        config = grid.FILTERS[filter_name]
        mixer = Block(WIDTH, config, max_length=grid.MAX_LENGTH, norm="batch")
    else:
        mixer = grid.make(name, filter_name)
    return mixer.double().eval()


def place(padding: str, lengths: list[int], width: int) -> Tensor:
    """A mask (rows, width) with so many tokens in each row."""
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in zip(mask, lengths, strict=True):
        if padding == "left":
            row[width - length :] = True
        elif padding == "right":
            row[:length] = True
        elif length > 1:  # between the first and the last token
            row[torch.cat([torch.tensor([0, width - 1]), torch.randperm(width)[:length]])] = True
            row[row.nonzero().flatten()[1 : 1 + int(row.sum()) - length]] = False
        elif length:
            row[width // 2] = True
    return mask


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.each
@every
@pytest.mark.parametrize("padding", PADDINGS)
def test_a_row_gives_what_its_tokens_give_alone(name: str, filter_name: str, padding: str) -> None:
    mixer = make(name, filter_name)
    recurrence = mixer.recurrence()
    first = place(padding, LENGTHS, 26)
    second = place(padding, [0, 11, 3, 5, 1], 14)
    x, z = (torch.randn(*mask.shape, WIDTH, dtype=torch.float64) for mask in (first, second))
    x[~first], z[~second] = torch.nan, 1e4  # padding is not looked at
    then = torch.randn(len(x), WIDTH, dtype=torch.float64)
    with torch.no_grad():
        whole = mixer(x, mask=first)
        made, state = recurrence.prefill(x, mask=first)
        carried, later = mixer(z, state, mask=second)
        frozen, after = recurrence.prefill(z, recurrence.prefill(x, mask=first)[1], mask=second)
        steps = [recurrence.step(then, s)[0] for s in (later, after)]
        for row in range(len(x)):
            one, two = x[row, first[row]][None], z[row, second[row]][None]
            alone, state = recurrence.prefill(one)
            close(whole[row, first[row]], mixer(one)[0])
            close(made[row, first[row]], alone[0])
            if two.shape[1]:
                again, state = recurrence.prefill(two, state)
                close(carried[row, second[row]], again[0])
                close(frozen[row, second[row]], again[0])
            expected, _ = recurrence.step(then[row : row + 1], state)
            for stepped in steps:
                close(stepped[row], expected[0])


@pytest.mark.each
@every
def test_packed_sequences_are_alone_with_their_gradients(name: str, filter_name: str) -> None:
    mixer = make(name, filter_name)
    numbers = torch.zeros(2, 30, dtype=torch.int64)
    numbers[0, 5:], numbers[0, 17:], numbers[1, 1:] = 4, 7, 1
    real = torch.ones(2, 30, dtype=torch.bool)
    real[0, [2, 9, 10]] = real[1, 25:] = False
    x = torch.randn(2, 30, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x) * real.unsqueeze(-1)

    def gradients(loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, [x, *mixer.parameters()], allow_unused=True)
        return [g for g in found if g is not None]

    y = mixer(x, mask=Segments(real, numbers))
    together = gradients((y * weight).nan_to_num(0).sum())
    loss = torch.zeros((), dtype=torch.float64)
    for row, number in ((0, 0), (0, 4), (0, 7), (1, 0), (1, 1)):
        chosen = real[row] & (numbers[row] == number)
        alone = mixer(x[row, chosen][None])[0]
        close(y[row, chosen], alone)
        loss = loss + (alone * weight[row, chosen]).sum()
    for found, expected in zip(together, gradients(loss), strict=True):
        close(found, expected)


@pytest.mark.each
@every
def test_gradients_pass_through_a_padded_turn(name: str, filter_name: str) -> None:
    mixer = make(name, filter_name)
    first, second = place("right", [9, 4], 9), place("gap", [2, 6], 8)
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    z = torch.randn(2, 8, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 8, WIDTH, dtype=torch.float64) * second.unsqueeze(-1)
    empty = mixer.recurrence().initial_state(2)
    _, state = mixer(x, empty, mask=first)
    y, _ = mixer(z, state, mask=second)
    inputs = [x, z, *mixer.parameters()]
    found = torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True)
    loss = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        tokens = torch.cat([x[row, first[row]], z[row, second[row]]])[None]
        alone = mixer(tokens)[0, int(first[row].sum()) :]
        close(y[row, second[row]], alone)
        loss = loss + (alone * weight[row, second[row]]).sum()
    expected = torch.autograd.grad(loss, inputs, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        if one is not None and other is not None:
            close(one, other)


@pytest.mark.each
@every
@pytest.mark.parametrize("padding", PADDINGS)
def test_operators_pass_over_padding(name: str, filter_name: str, padding: str) -> None:
    mixer = make(name, filter_name)
    mask = place(padding, [9, 5], 9)
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    matrices = mixer.operator(x, mask=mask).matrix(9)
    if name in ("long_convolution", "block"):  # the same on every input
        close(matrices, mixer.operator(x[:1]).matrix(9))
        return
    close(matrices[0], mixer.operator(x[:1]).matrix(9)[0])
    alone = mixer.operator(x[1:, mask[1]]).matrix(5)[0]
    at = slice(0, 5) if padding == "right" else slice(4, 9)
    close(matrices[1, ..., at, at], alone)
    if padding == "right":
        assert not matrices[1, ..., 5:, :].any()
    else:
        assert not matrices[1, ..., :4].any() and not matrices[1, ..., :4, :].any()


def test_a_bidirectional_layer_looks_at_its_own_sequence() -> None:
    config = grid.FILTERS["rtf"]
    mixer = Block(WIDTH, config, max_length=grid.MAX_LENGTH, bidirectional=True).double().eval()
    real = place("gap", [12, 20], 20)
    numbers = (torch.arange(20) > 8).long().expand(2, 20)
    x = torch.randn(2, 20, WIDTH, dtype=torch.float64)
    y, packed = mixer(x, mask=real), mixer(x, mask=Segments(real, numbers))
    for row in range(2):
        close(y[row, real[row]], mixer(x[row, real[row]][None])[0])
        for number in (0, 1):
            chosen = real[row] & (numbers[row] == number)
            close(packed[row, chosen], mixer(x[row, chosen][None])[0])


def test_rows_that_are_in_order_are_not_moved() -> None:
    for padding, unbroken, aligned in (("left", True, True), ("right", True, False)):
        segments = Segments(place(padding, [3, 9, 0], 9))
        assert (segments.unbroken, segments.aligned) == (unbroken, aligned)
        assert segments.has_empty_rows
    gap = Segments(torch.tensor([[1, 0, 1]]))
    assert (gap.unbroken, gap.aligned, gap.has_empty_rows) == (False, False, False)


def test_short_sequences_do_not_pay_for_long_ones() -> None:
    lengths = [900, 5, 870, 6, 7] + [8] * 600
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    parts = Segments(None, numbers).parts
    columns = sum(part.source.numel() for part in parts)
    assert len(parts) == 2 and columns < 2 * sum(lengths)
    found = torch.cat(
        [p.source[p.real] if p.real is not None else p.source.flatten() for p in parts]
    )
    assert torch.equal(found.sort().values, torch.arange(sum(lengths)))


def test_refusals() -> None:
    mixer = make("hyena2", "rtf")
    x = torch.randn(1, 4, WIDTH, dtype=torch.float64)
    packed = Segments(None, torch.tensor([[0, 0, 1, 1]]))
    with pytest.raises(ValueError, match="packed rows can neither begin"):
        mixer.recurrence().prefill(x, mask=packed)
    with pytest.raises(ValueError, match="one operator for each sequence"):
        mixer.operator(x, mask=packed)
    with pytest.raises(ValueError, match="follow each other"):
        mixer(x, mask=Segments(None, torch.tensor([[0, 1, 0, 1]])))
    with pytest.raises(ValueError, match="one shape"):
        Segments(torch.ones(1, 4), torch.zeros(1, 5))
    with pytest.raises(ValueError, match="neither"):
        Segments(None)
    with pytest.raises(ValueError, match="the mask must be"):
        mixer(x, mask=Segments(torch.ones(1, 5)))
