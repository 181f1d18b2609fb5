"""Attention against its definition in float64: groups, rotations, windows, masks, state."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from gramian.mixers import Block, SoftmaxAttention, SoftmaxAttentionState
from gramian.testing import check_mixer

WIDTH = 12
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"heads": 3, "rotary_base": None},
    "rotary": {"heads": 2, "bias": True},
    "grouped": {"heads": 6, "kv_heads": 2, "rotary_base": 50.0, "rotary_scaling": 4.0},
    "window": {"heads": 2, "kv_heads": 1, "window": 5, "out_bias": True},
    "wide": {"heads": 2, "head_width": 10, "rotary_width": 4, "window": 70},
}
every = pytest.mark.parametrize("kind", KINDS)


def make(kind: str) -> SoftmaxAttention:
    torch.manual_seed(0)
    return SoftmaxAttention(WIDTH, **KINDS[kind]).double()


@every
def test_every_kind_conforms(kind: str) -> None:
    check_mixer(make(kind))


def signal(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, dtype=torch.float64)


def naive(mixer: SoftmaxAttention, x: Tensor) -> Tensor:
    """The definition for one unpadded sequence (length, width), a loop over heads and time."""
    length, size = len(x), mixer.head_width
    z = mixer.in_proj(x).reshape(length, -1, size)
    heads, groups = mixer.heads, mixer.heads // mixer.kv_heads

    def turned(vector: Tensor, position: int) -> Tensor:
        if mixer.rotary_base is None:
            return vector
        half = mixer.rotary_width // 2
        out = vector.clone()
        for i in range(half):
            angle = position / mixer.rotary_scaling * mixer.rotary_base ** (-i / half)
            a, b = vector[i], vector[i + half]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    keys = [
        torch.stack([turned(z[s, heads + shared], s) for s in range(length)])
        for shared in range(mixer.kv_heads)
    ]
    rows = []
    for t in range(length):
        begin = 0 if mixer.window is None else max(0, t - mixer.window + 1)
        merged = []
        for h in range(heads):
            query, shared = turned(z[t, h], t), h // groups
            values = z[begin : t + 1, heads + mixer.kv_heads + shared]
            scores = keys[shared][begin : t + 1] @ query / math.sqrt(size)
            merged.append(torch.softmax(scores, 0) @ values)
        rows.append(mixer.out_proj(torch.cat(merged)))
    return torch.stack(rows)


@pytest.mark.each
@every
@pytest.mark.parametrize("length", [1, 2, 3, 17])
@torch.no_grad()
def test_it_is_the_definition(kind: str, length: int) -> None:
    mixer, x = make(kind), signal(2, length)
    assert_close(mixer(x), torch.stack([naive(mixer, row) for row in x]))


@every
@pytest.mark.parametrize("cuts", [(1, 2), (7, 63, 64, 65), (40, 131), tuple(range(1, 150))])
@torch.no_grad()
def test_chunks_and_steps_are_the_whole(kind: str, cuts: tuple[int, ...]) -> None:
    """Past the first room of 64 tokens, past every window, in chunks longer than a window."""
    mixer, x = make(kind), signal(2, 150)
    expected, recurrence = mixer(x), mixer.recurrence()
    state, outputs = recurrence.initial_state(2), []
    for n, (begin, end) in enumerate(itertools.pairwise((0, *cuts, 150))):
        if end - begin == 1:
            y, state = recurrence.step(x[:, begin], state)
            y = y[:, None]
        elif n % 2:
            y, state = mixer(x[:, begin:end], state)
        else:
            y, state = recurrence.prefill(x[:, begin:end], state)
        outputs.append(y)
        assert state.nbytes == recurrence.state_bytes(2, context=end)
    assert_close(torch.cat(outputs, 1), expected)


@every
@torch.no_grad()
def test_padding_anywhere_is_as_if_it_were_not_there(kind: str) -> None:
    mixer, length = make(kind), 90
    x = signal(3, length)
    mask = torch.rand(3, length) > 0.4
    mask[0, :30], mask[0, 30:] = False, True
    expected = [naive(mixer, row[real]) for row, real in zip(x, mask, strict=True)]
    whole = mixer(x, mask=mask)
    assert whole.isfinite().all()

    recurrence = mixer.recurrence()
    state, chunked = recurrence.initial_state(3), []
    for n, (begin, end) in enumerate(itertools.pairwise((0, 9, 10, 11, 40, length))):
        call = mixer if n % 2 else recurrence.prefill
        y, state = call(x[:, begin:end], state, mask=mask[:, begin:end])
        chunked.append(y)
    assert isinstance(state, SoftmaxAttentionState)
    assert state.real.tolist() == mask.sum(1).tolist()
    for y in (whole, torch.cat(chunked, 1)):
        for row, real, wanted in zip(y, mask, expected, strict=True):
            assert_close(row[real], wanted)

    more = signal(3, 1)
    y, _ = recurrence.step(more[:, 0], state)
    for n, real in enumerate(mask):
        assert_close(y[n], naive(mixer, torch.cat([x[n, real], more[n]]))[-1])


@every
def test_gradients_through_the_state(kind: str) -> None:
    mixer, x = make(kind), signal(2, 30).requires_grad_()
    mask = torch.ones(2, 30)
    mask[0, :4] = 0
    inputs, weight = [x, *mixer.parameters()], signal(2, 30) * mask[..., None]
    expected = torch.autograd.grad((mixer(x, mask=mask) * weight).sum(), inputs)
    state, outputs = mixer.recurrence().initial_state(2), []
    for begin, end in ((0, 7), (7, 8), (8, 30)):
        y, state = mixer(x[:, begin:end], state, mask=mask[:, begin:end])
        outputs.append(y)
    assert_close(torch.autograd.grad((torch.cat(outputs, 1) * weight).sum(), inputs), expected)


@pytest.mark.parametrize("window", [None, 20])
@torch.no_grad()
def test_masks_are_made_in_parts(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    torch.manual_seed(0)
    mixer = SoftmaxAttention(WIDTH, 3, window=window).double()
    x, mask = signal(2, 200), torch.rand(2, 200) > 0.2
    recurrence = mixer.recurrence()
    _, state = recurrence.prefill(signal(2, 80))
    wanted = [mixer(x), mixer(x, mask=mask), recurrence.prefill(x, state, mask=mask)[0]]
    monkeypatch.setattr("gramian.mixers.softmax_attention._MASK_ELEMENTS", 3000)
    got = [mixer(x), mixer(x, mask=mask), recurrence.prefill(x, state, mask=mask)[0]]
    assert_close(got, wanted)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_dropped_weights_keep_the_mean_in_training_only(masked: bool) -> None:
    """Over many draws, the mean output is the one without dropout; a state drops nothing."""
    torch.manual_seed(0)
    dropped = SoftmaxAttention(WIDTH, 2, dropout=0.25).double()
    whole = SoftmaxAttention(WIDTH, 2).double().eval()
    whole.load_state_dict(dropped.state_dict())
    assert dropped.config()["dropout"] == 0.25
    x = signal(1, 6)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]]) if masked else None
    expected = whole(x, mask=mask)[:, 1:]
    rows = 4096
    rows_mask = None if mask is None else mask.expand(rows, -1)
    many = dropped(x.expand(rows, -1, -1), mask=rows_mask)[:, 1:]
    assert float((many - expected).abs().amax()) > 0.1
    deviation = many.std(0) / math.sqrt(rows)
    assert float(((many.mean(0) - expected[0]) / deviation).abs().amax()) < 5
    assert_close(dropped.eval()(x, mask=mask)[:, 1:], expected)
    y, _ = dropped.train()(x, dropped.recurrence().initial_state(1), mask=mask)
    assert_close(y[:, 1:], dropped.eval()(x, mask=mask)[:, 1:])


@torch.no_grad()
def test_it_is_the_attention_of_llama() -> None:
    """Separate projections concatenate; rotations follow the same convention."""
    torch.manual_seed(0)
    rope = {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}
    config = LlamaConfig(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    theirs = LlamaAttention(config, 0)
    ours = SoftmaxAttention(24, 4, 2, rotary_base=500.0, rotary_scaling=2.0)
    parts = (theirs.q_proj, theirs.k_proj, theirs.v_proj)
    ours.in_proj.weight.copy_(torch.cat([part.weight for part in parts]))
    ours.out_proj.weight.copy_(theirs.o_proj.weight)
    x = torch.randn(2, 11, 24)
    angles = LlamaRotaryEmbedding(config)(x, torch.arange(11)[None])
    causal = torch.full((11, 11), -torch.inf).triu(1)[None, None]
    assert_close(ours(x), theirs(x, angles, causal)[0])


@torch.no_grad()
def test_state_of_a_window_stops_growing_and_others_double() -> None:
    bounded, free = make("wide").recurrence(), make("rotary").recurrence()
    assert bounded.state_bytes(1, context=64) < bounded.state_bytes(1, context=65)
    assert bounded.state_bytes(1, context=70) == bounded.state_bytes(1, context=10**6)
    keys = 2 * 1024 * WIDTH * 8  # keys and values of 1,024 tokens in double precision
    assert free.state_bytes(1, context=1000) == free.state_bytes(1, context=1024) == keys + 8
    assert free.state_bytes(3, context=1025) == 3 * (2 * keys + 8)


@torch.no_grad()
def test_states_are_selected_repeated_and_cast() -> None:
    mixer, x = make("grouped"), signal(3, 9)
    recurrence = mixer.recurrence()
    _, state = recurrence.prefill(x)
    picked = torch.tensor([2, 0, 2])
    more = signal(3, 1)
    y, _ = recurrence.step(more[:, 0], state.select(picked))
    assert_close(y, mixer(torch.cat([x[picked], more], 1))[:, -1])
    y, _ = recurrence.step(more[:2, 0], state.select(picked[:1]).repeat(2))
    assert_close(y, mixer(torch.cat([x[[2, 2]], more[:2]], 1))[:, -1])
    half = state.to(dtype=torch.bfloat16)
    assert half.keys.dtype == torch.bfloat16 and half.real.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype) -> None:
    mixer, x = make("grouped").float(), torch.randn(2, 70, WIDTH)
    expected = mixer(x)
    mixer.to(dtype)
    recurrence = mixer.recurrence()
    y, state = recurrence.prefill(x[:, :69].to(dtype))
    last, state = recurrence.step(x[:, 69].to(dtype), state)
    assert y.dtype == last.dtype == state.keys.dtype == dtype
    assert (torch.cat([y, last[:, None]], 1) - expected).norm() < 3e-2 * expected.norm()


def test_autocast() -> None:
    mixer, x = make("window").float(), torch.randn(2, 30, WIDTH, requires_grad=True)
    expected = mixer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = mixer(x[:, :20], mixer.recurrence().initial_state(2))
        z, state = mixer(x[:, 20:], state)
    y = torch.cat([y, z], 1).float()
    assert (y - expected).norm() < 5e-2 * expected.norm()
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@torch.no_grad()
def test_a_block_takes_it() -> None:
    torch.manual_seed(0)
    block = Block(WIDTH, SoftmaxAttention(WIDTH, 2, window=7)).double()
    x = signal(2, 80)
    recurrence = block.recurrence()
    y, state = recurrence.prefill(x[:, :60])
    outputs = [y]
    for t in range(60, 80):
        y, state = recurrence.step(x[:, t], state)
        outputs.append(y[:, None])
    assert_close(torch.cat(outputs, 1), block(x))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"heads": 5}, "heads must divide the width 12; got 5"),
        ({"heads": 0}, "heads must divide"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads must divide the 4 heads; got 3"),
        ({"heads": 2, "dropout": 1.0}, "dropout must be a probability, .* below 1; got 1.0"),
        ({"heads": 2, "window": 0}, "window must be an integer of at least 1; got 0"),
        ({"heads": 4}, "rotary_width must be even.*got 3"),
        ({"heads": 2, "rotary_width": 8}, "rotary_width must be even.*at most.*6; got 8"),
        ({"heads": 2, "rotary_base": -1.0}, "must be positive; got -1.0"),
        ({"heads": 2, "rotary_scaling": 0.0}, "must be positive; got 10000.0 and 0.0"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SoftmaxAttention(WIDTH, **arguments)
